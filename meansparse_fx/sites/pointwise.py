"""Floor 2: the pieces of a graph that are functions of one tensor, element by element, and which functions they are.

A call that works element by element belongs to the nearest tensor that all it reads is computed from in that way: the
parent. So parents make trees, and what lies between a node and any of its ancestors is a piece: a function of a number,
which running it on a few numbers tells. Imports `ops`, `shapes` and `formulas`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..formulas import POINTS
from . import axis
from .aliases import Overwrites
from .ops import CALLS, Operators, name_of
from .shapes import Flow

# They return x, of another type: the numbers here stay as precise as they are.
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous", "detach"}
_CONSTANTS = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty_like", "new_empty"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "tensor": 0, "scalar_tensor": 0, "as_tensor": 0}
_SOME_NUMBER = 0.7  # stands for a constant that is not known
_LARGEST = 60  # nodes of a piece; a written-out GELU has 9


class Pieces:
    """The trees of one graph.

    Attributes:
        order: By node, its position in the graph.
        constants: The calls whose result holds the same numbers whatever they are given: zeros like it, for example.
        parents: By node, what it is a function of; roots are in no key.
        operands: By node of a tree, the tensors it reads that depend on the images.
        readers: By node, the calls that read its value.
        renamed: By node that reads a tensor which an in-place call has overwritten: by that tensor, the call.
    """

    def __init__(self, graph: fx.Graph, operators: Operators, flow: Flow, data: set[fx.Node]) -> None:
        self._graph, self._operators, self._flow, self._data = graph, operators, flow, data
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.constants = {n for n in graph.nodes if _is_constant(n) and not self.overwrites.writers(n)}
        self._depths: dict[fx.Node, int] = defaultdict(int)
        self.parents: dict[fx.Node, fx.Node] = {}
        self.operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.renamed: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        first: dict[fx.Node, fx.Node] = {}  # of a chain of in-place calls
        latest: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            inputs = node.all_input_nodes[: 1 if name_of(node) in CASTS else None]  # type_as(other)
            given = [n for n in inputs if n in data and n not in self.constants]
            values = [latest.get(first.get(n, n), n) for n in given]
            if values != given:
                self.renamed[node] = dict(zip(given, values, strict=True))
            if node.op == "output" or flow.is_tensor(node) or operators.writes(node):
                for value in values:
                    self.readers[value].append(node)
            if values and not _is_constant(node) and self._is_pointwise(node, values):
                self._add_to_tree(node, tuple(dict.fromkeys(values)))
            # A statement, x[i] = y, has no result to read in the place of x.
            written = (*node.args, node.kwargs.get("input"))[0]
            if operators.writes(node) and flow.is_tensor(node) and isinstance(written, fx.Node):
                first[node] = first.get(written, written)
                latest[first[node]] = node

    @functools.cached_property
    def overwrites(self) -> Overwrites:
        """Who overwrites what in the graph; few ask."""
        return Overwrites(self._graph, self._operators, self._flow)

    def between(self, root: fx.Node, node: fx.Node) -> list[fx.Node]:
        """Return the calls that compute ``node`` from its ancestor ``root``, in order."""
        found, waiting = {node}, [node]
        while waiting and len(found) <= _LARGEST:
            for operand in self.operands[waiting.pop()]:
                if operand is not root and operand not in found:
                    found.add(operand)
                    waiting.append(operand)
        return sorted(found, key=self.order.__getitem__)

    def is_closed(self, piece: Sequence[fx.Node]) -> bool:
        """Return whether nobody else reads what a piece computes on its way."""
        inside = set(piece)
        return all(inside.issuperset(self.readers[node]) for node in piece[:-1])

    def values(self, root: fx.Node, piece: Sequence[fx.Node]) -> Tensor | None:
        """Return what a piece computes at `POINTS`, in float64; None if it cannot be run on numbers."""
        try:
            return self._run(root, piece)
        except Exception:  # any of torch's, of arguments that only the real shapes fit
            return None

    def _is_pointwise(self, node: fx.Node, values: list[fx.Node]) -> bool:
        if node.op not in CALLS or node in self._operators.composites:
            return False
        shape = self._flow.shape(node)
        if not shape or any(self._flow.shape(value) != shape for value in values):
            return False
        call, op = self._operators.activation(node), self._operators.op(node)
        module = self._operators.module(node)
        if call is not None and (call.weight is not None or call.name == "rrelu"):
            return False
        if module is not None and any(True for _ in module.parameters()):
            return False
        name = name_of(node)
        if name in ("max", "min"):
            return isinstance(node.kwargs.get("other", (*node.args, None)[1]), fx.Node)
        return call is not None or op.carry is axis.elementwise or name in CASTS

    def _add_to_tree(self, node: fx.Node, operands: tuple[fx.Node, ...]) -> None:
        parent: fx.Node | None = operands[0]
        for operand in operands[1:]:
            other: fx.Node | None = operand
            while parent is not other and parent is not None and other is not None:
                if self._depths[parent] >= self._depths[other]:
                    parent = self.parents.get(parent)
                else:
                    other = self.parents.get(other)
            parent = parent if other is parent else None
        if parent is not None:
            self.parents[node], self.operands[node] = parent, operands
            self._depths[node] = self._depths[parent] + 1

    # Running a piece on numbers.

    def _run(self, root: fx.Node, piece: Sequence[fx.Node]) -> Tensor:
        found: dict[fx.Node, Any] = {root: POINTS.clone()}
        with torch.no_grad():
            for node in piece:
                names = self.renamed.get(node, {})

                def number(n: fx.Node, names: dict[fx.Node, fx.Node] = names) -> Any:
                    n = names.get(n, n)
                    if n in self._data and n not in found and n not in self.constants:
                        raise ValueError("larger than a piece may be")
                    return found[n] if n in found else self._constant(n)

                given = (node.args[:1], {}) if name_of(node) in CASTS else (node.args, node.kwargs)
                found[node] = self._call(node, *(map_arg(a, number) for a in given))
        value = found[piece[-1]].double()
        if value.shape != POINTS.shape:
            raise ValueError("no function of a number")
        return value

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if name_of(node) in CASTS:
            number = args[0].double()
            return number.clone() if name_of(node) == "clone" else number  # what overwrites a copy leaves its source
        return self._operators.call(node, args, kwargs)

    def _constant(self, node: fx.Node, depth: int = 0) -> Any:
        """Return a number for what does not depend on the images: of a parameter its largest."""
        name = name_of(node)
        if node.op in ("get_attr", "placeholder"):
            tensor = self._operators.tensor(node)
            if tensor is None or (isinstance(tensor, nn.Parameter) and not tensor.any()):
                return _tensor(_SOME_NUMBER)
            flat = tensor.detach().flatten().double()
            return _tensor(float(flat[flat.abs().argmax()]))
        if name in _CONSTANTS and node in self.constants:
            return _tensor(_CONSTANTS[name])
        if name in _FILLED and node in self.constants:
            value = node.kwargs.get("fill_value", node.args[_FILLED[name]] if len(node.args) > _FILLED[name] else None)
            return _tensor(float(value) if isinstance(value, int | float) else _SOME_NUMBER)
        if depth > 8 or not self._flow.is_tensor(node):
            return _tensor(_SOME_NUMBER)
        if self._operators.moves_only(node) or name in ("getitem", *CASTS):
            return self._constant(node.all_input_nodes[0], depth + 1)
        if node.op == "call_module" or self._operators.op(node).carry is not axis.elementwise:
            return _tensor(_SOME_NUMBER)
        args, kwargs = (map_arg(a, lambda n: self._constant(n, depth + 1)) for a in (node.args, node.kwargs))
        return self._call(node, args, kwargs)


def _is_constant(node: fx.Node) -> bool:
    return node.op in CALLS and (name_of(node) in _CONSTANTS or name_of(node) in _FILLED)


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")
