"""Floor 2: which activations sit inside a gate, by structure and not by name.

A gate pools a tensor over all of space, computes on what is left, and multiplies (or adds, broadcast) the result
back onto a tensor that was not pooled: squeeze-and-excitation and its relatives. A head is pooled as well, but
nothing unpooled meets it again. Imports `ops`, `plan` and `shapes`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from torch import fx

from .ops import Operators
from .plan import Refusal
from .shapes import Flow, Shape


def reachable(graph: fx.Graph, operators: Operators, flow: Flow, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that yield tensors computed from ``inputs``, or that these are written into, and ``inputs``."""
    found = set(inputs)
    holders: dict[int, list[fx.Node]] = defaultdict(list)
    filled: set[int] = set()  # memory that they are written into
    for node in graph.nodes:
        memory = flow.memory.get(node, frozenset())
        for key in memory:
            holders[key].append(node)
        if not filled.isdisjoint(memory):
            found.add(node)
        if found.isdisjoint(node.all_input_nodes):
            continue
        if flow.is_tensor(node):
            found.add(node)
        written = node.kwargs.get("out", node.args[0] if node.args and operators.writes(node) else None)
        if isinstance(written, fx.Node) and written not in found:
            filled |= flow.memory.get(written, frozenset())
            found.update(*(holders[key] for key in filled))
    return found


def gated(graph: fx.Graph, operators: Operators, flow: Flow, data: set[fx.Node]) -> dict[fx.Node, Refusal]:
    """Return the refusal of each node that is part of a gate."""
    pooled: set[fx.Node] = set()
    refused: dict[fx.Node, Refusal] = {}
    for node in graph.nodes:
        op = operators.op(node)
        inputs = [n for n in node.all_input_nodes[: 1 if op.like else None] if n in data]
        inside = [n for n in inputs if n in pooled]
        if node not in data or not inputs:
            continue
        if len(inside) == len(inputs) or (op.pools and _pools_space(op.word, flow, node, inputs)):
            pooled.add(node)
        elif inside and (op.word == "mul" or (op.word == "add" and flow.shape(inside[0]) != flow.shape(node))):
            gate, other = inside[0], next(n for n in inputs if n not in pooled)
            reason = _REASONS[op.word].format(operators.label(other))
            _mark(gate, pooled, refused, reason)
    return refused


_REASONS = {
    "mul": "squeeze-and-excitation, pooled then multiplied onto {}",
    "add": "global context, pooled then added onto {}",
}


def _pools_space(word: str, flow: Flow, node: fx.Node, inputs: list[fx.Node]) -> bool:
    """Return whether a result keeps one dimension besides the batch and is smaller than what was pooled."""
    shape, before = flow.shape(node), flow.shape(inputs[0])
    if _extent(shape) > 1:
        return False
    # Small images arrive with one pixel: pooling that changes nothing, yet the same gate as for larger ones.
    one_pixel = word != "matmul" and len(before) > 2 and _extent(before) <= 1
    return one_pixel or math.prod(shape) < max(math.prod(flow.shape(n)) for n in inputs)


def _extent(shape: Shape) -> int:
    """Return how many dimensions besides the batch have more than one element."""
    return sum(n > 1 for n in shape[1:])


def _mark(gate: fx.Node, pooled: set[fx.Node], refused: dict[fx.Node, Refusal], reason: str) -> None:
    """Refuse, for ``reason``, the gate and all it is computed from since the pooling."""
    waiting = [gate]
    while waiting:
        node = waiting.pop()
        if node in pooled and node not in refused:
            refused[node] = Refusal(reason, node.name, kind="gate")
            waiting.extend(node.all_input_nodes)
