"""Floor 2: which additions close a residual connection, by data flow and not by name.

A residual sum adds a branch to what the branch started from: to that itself, or to a projection of it (convolution,
norm, pooling, but no activation). Two parallel branches of equal length are none. Imports `ops` and `shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .ops import Operators
from .shapes import Flow


@dataclass(frozen=True, slots=True)
class Residual:
    """One residual connection.

    Attributes:
        total: The node that adds.
        branch: Its operand that was computed from where the other one started.
        activations: The activation calls inside the branch.
    """

    total: fx.Node
    branch: fx.Node
    activations: tuple[fx.Node, ...]


def residuals(graph: fx.Graph, operators: Operators, flow: Flow, data: set[fx.Node]) -> list[Residual]:
    """Return the residual connections of a graph, in order."""
    above: dict[fx.Node, int] = {}  # ancestors and the node itself, one bit each
    bits: dict[fx.Node, int] = {}
    activations: list[fx.Node] = []
    found = []
    for position, node in enumerate(graph.nodes):
        bits[node] = above[node] = 1 << position
        for operand in node.all_input_nodes:
            above[node] |= above[operand]
        if operators.activation(node) is not None:
            activations.append(node)
        operands = [n for n in node.all_input_nodes if n in data]
        # A broadcast operand is a gate's or a bias.
        if operators.op(node).word != "add" or [flow.shape(n) for n in operands] != [flow.shape(node)] * 2:
            continue
        ways = [
            (layers, start, other)
            for skip, other in (operands, reversed(operands))
            for layers, start in _start(skip, above[other], bits, operators, data)
        ]
        if not ways or (len(ways) == 2 and ways[0][0] == ways[1][0]):
            continue
        _, start, branch = min(ways, key=lambda way: way[0])
        inside = above[branch] & ~above[start]
        found.append(Residual(node, branch, tuple(a for a in activations if bits[a] & inside)))
    return found


def _start(
    skip: fx.Node, others: int, bits: dict[fx.Node, int], operators: Operators, data: set[fx.Node]
) -> Iterator[tuple[int, fx.Node]]:
    """Yield where the skip connection started, if it is one, and how many layers stand on it.

    Args:
        others: Ancestors of the other operand.
    """
    layers = 0
    while not bits[skip] & others:
        inputs = [n for n in skip.all_input_nodes if n in data]
        if len(inputs) != 1 or operators.activation(skip) is not None:
            return
        skip, layers = inputs[0], layers + 1
    yield layers, skip
