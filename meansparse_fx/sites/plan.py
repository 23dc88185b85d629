"""Floor 2: the words for what was found: `Site`, `SitePlan`, and the `Placement` that chooses among sites.

Pure data; imports floor 1 only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from rich.table import Table
from torch import fx

from ..activations import ActivationCall
from ..arguments import items
from ..errors import SiteError
from ..tables import Tabled, new_table

KINDS = ("activation", "residual_sum", "residual_branch")  # that can be asked for


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node is left as it is; printing it gives all of it in words.

    Attributes:
        reason: In words.
        node: Name of the node.
        cure: What a user can do about it, if anything.
        kind: Of a site's: what a plan's summary counts, such as ``gate`` or ``placement``.
    """

    reason: str
    node: str
    cure: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.kind, self.reason, self.cure)))


def in_several_steps(node: fx.Node) -> Refusal:
    """Return why an activation that overwrites its input on the way cannot have an operator before it."""
    reason = "the activation overwrites its input in several steps"
    return Refusal(reason, node.name, "give it inplace=False", kind="in place")


@dataclass(frozen=True, slots=True)
class Site:
    """One call in the graph where the operator belongs, or would if it were not skipped.

    Attributes:
        name: Qualified path with a counter for repeats, the same from every capture route.
        kind: ``activation``, ``residual_sum``, ``residual_branch``, or ``published`` for an operator of a published
            checkpoint that stands at none of these.
        activation: The activation the call makes; None for the other kinds.
        channel_dim: Dimension that holds the channels, not negative; None if unknown.
        channels: Number of channels; None if unknown.
        shape: Shape of the operator's input for the example images, batch included; of one image for two.
        producer: What makes the input, in a word: ``conv``, ``batch_norm``, ``linear``, ``add``, ...
        node: Name of the node in the captured graph: the activation's call, of a written-out one the last; the
            addition; the published operator.
        source: Name of the node whose value the operator reads.
        readers: Of an activation: names of the nodes that read the source; several where it is written out.
        inside: Of a residual kind: the names of the activations in its branch.
        published: Name of the published operator's node that stands here already; None if there is none.
        refusal: None, or why this site is left alone.
        fused: What `transform` took into the operator besides the activation, or why nothing.
    """

    name: str
    kind: str
    activation: ActivationCall | None
    channel_dim: int | None
    channels: int | None
    shape: tuple[int, ...]
    producer: str
    node: str
    source: str
    readers: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    published: str | None = None
    refusal: Refusal | None = None
    fused: str | None = None

    @property
    def skipped(self) -> str | None:
        """None, or why this site is left alone, in words."""
        return None if self.refusal is None else str(self.refusal)

    def refused(self, kind: str, reason: str, cure: str = "") -> Site:
        """Return the site, left alone."""
        return replace(self, refusal=Refusal(reason, self.node, cure, kind))

    @property
    def resolution(self) -> tuple[int, ...]:
        """Sizes of the input's dimensions besides batch and channels."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, self.channel_dim))

    def facts(self) -> dict[str, Any]:
        """Return what files keep of it, as plain values."""
        return {
            "kind": self.kind,
            "activation": self.activation and self.activation.name,
            "channel_dim": self.channel_dim,
            "channels": self.channels,
            "after": self.producer,
        }


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of the candidate sites to rewrite.

    A single string is one item of ``kinds``, ``include`` or ``exclude``.

    Attributes:
        kinds: Kinds of site to take: ``activation`` (the paper's), ``residual_sum`` (what closes a residual
            connection), ``residual_branch`` (the branch's end, before the sum).
        include: Regular expressions; a site is taken if any of them is found in its name. Empty takes all.
        exclude: Regular expressions; a site is left if any of them is found in its name.
        channel_dims: Channel dimension by site name, for sites whose axis the data flow does not tell.
        predicate: A last word: called with the `Site`, returns whether to take it.

    Raises:
        SiteError: No kind of that name, or no regular expression.
    """

    kinds: tuple[str, ...] = ("activation",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    channel_dims: dict[str, int] = field(default_factory=dict)
    predicate: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("kinds", "include", "exclude"):
            object.__setattr__(self, name, items(getattr(self, name)))
        if unknown := {*self.kinds} - {*KINDS}:
            raise SiteError(f"no kind of site is called {unknown.pop()!r}; there are {', '.join(KINDS)}")
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise SiteError(f"placement: {pattern!r} is no regular expression: {error}") from error

    def refusal(self, site: Site) -> Refusal | None:
        """Return why this placement leaves ``site`` alone, or None if it takes it."""
        if site.kind not in self.kinds:
            reason = f"kind {site.kind} not asked for"
        elif self.include and not any(re.search(p, site.name) for p in self.include):
            reason = "not included"
        elif any(re.search(p, site.name) for p in self.exclude):
            reason = "excluded"
        elif self.predicate is not None and not self.predicate(site):
            reason = "predicate said no"
        else:
            return None
        return Refusal(reason, site.node, kind="placement")


@dataclass(frozen=True, slots=True)
class Place:
    """A site in its graph, while passes put other things at other sites.

    Attributes:
        node: The activation's call, the addition, or the published operator.
        readers: The calls that are to read the operator instead of its source, in order; none if it reads the node
            itself, and all who read that are to read the operator.
        position: Which of the first reader's inputs the operator reads.
    """

    site: Site
    node: fx.Node
    readers: tuple[fx.Node, ...]
    position: int

    @property
    def source(self) -> fx.Node:
        """What the operator reads, now."""
        return self.readers[0].all_input_nodes[self.position] if self.readers else self.node


@dataclass(frozen=True, slots=True, repr=False)
class SitePlan(Tabled):
    """Every candidate site of one captured model, in graph order; iterable, and printing it gives the table.

    Attributes:
        sites: All candidates, skipped ones included.
        route: How the graph was captured.
    """

    sites: tuple[Site, ...]
    route: str

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def active(self) -> tuple[Site, ...]:
        """The sites that are rewritten."""
        return tuple(s for s in self.sites if s.refusal is None)

    @property
    def left(self) -> frozenset[str]:
        """Names of the sites that the placement leaves alone."""
        return frozenset(s.name for s in self.sites if s.refusal and s.refusal.kind == "placement")

    def with_fusion(self, fused: Mapping[str, str]) -> SitePlan:
        """Return the plan with what was fused at each site, by its name."""
        return SitePlan(tuple(replace(s, fused=fused.get(s.name)) for s in self.sites), self.route)

    def stages(self) -> dict[str, str]:
        """Return the stage of each active site: the largest module of one resolution.

        Its first block may begin at the resolution before. Modules in a row that end at one resolution are one stage,
        called by the first: EfficientNet's ``blocks.3`` and ``blocks.4``. A vision transformer is one stage.
        """
        found: dict[str, str] = {}
        last: tuple[tuple[int, ...], str] = ((-1,), "")
        for group, sites in _stages(self.active, 0) if self.active else ():
            last = last if last[0] == sites[-1].resolution else (sites[-1].resolution, group)
            found |= dict.fromkeys((site.name for site in sites), last[1])
        return found

    def without_nodes(self) -> SitePlan:
        """Return the plan without the activations' weights, which are nodes and would keep the graph."""
        sites = (replace(s, activation=s.activation and replace(s.activation, weight=None)) for s in self.sites)
        return SitePlan(tuple(sites), self.route)

    def places(self, graph: fx.Graph) -> list[Place]:
        """Return where the active sites are in ``graph``, which the plan was made of; ask before it is changed."""
        nodes = {node.name: node for node in graph.nodes}
        found = []
        for site in self.active:
            node, source = nodes[site.node], nodes[site.source]
            readers = tuple(nodes[name] for name in site.readers) or (node,)
            if site.published is not None:
                node = nodes[site.published]
                readers = (node,)
            if node is source:
                found.append(Place(site, node, (), 0))
            else:
                found.append(Place(site, node, readers, readers[0].all_input_nodes.index(source)))
        return found

    def table(self) -> Table:
        """Return the plan as a rich table, one row a site."""
        skipped = Counter(s.refusal.kind for s in self.sites if s.refusal)
        summary = f"{len(self.active)} of {len(self.sites)} sites rewritten, captured by {self.route}"
        if skipped:
            summary += "; skipped: " + ", ".join(f"{n} {kind}" for kind, n in skipped.items())
        columns = ("site", "activation", "input", "channels", "after", "status")
        left = [column for column in columns if column != "channels"]
        table = new_table(*columns, left=left, optional=("input",), caption=summary)
        for s in self.sites:
            what = s.activation.name if s.activation else s.kind
            axis = "?" if s.channel_dim is None else f"{s.channels} @ dim {s.channel_dim}"
            shape = "x".join(["N", *map(str, s.shape[1:])])
            fused = "" if s.fused is None else f"; fused: {s.fused}"
            table.add_row(s.name, what, shape, axis, s.producer, s.skipped or f"rewritten{fused}")
        return table


def _stages(sites: Sequence[Site], depth: int) -> Iterator[tuple[str, Sequence[Site]]]:
    """Yield (name, sites) of the largest modules that are stages, ``depth`` names down and further."""
    if _is_stage(sites, depth):
        while len(sites) > 1 and len(_children(sites, depth)) == 1:
            depth += 1
        yield ".".join(sites[0].name.split(".")[:depth]) or sites[0].name, sites
        return
    for child in _children(sites, depth):
        yield from _stages(child, depth + 1)


def _is_stage(sites: Sequence[Site], depth: int) -> bool:
    """Return whether all sites have one resolution, but for some of the first block before it is reduced."""
    first, *others = _children(sites, depth)
    if len(others) + 1 == len(sites):  # one each: a block, or a network without blocks
        return len({site.resolution for site in sites}) <= (2 if depth else 1)
    end = {sites[-1].resolution}
    agree = {first[-1].resolution} == end and all({site.resolution for site in child} == end for child in others)
    return agree and _is_stage(first, depth + 1)


def _children(sites: Sequence[Site], depth: int) -> list[list[Site]]:
    return [list(group) for _, group in groupby(sites, key=lambda site: site.name.split(".")[: depth + 1])]
