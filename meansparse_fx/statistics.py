"""Floor 3: what calibration measured, as an artifact that merges exactly and is refused where it does not fit.

Knows tensors and files; nothing of graphs or of loaders.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ArtifactError, StatisticsError
from .rewrite import PREFIX

FORMAT = "meansparse_fx.statistics"
FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStatistics:
    """Exact moments of one site's input.

    Attributes:
        count: Values seen per channel (images times positions).
        mean: ``[C]`` float64, in the units of the input.
        m2: ``[C]`` float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def std(self) -> Tensor:
        """Population standard deviation, ``[C]`` float64."""
        return (self.m2 / max(self.count, 1)).sqrt()

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the moments of both samples together (Chan, Golub and LeVeque, 1979)."""
        if self.mean.shape != other.mean.shape:
            raise StatisticsError(f"cannot merge {len(self.mean)} channels with {len(other.mean)}")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * (other.count / count))
        return ChannelStatistics(count, mean, m2)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics(Mapping[str, ChannelStatistics]):
    """The moments of every site of one model, by site name.

    Attributes:
        sites: Site name to moments.
        fingerprint: Of the base model's weights, from `fingerprint`.
        images: Number of images seen.
        metadata: Further facts as strings: package versions, data description.
    """

    sites: dict[str, ChannelStatistics]
    fingerprint: str
    images: int
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ChannelStatistics:
        return self.sites[name]

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both data sets together; both must be of the same model and sites."""
        if self.fingerprint != other.fingerprint:
            raise StatisticsError("cannot merge statistics of two different models (fingerprints differ)")
        if self.sites.keys() != other.sites.keys():
            raise StatisticsError(f"cannot merge: sites differ ({_some(self.sites.keys() ^ other.sites.keys())})")
        sites = {name: own.merge(other[name]) for name, own in self.sites.items()}
        return Statistics(sites, self.fingerprint, self.images + other.images, self.metadata)

    def check(self, channels: Mapping[str, int], fingerprint: str | None = None) -> None:
        """Raise StatisticsError unless these statistics fit a model's sites.

        Args:
            channels: Site name to number of channels, of the model they are meant for.
            fingerprint: That model's; None leaves the weights unchecked.
        """
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise StatisticsError(
                "these statistics were measured on other weights (fingerprints differ): calibrate this model "
                "(from Python, check_weights=False takes them if it is the same model in another precision)"
            )
        if missing := channels.keys() - self.sites.keys():
            raise StatisticsError(f"statistics lack {len(missing)} site(s) of the model: {_some(missing)}")
        if extra := self.sites.keys() - channels.keys():
            raise StatisticsError(f"statistics have {len(extra)} site(s) the model lacks: {_some(extra)}")
        for name, expected in channels.items():
            own = self.sites[name]
            if len(own.mean) != expected:
                raise StatisticsError(f"{name}: statistics of {len(own.mean)} channels for a site of {expected}")
            if not (own.mean.isfinite().all() and own.m2.isfinite().all()):
                raise StatisticsError(f"{name}: statistics hold NaN or inf; calibrate again")
            if own.count < 1 or (own.m2 < 0).any():
                raise StatisticsError(f"{name}: count {own.count} or a negative m2 is no measurement; calibrate again")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a reader sees the old file or the whole new one."""
        tensors = {}
        for name, s in self.sites.items():
            tensors |= {f"{name}:mean": s.mean, f"{name}:m2": s.m2, f"{name}:std": s.std}
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "images": str(self.images),
            "counts": json.dumps({name: s.count for name, s in self.sites.items()}),
            "metadata": json.dumps(self.metadata),
        }
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata=header)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Return the statistics kept in a file.

        Raises:
            ArtifactError: The file is truncated, not safetensors, or not written by this package.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ArtifactError(f"{path}: a safetensors file, but not statistics of meansparse_fx")
                if header["format_version"] != FORMAT_VERSION:
                    raise ArtifactError(
                        f"{path}: format version {header['format_version']}; this release reads {FORMAT_VERSION}"
                    )
                sites = {
                    name: ChannelStatistics(count, file.get_tensor(f"{name}:mean"), file.get_tensor(f"{name}:m2"))
                    for name, count in json.loads(header["counts"]).items()
                }
                return cls(sites, header["fingerprint"], int(header["images"]), json.loads(header["metadata"]))
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ArtifactError(f"{path}: truncated or not a statistics file ({error})") from error


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the base model's parameters and buffers, by name; what this package added is left out."""
    digest = hashlib.blake2b(digest_size=16)
    state = model.state_dict()
    for name in sorted(state):
        if name.split(".")[0] == PREFIX or not isinstance(state[name], Tensor):
            continue
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names, limit: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
