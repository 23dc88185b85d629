"""Floor 4: all that makes a transformed model the function it is, in one file beside its statistics.

A settings file is a statistics file whose header has one more entry, so that whoever wants statistics reads it too.
Changes buffers and attributes of operators, never a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from . import artifacts
from .errors import ArtifactError, StateError
from .nn import MeanSparse
from .operators import (
    OTHER_FUNCTION,
    TRAINED,
    added,
    answers,
    answers_differ,
    operators,
    require_transformed,
    was_trained,
)
from .rewrite import PREFIX
from .sites import Placement, Site
from .statistics import ChannelStatistics, Statistics, fingerprint, weight_digests

VERSION = "1"


def save(sparse: fx.GraphModule, path: str | Path) -> None:
    """Write a transformed model's statistics and every setting to one safetensors file; `load` reads it.

    Weights are not in it, but their fingerprint is.

    Args:
        sparse: What `transform` returned, with statistics, in eval mode.
        path: The file, such as ``model.msfx.safetensors``; written whole or not at all.

    Raises:
        StateError: The model is not transformed, has no statistics or those of other weights, or is in train mode.
        WriteError: It cannot be written there; it is in the temporary folder instead, at the place named.
    """
    require_transformed(sparse, "save", calibrated=True)
    if was_trained(sparse):
        raise StateError(
            f"{TRAINED}: calibrate the model again, or take them for these weights by set_statistics(model, "
            "statistics, check_weights=False)"
        )
    own, found = added(sparse), operators(sparse)
    placement = asdict(own.placement)
    del placement["predicate"]  # its choice is in the sites
    settings = {
        "version": VERSION,
        "sites": [_row(site, found.get(site.name)) for site in own.plan],
        "placement": placement,
        "fuse": own.fuse,
        "weights": weight_digests(sparse),
        "versions": {"meansparse_fx": version("meansparse_fx"), "torch": str(torch.__version__)},
        "choice": own.choice,
    }
    replace(_statistics(sparse), answers=answers(sparse, own.shape)).save(path, settings)


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What a settings file holds.

    Attributes:
        path: Of the file, for messages.
        statistics: Of the model.
        sites: That are taken, in graph order: `Site.facts`, alpha and switches.
        placement: That takes the same sites; of sites that the file does not have it takes all, for them to be noticed.
        fuse: As `transform` takes it.
        weights: Hashes of the base's tensors, by name.
        choice: How alpha was chosen, as `AlphaSearch.to_dict` returns it, or None.
    """

    path: Path
    statistics: Statistics
    sites: tuple[dict[str, Any], ...]
    placement: Placement
    fuse: str
    weights: dict[str, str]
    choice: dict[str, Any] | None

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        """Return what a file holds.

        Raises:
            ArtifactError: It is truncated, of another kind or version, or holds statistics alone.
        """
        statistics, held = Statistics.load_with_settings(path)
        if held is None:
            raise ArtifactError(
                f"{path}: holds statistics and no settings: give it as statistics, or save the model by msfx.save"
            )
        return cls.of(path, statistics, held)

    @classmethod
    def of(cls, path: str | Path, statistics: Statistics, held: Mapping[str, Any]) -> Settings:
        """Return what `Statistics.load_with_settings` read of a file with settings; errors as of `load`."""
        with artifacts.parsing(path):
            if held["version"] != VERSION:
                raise ArtifactError(f"{path}: settings of version {held['version']}; this release reads {VERSION}")
            rows, chosen = held["sites"], held["placement"]
            taken = {row["name"]: row["taken"] for row in rows}
            # Published operators that a model brings along are its placement, beside which there is no other.
            brought = any(row.get("published") for row in rows)
            placement = Placement(
                kinds=tuple(chosen["kinds"]),
                include=tuple(chosen["include"]),
                exclude=tuple(chosen["exclude"]),
                channel_dims=chosen["channel_dims"],
                predicate=None if brought else lambda site: taken.get(site.name, True),
            )
            sites = tuple(row for row in rows if row["taken"])
            return cls(Path(path), statistics, sites, placement, held["fuse"], held["weights"], held["choice"])

    def put_into(self, sparse: fx.GraphModule) -> None:
        """Make a newly transformed model the one that was saved.

        Raises:
            StateError: It is another model.
        """
        with artifacts.parsing(self.path):
            own, found = added(sparse), operators(sparse)
            active = [_row(site, None) for site in own.plan.active]
            for here, there in zip_longest(active, self.sites, fillvalue=dict[str, Any]()):
                if any(here.get(key) != there.get(key) for key in ("name", *_COMPARED)):
                    raise StateError(
                        f"{self.path}: settings of another model; the first differing site is {_words(there)} in the "
                        f"file and {_words(here)} here{_why(here, there)}"
                    )
            if fingerprint(sparse) != self.statistics.fingerprint:
                raise StateError(
                    f"{self.path}: settings of a model with other weights; {self._first_other_weight(sparse)}: load "
                    "the weights that were calibrated, or calibrate again"
                )
            for row in self.sites:
                self._set(found[row["name"]], row)
            own.statistics, own.choice = self.statistics, self.choice
            if answers_differ(sparse, self.statistics):
                raise StateError(f"{self.path}: settings of another model; {OTHER_FUNCTION}")

    def in_words(self) -> str:
        """Return alpha, the operators' switches, what is fused and how alpha was chosen, a line each."""
        rows = [{"alpha": row["alpha"], **row["switches"]} for row in self.sites]
        lines = [f"{name}: {', '.join(dict.fromkeys(str(row[name]) for row in rows))}" for name in rows[0]]
        lines.append(f"fuse: {self.fuse}")
        if self.choice is not None:
            lines.append(f"chosen by select: alpha {self.choice['alpha']}; what looked best: {self.choice['leader']}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the operators' part of the transformed model's state_dict, made without the model."""
        state: dict[str, Tensor] = {}
        for row in self.sites:
            operator = MeanSparse(row["name"], row["channels"], row["channel_dim"])
            self._set(operator, row)
            state |= operator.state_dict(prefix=f"{PREFIX}.{row['name']}.")
        return state

    def _set(self, operator: MeanSparse, row: Mapping[str, Any]) -> None:
        operator.set_statistics(self.statistics[row["name"]])
        operator.set_switches(row["switches"])
        operator.set_alpha(row["alpha"])

    def _first_other_weight(self, sparse: fx.GraphModule) -> str:
        """Return in words where a model's weights begin to differ from the file's: by its first site behind that."""
        here = weight_digests(sparse)
        other = sorted(name for name in here | self.weights if here.get(name) != self.weights.get(name))
        first = None
        for node in sparse.graph.nodes:
            if first is None and node.op in ("call_module", "get_attr"):
                first = next((n for n in other if n == node.target or n.startswith(f"{node.target}.")), None)
            elif first is not None and node.op == "call_module":
                reader = sparse.get_submodule(node.target)
                if isinstance(reader, MeanSparse):
                    return f"the first differing site is {reader.name}, behind {first}"
        return f"{len(other)} of its tensors differ, {first or other[0]} first"


_COMPARED = ("kind", "activation", "channel_dim", "channels", "fused")


def _row(site: Site, operator: MeanSparse | None) -> dict[str, Any]:
    row = {"name": site.name, **site.facts(), "fused": site.fused, "taken": site.refusal is None}
    row["published"] = site.published is not None
    return row if operator is None else {**row, "alpha": operator.get_alpha(), "switches": operator.switches()}


def _words(row: Mapping[str, Any]) -> str:
    if not row:
        return "none"
    words = f"{row['name']} ({row['activation'] or row['kind']}, {row['channels']} channels at dim {row['channel_dim']}"
    return words + (f"; fused: {row['fused']})" if row["fused"] else ")")


def _why(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    if here and there and here["fused"] != there["fused"]:
        return ": what is fused depends on which parameters want gradients, and on hooks; set both as they were"
    return ""


def _statistics(sparse: fx.GraphModule) -> Statistics:
    """Return what the operators hold, with the counts of the calibration it is of, where that is known."""
    own = added(sparse)
    known = own.statistics
    sites: dict[str, ChannelStatistics] = {}
    for name, operator in operators(sparse).items():
        measured = known[name] if known is not None and name in known else None
        if measured is None or not operator.holds(measured):  # a published operator's, or a state_dict's
            std = operator.std.double().cpu()
            measured = ChannelStatistics(0, operator.mean.double().cpu(), std.square())  # whose root is exact
        sites[name] = measured
    table = {site.name: site.facts() for site in own.plan.active}
    if known is None or not all(known.get(name) is measured for name, measured in sites.items()):
        return Statistics(sites, fingerprint(sparse), 0, {}, "", table)
    return replace(known, sites=sites, fingerprint=fingerprint(sparse), table=table)
