"""Floor 3: what calibration measured, as an artifact that merges exactly and is refused where it does not fit.

Knows tensors and files; nothing of graphs or of loaders.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .. import artifacts
from ..arguments import some
from ..errors import StatisticsError
from ..rewrite import PREFIX
from ..seen import SHARED, known_share, least_marks
from ..tables import as_text
from .answers import Answers
from .histogram import FeatureHistogram, stored_histogram, typical
from .moments import ChannelHistogram, ChannelStatistics
from .summary import summary_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "meansparse_fx.statistics"
FORMAT_VERSION = "2"
_MARKS = ":marks"  # no site's: those have a name


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Statistics(Mapping[str, ChannelStatistics]):
    """The moments of every site of one model, by site name.

    Attributes:
        sites: Site name to moments.
        fingerprint: Of the base model's weights, from `fingerprint`.
        images: Number of images seen.
        metadata: Further facts as strings: package versions, data description.
        graph: Of the captured graph, from `graph_fingerprint`: a record, since each capture route has its own graph.
        table: By site name what the site was: kind, activation, channel_dim, channels, after.
        answers: Of the base model, where they are known: see `Answers`.
        marks: ``[K]`` int64, sorted: `seen.image_marks` of the images, of more than `MOST_MARKS` the least.
    """

    sites: dict[str, ChannelStatistics]
    fingerprint: str
    images: int
    metadata: dict[str, str] = field(default_factory=dict)
    graph: str = ""
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    marks: Tensor = field(default_factory=lambda: least_marks([]))
    answers: Answers | None = None

    def __getitem__(self, name: str) -> ChannelStatistics:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        return as_text(summary_table(self))

    def histogram(self, site: str | None = None, channel: int | None = None, alpha: float = 0.3) -> FeatureHistogram:
        """Return one channel's values before and after an operator, as calibration counted them.

        Args:
            site, channel: By default those in the middle: see `typical`.
            alpha: Of the operator.

        Raises:
            StatisticsError: No such site or channel, or no histograms.
        """
        if site is not None and site not in self:
            near = difflib.get_close_matches(site, self, 3) or list(self)[:3]
            more = ", ..." if len(near) < len(self) else ""
            raise StatisticsError(f"the statistics have no site {site!r}; there are {', '.join(near)}{more}")
        counted = {name: own for name, own in self.items() if site in (None, name) and own.histogram is not None}
        if not counted:
            where = "" if site is None else f"{site}: "
            raise StatisticsError(
                f"{where}no histograms in the statistics (a merge has none): calibrate with histograms (--histograms)"
            )
        if channel is None or site is None:
            shares = {n: s.histogram.share_inside(s.mean, alpha * s.std) for n, s in counted.items() if s.histogram}
            site, found = typical(shares)
            channel = found if channel is None else channel
        return stored_histogram(site, counted[site], channel, alpha, self.images)

    def figure(self, site: str | None = None, channel: int | None = None, alpha: float = 0.3) -> Figure:
        """Return `histogram` as a matplotlib figure: ``statistics.figure("layer1.0.relu", 3).savefig("x.pdf")``."""
        return self.histogram(site, channel, alpha).figure()

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both data sets together; without histograms, whose bins each calibration lays anew.

        Raises:
            StatisticsError: They are of different models or sites, or of the same images.
        """
        if self.fingerprint != other.fingerprint:
            raise StatisticsError("cannot merge statistics of two different models (fingerprints differ)")
        if self.sites.keys() != other.sites.keys():
            raise StatisticsError(f"cannot merge: sites differ ({some(self.sites.keys() ^ other.sites.keys())})")
        for name in self.table.keys() & other.table.keys():
            if self.table[name] != other.table[name]:
                raise StatisticsError(f"cannot merge: {name} is {self.table[name]} in one and {other.table[name]}")
        pairs = [(own, other[name]) for name, own in self.sites.items()]
        if not all(s.count for pair in pairs for s in pair):
            raise StatisticsError("cannot merge: how many images one of them is of is not known; calibrate the model")
        if all(a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.m2, b.m2) for a, b in pairs):
            raise StatisticsError("cannot merge: both are of the same images, which would count twice")
        twice = max(known_share(self.marks, other.marks), known_share(other.marks, self.marks))
        if twice > SHARED:
            raise StatisticsError(
                f"cannot merge: {100 * twice:.0f} % of the images of one are in the other and would count twice; "
                "measure disjoint parts (--skip, --limit)"
            )
        sites = {name: own.merge(other[name]) for name, own in self.sites.items()}
        metadata = {
            key: " + ".join(dict.fromkeys(m[key] for m in (self.metadata, other.metadata) if key in m))
            for key in self.metadata | other.metadata
        }
        table = self.table or other.table
        marks = least_marks([self.marks, other.marks])
        images, known = self.images + other.images, self.answers or other.answers
        return Statistics(sites, self.fingerprint, images, metadata, self.graph, table, marks, known)

    def without(self, left: Collection[str], kinds: Collection[str]) -> Statistics:
        """Return the statistics of fewer sites: without those that are ``left``, and of ``kinds`` alone."""
        kept = {
            n: s
            for n, s in self.sites.items()
            if n not in left and self.table.get(n, {}).get("kind") in {None, "published", *kinds}
        }
        return replace(self, sites=kept)

    def check(
        self,
        channels: Mapping[str, int],
        fingerprint: str | None = None,
        activations: Mapping[str, str | None] | None = None,
    ) -> None:
        """Raise StatisticsError unless these statistics fit a model's sites.

        Args:
            channels: Site name to number of channels, of the model they are meant for.
            fingerprint: That model's; None leaves the weights unchecked.
            activations: Site name to activation, where both are known: equal weights may serve another network.
        """
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise StatisticsError(
                "these statistics were measured on other weights (fingerprints differ): calibrate this model "
                "(if it is the same model in another precision: set_statistics(model, statistics, check_weights=False))"
            )
        if missing := channels.keys() - self.sites.keys():
            raise StatisticsError(f"statistics lack {len(missing)} site(s) of the model: {some(missing)}")
        if extra := self.sites.keys() - channels.keys():
            raise StatisticsError(f"statistics have {len(extra)} site(s) the model lacks: {some(extra)}")
        for name, expected in channels.items():
            own = self.sites[name]
            if len(own.mean) != expected:
                raise StatisticsError(f"{name}: statistics of {len(own.mean)} channels for a site of {expected}")
            if not (own.mean.isfinite().all() and own.m2.isfinite().all()):
                raise StatisticsError(f"{name}: statistics hold NaN or inf; calibrate again")
            unmeasured = own.count == 0 and not own.m2.any()  # of an unknown count m2 is the variance
            if unmeasured or (own.m2 < 0).any():
                raise StatisticsError(f"{name}: count {own.count} or a negative m2 is no measurement; calibrate again")
        for name, activation in (activations or {}).items():
            measured = self.table.get(name, {}).get("activation")
            if None not in (activation, measured) and activation != measured:
                raise StatisticsError(
                    f"{name}: measured before {measured}, the model has {activation} there: calibrate this model"
                )

    def save(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file; a reader sees the old file or the whole new one.

        Args:
            path: The file.
            settings: Of a transformed model, to stand beside the statistics: see `settings`.

        Raises:
            WriteError: It cannot be written there; it is in the temporary folder instead, at the place named.
        """
        tensors: dict[str, Tensor] = {_MARKS: self.marks}
        for name, s in self.sites.items():
            tensors |= {f"{name}:mean": s.mean, f"{name}:m2": s.m2, f"{name}:std": s.std}
            if s.histogram is not None:
                h = s.histogram
                tensors |= {f"{name}:low": h.low, f"{name}:width": h.width, f"{name}:histogram": h.counts}
        header = {
            "fingerprint": self.fingerprint,
            "graph": self.graph,
            "images": self.images,
            "counts": {name: s.count for name, s in self.sites.items()},
            "table": self.table,
            "metadata": self.metadata,
            "answers": self.answers and asdict(self.answers),
            "settings": settings,
        }
        artifacts.write(path, FORMAT, FORMAT_VERSION, header, tensors, rescue=True)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Return the statistics kept in a file.

        Raises:
            ArtifactError: The file is truncated, not safetensors, or not written by this package.
        """
        return cls.load_with_settings(path)[0]

    @classmethod
    def load_with_settings(cls, path: str | Path) -> tuple[Statistics, dict[str, Any] | None]:
        """Return the statistics kept in a file, and the settings beside them if there are any."""
        header, tensors = artifacts.read(path, FORMAT, FORMAT_VERSION, "a statistics file")
        with artifacts.parsing(path):
            sites = {name: _site(tensors, name, count) for name, count in header["counts"].items()}
            kinds = {"fingerprint": str, "images": int, "metadata": dict, "graph": str, "table": dict}
            facts = {name: header[name] for name in kinds}
            for name, kind in kinds.items():
                if not isinstance(facts[name], kind):
                    raise TypeError(f"{facts[name]!r} where its {name} belongs")
            if not all(isinstance(row, dict) for row in facts["table"].values()):
                raise TypeError("rows of its table are no tables")
            marks = artifacts.typed_tensor({_MARKS: least_marks([])} | tensors, _MARKS, torch.int64, (None,))
            found = cls(sites, **facts, marks=marks, answers=Answers.read(header.get("answers")))
            return found, header.get("settings")


def _site(tensors: Mapping[str, Tensor], name: str, count: int) -> ChannelStatistics:
    channels = len(tensors[f"{name}:mean"])

    def vector(part: str) -> Tensor:
        return artifacts.typed_tensor(tensors, f"{name}:{part}", torch.float64, (channels,))

    histogram = None
    if f"{name}:histogram" in tensors:
        counts = artifacts.typed_tensor(tensors, f"{name}:histogram", torch.int64, (channels, None))
        histogram = ChannelHistogram(vector("low"), vector("width"), counts)
    return ChannelStatistics(artifacts.whole_number(count), vector("mean"), vector("m2"), histogram)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the base model's parameters and buffers, by name; what this package added is left out."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in _base_state(model):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(artifacts.tensor_bytes(value))
    return digest.hexdigest()


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of each of the tensors that `fingerprint` hashes together, by name: to say which differs."""
    return {name: artifacts.digest(value) for name, value in _base_state(model)}


def _base_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the base model's part of a state_dict."""
    state = model.state_dict()
    for name in sorted(state):
        if name.split(".")[0] != PREFIX and isinstance(state[name], Tensor):
            yield name, state[name]


def graph_fingerprint(graph_module: fx.GraphModule) -> str:
    """Return a hash of a graph's calls in their order, whatever its weights."""
    code = re.sub(r"0x[0-9a-f]+", "", graph_module.code)  # addresses in the names of objects
    return hashlib.blake2b(code.encode(), digest_size=16).hexdigest()
