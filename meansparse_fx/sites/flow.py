"""Floor 2: the channel dimension of every tensor in a graph, by data flow.

Forward from what states it (convolutions, norms, linear layers) through everything that carries it; where that
says nothing, backward from the next layer that expects it. Imports `axis`, `ops` and `shapes`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from . import axis as rules
from .axis import Call
from .ops import Operators
from .shapes import Flow

# Rules of operators whose result has the same dimensions in the same order.
_KEEPING = (rules.same, rules.elementwise, rules.joined)


def channel_axes(
    graph: fx.Graph, operators: Operators, flow: Flow, given: Mapping[fx.Node, int] | None = None
) -> dict[fx.Node, int | None]:
    """Return the channel dimension by node, as far as the layers before it tell; None is unknown.

    Args:
        given: The channel dimension of inputs, where it is known.
    """
    axes: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        if not flow.is_tensor(node) or node.op in ("placeholder", "get_attr", "output"):
            axes[node] = given.get(node) if given else None
            continue
        axes[node] = carried(node, operators, flow, axes)
    return axes


def carried(node: fx.Node, operators: Operators, flow: Flow, axes: Mapping[fx.Node, int | None]) -> int | None:
    """Return the channel dimension of a node's result, from those of what it reads; None is unknown."""
    op, rank = operators.op(node), len(flow.shape(node))
    if op.channels is not None and op.carry is rules.asked:
        axis: int | None = op.channels + (rank if op.channels < 0 else 0)
    else:
        axis = op.carry(Call(node, operators, flow, axes))
    return axis if axis is not None and 0 <= axis < rank else None


def expected_axes(graph: fx.Graph, operators: Operators, flow: Flow) -> dict[fx.Node, int | None]:
    """Return the channel dimension by node, as far as the layers that read it agree; None is unknown."""
    expected: dict[fx.Node, int | None] = {}
    for node in reversed(graph.nodes):
        shape = flow.shape(node)
        wishes: set[int | None] = set()
        for reader in node.users if shape else ():
            op = operators.op(reader)
            if op.channels is not None and node is (reader.args[0] if reader.args else reader.kwargs.get("input")):
                wishes.add(op.channels % len(shape))
            elif op.carry in _KEEPING and len(flow.shape(reader)) == len(shape):
                wishes.add(expected[reader])
        wishes.discard(None)
        expected[node] = wishes.pop() if len(wishes) == 1 else None
    return expected
