"""Floor 4: put the operators in.

Requires: a captured GraphModule and its plan. Ensures: each active site is one call of a `MeanSparse` module
under ``meansparse.``, its activation fused where the kernels have it; everything else is as it was.
"""

from __future__ import annotations

import torch
from torch import fx

from ..nn import MeanSparse
from ..rewrite import PREFIX, RecordedCall, insert_module_before, redirect_later_readers, replace_call
from ..sites import Site, SitePlan
from ..sites.ops import data_input


def sparsify(graph_module: fx.GraphModule, plan: SitePlan) -> None:
    """Insert an operator at every active site of ``plan``, in place; alpha is 0, so nothing changes in value."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for site in plan.active:
        _insert(graph_module, nodes[site.node], site)
    graph_module.get_submodule(PREFIX).eval()
    graph_module.graph.lint()
    graph_module.recompile()


def _insert(graph_module: fx.GraphModule, node: fx.Node, site: Site) -> None:
    source = data_input(node)
    target = f"{PREFIX}.{site.name}"
    activation = site.activation if site.activation and site.activation.fused else None
    operator = _like_parameters(MeanSparse(site.name, site.channels, site.channel_dim, activation), graph_module)
    graph_module.add_submodule(target, operator)
    if activation is None:
        insert_module_before(node, source, target)
        result = node
    else:
        inputs = [source]
        if activation.weight is not None:
            inputs.append(_weight_node(node, activation.weight))
        # A module's weight is read by the module itself, not by its call.
        read = [n for n in inputs if n in node.all_input_nodes]
        operator.replaces = RecordedCall.of(node, read)
        result = replace_call(node, target, inputs)
    if site.activation and site.activation.inplace:
        redirect_later_readers(source, result)


def _weight_node(node: fx.Node, weight: str | fx.Node) -> fx.Node:
    if isinstance(weight, fx.Node):
        return weight
    with node.graph.inserting_before(node):
        return node.graph.get_attr(f"{node.target}.{weight}")


def _like_parameters(operator: MeanSparse, graph_module: fx.GraphModule) -> MeanSparse:
    """Return ``operator`` on the device of the model's parameters, in float64 if they are."""
    for p in graph_module.parameters():
        if p.is_floating_point():
            return operator.to(p.device, torch.float64 if p.dtype == torch.float64 else torch.float32)
    return operator
