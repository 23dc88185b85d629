"""Floor 4: put the operators in.

Requires: a captured GraphModule and its plan. Ensures: each active site is one call of a `MeanSparse` module
under ``meansparse.``, its activation fused where the kernels have it; published operators are gone, everything else
is as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from .. import rewrite
from ..errors import SiteError
from ..hooks import has_hooks
from ..nn import MeanSparse
from ..published import published_operator
from ..rewrite import (
    PREFIX,
    RecordedCall,
    bypass,
    insert_module_after,
    insert_module_before,
    operand,
    redirect_later_readers,
    replace_call,
)
from ..sites import Site, SitePlan
from ..sites.plan import Place
from .added import Added


def sparsify(graph_module: fx.GraphModule, plan: SitePlan) -> None:
    """Insert an operator at every active site of ``plan``, in place.

    Alpha is 0, so nothing changes in value; an operator that takes a published one's place takes over what it holds.
    """
    places = plan.places(graph_module.graph)
    graph_module.add_module(PREFIX, Added(plan))
    with rewrite.editing(graph_module, "sparsify"):
        for place in places:
            site = place.site
            operator = _operator(site, graph_module)
            graph_module.add_submodule(f"{PREFIX}.{site.name}", operator)
            if site.published is not None:
                _take_over(graph_module, place.node, site, operator)
            else:
                _INSERT[site.kind](place, operator)
    graph_module.get_submodule(PREFIX).eval()


def _operator(site: Site, graph_module: fx.GraphModule) -> MeanSparse:
    """Return the site's operator on the device of the model's parameters, in float64 if they are."""
    fused = site.activation if site.activation and site.activation.fused else None
    assert site.channels is not None  # or it would be skipped
    assert site.channel_dim is not None
    operator = MeanSparse(site.name, site.channels, site.channel_dim, fused, len(site.shape))
    for p in graph_module.parameters():
        if p.is_floating_point():
            return operator.to(p.device, torch.float64 if p.dtype == torch.float64 else torch.float32)
    return operator


def _before_activation(place: Place, operator: MeanSparse) -> None:
    call, source, site = place.node, place.source, place.site
    if operator.activation is None:
        # In place the call overwrites this node's tensor; its own result may be another, of a hook's.
        holder = insert_module_before(place.readers, source, f"{PREFIX}.{site.name}")
    else:
        holder = call = _fuse(call, source, site, operator)
    if site.activation is not None and site.activation.inplace:
        redirect_later_readers(source, call, holder)


_INSERT: dict[str, Callable[[Place, MeanSparse], object]] = {
    "activation": _before_activation,
    "residual_branch": lambda place, own: insert_module_before(place.readers, place.source, f"{PREFIX}.{own.name}"),
    "residual_sum": lambda place, own: insert_module_after(place.node, f"{PREFIX}.{own.name}"),
}


def _fuse(node: fx.Node, source: fx.Node, site: Site, operator: MeanSparse) -> fx.Node:
    """Replace an activation's call by the operator's, which remembers it; return the new node."""
    inputs = [source]
    if site.activation is not None and site.activation.weight is not None:
        inputs.append(_weight_node(node, site.activation.weight))
    # A module's weight is read by the module itself, not by its call.
    operator.replaces = RecordedCall.of(node, [n for n in inputs if n in node.all_input_nodes])
    return replace_call(node, f"{PREFIX}.{site.name}", inputs)


def _take_over(graph_module: fx.GraphModule, published: fx.Node, site: Site, operator: MeanSparse) -> None:
    """Put the operator where a published one stands, with all that holds; that one leaves the model."""
    path, source = str(published.target), operand(published)
    module = graph_module.get_submodule(path)
    held = published_operator(module)
    assert held is not None
    if has_hooks(module):
        raise SiteError(f"{site.name}: the published operator {path} has hooks, and ours takes its place: remove them")
    operator.take_over(held)
    if operator.activation is None:
        replace_call(published, f"{PREFIX}.{site.name}", [source])
    else:
        (activation,) = published.users
        bypass(published)
        _fuse(activation, source, site, operator)
    if not any(node.target == path for node in graph_module.graph.find_nodes(op="call_module")):
        graph_module.delete_submodule(path)


def _weight_node(node: fx.Node, weight: str | fx.Node) -> fx.Node:
    if isinstance(weight, fx.Node):
        return weight
    with node.graph.inserting_before(node):
        return node.graph.get_attr(f"{node.target}.{weight}")
