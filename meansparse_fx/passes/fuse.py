"""Floor 4: take what stands around an operator into it: frozen norm, LayerScale, residual sums, a norm of a sum.

Requires: a GraphModule made by `sparsify`, in eval mode. Ensures: the same function to rounding, with fewer calls:
norm, LayerScale, sum, norm, threshold, activation and sum are one, and where others read the sum before the operator it
is that call's second result. Modules, and so the state_dict, stay as they are; the graph before fusion is kept for
`restore` and `observe`.
"""

from __future__ import annotations

import operator as python
from typing import Any

from torch import Tensor, fx

from .. import rewrite
from ..frozen import Prologue
from ..nn import MeanSparse
from ..rewrite import keep_unfused, operand
from ..sites.shapes import propagate
from .surroundings import Finder, Surroundings


def fuse(graph_module: fx.GraphModule, images: Tensor) -> dict[str, str]:
    """Fuse what can be fused, in place; return by site name what was, or why nothing was.

    Args:
        images: ``[N, ...]``, example inputs; only their shape matters.
    """
    keep_unfused(graph_module)
    finder = Finder(graph_module, propagate(graph_module, images))
    notes = {}
    with rewrite.editing(graph_module, "fuse"):
        for node, operator in rewrite.calls_of(graph_module, MeanSparse):
            notes[operator.name] = _fuse(node, operator, finder)
    return notes


def _fuse(node: fx.Node, operator: MeanSparse, finder: Finder) -> str:
    """Fuse one operator's surroundings into it; return what they were, or why nothing was fused."""
    found = finder.around(node, operator)
    if not found:
        return str(found)
    branch, total, sum_norm = found.branch, found.total, found.sum_norm
    operator.prologue = Prologue(
        branch.input_norm.frozen if branch.input_norm else None, sum_norm.frozen if sum_norm else None, found.want_sum
    )
    if branch.scale:
        branch.scale.node.replace_all_uses_with(branch.scale.x)  # what only moves values goes on with the unscaled
    y = _call(node, operator, found)
    finder.record(y, found.epilogue or node)
    (found.epilogue or node).replace_all_uses_with(y)
    if total is not None and found.want_sum:
        call = operand(y)
        finder.record(call, total.node)
        with node.graph.inserting_after(call):
            v = node.graph.call_function(python.getitem, (call, 1))
        v.meta = dict(total.node.meta)
        finder.record(v, total.node)
        total.node.replace_all_uses_with(v)
    _erase(found.epilogue, node, *(n for n in node.args[1:] if isinstance(n, fx.Node)))
    _erase(*(part.node for part in (sum_norm, total, branch.scale, branch.input_norm) if part is not None))
    _erase(*(branch.scale.views if branch.scale else ()))
    return str(found)


def _call(node: fx.Node, operator: MeanSparse, found: Surroundings) -> fx.Node:
    """Insert the fused call for an operator's call; return the node of its result y."""
    graph = node.graph
    # With two results it must stand where the first of them is read, otherwise where all is there that it reads.
    place = found.epilogue or (found.total.node if found.total else node)
    weight = operand(node, 1) if len(node.args) > 1 else None
    with graph.inserting_before(place):
        if weight is not None:  # a parameter: it may be read earlier
            weight = graph.get_attr(str(weight.target))
        options: dict[str, Any] = {"fused": True}
        if found.total:
            options["residual"] = found.total.residual
        if found.branch.scale:
            options["layer_scale"] = found.branch.scale.parameter
        if found.shortcut:
            options["shortcut"] = found.shortcut
        y = call = graph.call_module(str(node.target), (found.branch.x, weight), options)
        if found.want_sum:
            y = graph.call_function(python.getitem, (call, 0))
    call.meta = dict(node.meta)
    y.meta = dict((found.epilogue or node).meta)
    return y


def _erase(*nodes: fx.Node | None) -> None:
    for node in nodes:
        if node is not None and not node.users:
            node.graph.erase_node(node)
