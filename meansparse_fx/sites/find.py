"""Floor 2: from a captured graph to the plan of its sites.

Each candidate gets a name, a channel dimension, and a reason if it is to be left alone. Imports this folder and floor 1
only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, fx

from ..activations import ActivationCall
from ..errors import SiteError
from .aliases import check_inplace
from .axis import channel_axes, expected_axes
from .candidates import Candidate, find_candidates
from .composites import CompositeFinder
from .gates import gated, reachable
from .ops import Operators
from .plan import Placement, Refusal, Site, SitePlan
from .shapes import Flow, propagate


def find_sites(
    graph_module: fx.GraphModule, route: str, images: Tensor | None, placement: Placement | None = None
) -> SitePlan:
    """Return the plan of a captured model's sites: all candidates, with what is done to each and why.

    Args:
        graph_module: As `capture` returns it, in eval mode; its graph is not changed.
        route: How it was captured, for the plan.
        images: ``[N, ...]``, example inputs on the model's device; only their shape matters.
        placement: Which sites to take; by default every activation.

    Raises:
        SiteError: No example images, no activation in the graph, channel dimensions given for no site or out of
            range, or an in-place activation whose input is read later through a view.

    Example:
        >>> import torch
        >>> from meansparse_fx.capture import capture
        >>> images = torch.rand(2, 1, 8, 8)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()
        >>> plan = find_sites(capture(net, images).graph_module, "symbolic trace", images)
        >>> [(site.name, site.activation.name, site.channels, site.producer) for site in plan]
        [('1', 'relu', 4, 'conv')]
    """
    placement = placement or Placement()
    if images is None:
        raise SiteError("finding sites needs example images, for their shape: pass images=, a tensor [N, C, H, W]")
    graph, operators = graph_module.graph, Operators.of(graph_module)
    flow = propagate(graph_module, images)
    known = channel_axes(graph, operators, flow)
    plan = plan_sites(graph, operators, flow, known, graph.find_nodes(op="placeholder"), route, placement)
    if not any(site.activation for site in plan):
        raise SiteError(
            f"no activation found in {type(graph_module).__name__} ({len(graph.nodes)} graph nodes): activations "
            "are known by the tables in meansparse_fx/activations.py and formulas.py"
        )
    check_channel_dims(placement, {site.name for site in plan})
    return plan


def plan_sites(
    graph: fx.Graph,
    operators: Operators,
    flow: Flow,
    known: Mapping[fx.Node, int | None],
    inputs: Iterable[fx.Node],
    route: str,
    placement: Placement,
    earlier: Callable[[dict[str, int]], dict[str, int]] | None = None,
) -> SitePlan:
    """Return the plan of one graph in any dialect.

    Args:
        known: Channel dimensions, as `channel_axes` finds them.
        inputs: The nodes that depend on the images.
        earlier: Given how often the graph calls each path, returns how often graphs before it did.
    """
    data = reachable(graph, operators, flow, inputs)  # what is computed from the images
    gates = gated(graph, operators, flow, data)
    operators = CompositeFinder(graph, operators, flow, data, known, gates).find()
    expected = expected_axes(graph, operators, flow)
    candidates = find_candidates(graph, operators, flow, data, placement)
    names = _names(candidates, earlier)
    calls = {c.node: names[c] for c in candidates if c.call}
    candidates = [c for c in candidates if c.call or c.published or c.kind in placement.kinds]
    sites = []
    for candidate in candidates:
        name, node, source = names[candidate], candidate.node, candidate.source
        shape = tuple(flow.shape(source))
        if name in placement.channel_dims:
            axis: int | None = _given(placement, name, shape)
        else:
            told = [known[source], expected[node if candidate.call else source]]
            if candidate.kind == "residual_branch":
                told.insert(0, known[node])
            axis = next((a for a in told if a is not None), None)
        site = Site(
            name=name,
            kind=candidate.kind,
            activation=candidate.call and _fitting(candidate.call, node, operators, flow, axis),
            channel_dim=axis,
            channels=None if axis is None else shape[axis],
            shape=shape,
            producer=operators.word(operators.maker(source)),
            node=node.name,
            source=source.name,
            inside=tuple(calls[n] for n in candidate.inside),
            readers=tuple(n.name for n in operators.readers(node)) if candidate.call else (),
            published=None if candidate.published is None else candidate.published.name,
        )
        of_graph = gates.get(node) or (operators.refusal(node) if candidate.call else None)
        sites.append(_judged(site, candidate, of_graph, node in data, placement))
    sites = _covered(candidates, sites)
    inplace = [s for s in sites if s.refusal is None and s.activation and s.activation.inplace]
    check_inplace(graph, operators, flow, inplace)
    return SitePlan(tuple(sites), route)


def _judged(
    site: Site, candidate: Candidate, of_graph: Refusal | None, sees_images: bool, placement: Placement
) -> Site:
    """Return a site with the first reason there is to leave it alone.

    Args:
        of_graph: Why the graph leaves no place for an operator, if so.

    Raises:
        SiteError: There is a reason, and a published operator stands here.
    """
    if not sees_images:
        site = site.refused("input-independent", "computed from parameters alone, the same for every image")
    elif of_graph is not None:
        site = replace(site, refusal=of_graph)
    elif candidate.unpublished:
        site = site.refused("published", "the checkpoint has no operator here")
    elif site.channel_dim is None:
        cure = f"give it by hand, Placement(channel_dims={{{site.name!r}: dimension}})"
        site = site.refused("channel axis unknown", "no layer around it tells", cure)
    elif site.published is None:
        site = replace(site, refusal=placement.refusal(site))
    if site.refusal is not None and site.published is not None:
        raise SiteError(
            f"{site.name}: holds the published operator {site.published} and cannot be taken: {site.refusal}"
        )
    return site


def check_channel_dims(placement: Placement, names: set[str]) -> None:
    """Raise SiteError if the placement gives a channel dimension for what is no site."""
    unmatched = placement.channel_dims.keys() - names
    if unmatched:
        raise SiteError(f"placement gives channel_dims for {min(unmatched)!r}, which is no site; see inspect()")


def _covered(candidates: Iterable[Candidate], sites: list[Site]) -> list[Site]:
    """Return the sites without the sums that one activation alone reads, if an operator stands there already."""
    active = {site.node: site.name for site in sites if site.activation and site.refusal is None}
    readers = [active.get(c.reader.name) if c.reader and not c.published else None for c in candidates]
    return [
        site.refused("covered", f"read by {reader} alone") if reader and site.refusal is None else site
        for site, reader in zip(sites, readers, strict=True)
    ]


def _names(
    candidates: Iterable[Candidate], earlier: Callable[[dict[str, int]], dict[str, int]] | None
) -> dict[Candidate, str]:
    """Return a name for each candidate: its path, with a counter where one path is called again."""
    paths = {candidate: candidate.path for candidate in candidates}
    taken = set(paths.values())  # relu_1 may be a module of its own: no repeat of relu takes its name
    names: dict[Candidate, str] = {}
    calls = earlier(Counter(paths.values())) if earlier else {}
    for candidate, path in paths.items():
        count = calls.get(path, 0)
        while count and f"{path}_{count}" in taken:
            count += 1
        calls[path] = count + 1
        names[candidate] = f"{path}_{count}" if count else path
    return names


def _fitting(call: ActivationCall, node: fx.Node, operators: Operators, flow: Flow, axis: int | None) -> ActivationCall:
    """Return an activation as the kernels can compute it: a learned slope lies along the channels there.

    torch's PReLU has it along dimension 1, whatever the channels are: of tokens [N, L, C] that is another one.
    """
    if call.weight is None or not call.fused:
        return call
    module = operators.module(node)
    shape = flow.shape(call.weight) if module is None else getattr(module, call.weight).shape
    source = flow.shape(operators.source(node))
    along = axis == 1 if call.name == "prelu" else axis is not None and math.prod(shape) == source[axis]
    return call if math.prod(shape) == 1 or along else replace(call, weight=None, fused=False)


def _given(placement: Placement, name: str, shape: tuple[int, ...]) -> int:
    dim = placement.channel_dims[name]
    if not -len(shape) <= dim < len(shape):
        raise SiteError(f"{name}: placement gives channel dimension {dim}, its input has shape {list(shape)}")
    return dim % len(shape)
