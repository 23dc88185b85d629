"""Floor 4: take what stands before an operator into it: a frozen batch norm, a residual sum, and a norm of that.

Requires: a GraphModule made by `sparsify`, in eval mode. Ensures: the same function to rounding, with fewer calls:
norm, sum, threshold and activation are one, and where others read the sum it is that call's second result. Modules,
and so the state_dict, stay as they are; the graph before fusion is kept for `restore` and `observe`.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..frozen import Before, FrozenNorm
from ..nn import MeanSparse
from ..rewrite import keep_unfused
from ..sites.ops import Operators
from ..sites.shapes import Flow, propagate

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SUMS = (python.add, python.iadd, torch.add, "add", "add_", "__iadd__")
_IN_PLACE = (
    *(python.iadd, python.isub, python.imul, python.itruediv, python.setitem),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"),
)

_TRAINED = "the norm's parameters want gradients: model.requires_grad_(False)"


@dataclass(frozen=True, slots=True)
class _Norm:
    """A batch norm in the graph.

    Attributes:
        node: Its call.
        frozen: What it computes.
    """

    node: fx.Node
    frozen: FrozenNorm


@dataclass(frozen=True, slots=True)
class _Sum:
    """A residual sum in the graph: ``node`` adds ``x``, behind its own norm if it has one, and ``residual``."""

    node: fx.Node
    x: fx.Node
    residual: fx.Node
    norm: _Norm | None


def fuse(graph_module: fx.GraphModule, images: Tensor) -> dict[str, str]:
    """Fuse what can be fused, in place; return by site name what was, or why nothing was.

    Args:
        images: ``[N, ...]``, example inputs; only their shape matters.
    """
    keep_unfused(graph_module)
    finder = _Finder(graph_module, propagate(graph_module, images))
    notes = {}
    for node in list(graph_module.graph.find_nodes(op="call_module")):
        operator = graph_module.get_submodule(node.target)
        if isinstance(operator, MeanSparse):
            notes[operator.name] = _fuse(node, operator, finder)
    graph_module.graph.lint()
    graph_module.recompile()
    return notes


def _fuse(node: fx.Node, operator: MeanSparse, finder: _Finder) -> str:
    """Fuse one operator's surroundings into it; return what it was, or why nothing."""
    source = node.args[0]
    outer = finder.norm(source, operator)
    if isinstance(outer, str):
        return outer
    total = finder.sum(outer.node.args[0] if outer else source, operator)
    if outer is None and total is None:
        return "nothing before it to take in"
    if total is None:
        operator.before = Before(norm=outer.frozen)
        finder.know(_replace(node, node, outer.node.args[0], None), node)
        _erase(outer.node)
        return "norm"
    first = outer.node if outer else node
    operator.before = Before(
        norm=total.norm and total.norm.frozen,
        outer=outer and outer.frozen,
        want_sum=any(reader is not first for reader in total.node.users),
    )
    y = _replace(node, total.node, total.norm.node.args[0] if total.norm else total.x, total.residual)
    finder.know(y, node)
    _erase(outer.node if outer else None)
    if operator.before.want_sum:
        with node.graph.inserting_after(y.args[0]):
            v = node.graph.call_function(python.getitem, (y.args[0], 1))
        v.meta = dict(total.node.meta)
        finder.know(v, total.node)
        total.node.replace_all_uses_with(v)
    _erase(total.node, total.norm.node if total.norm else None)
    words = ("norm" if total.norm else "", "sum", "norm" if outer else "")
    return " + ".join(word for word in words if word) + (", both results read" if operator.before.want_sum else "")


def _replace(node: fx.Node, place: fx.Node, x: fx.Node, residual: fx.Node | None) -> fx.Node:
    """Put the fused call at ``place`` for an operator's call; return the node of its result y."""
    graph, operator = node.graph, node.graph.owning_module.get_submodule(node.target)
    weight = node.args[1] if len(node.args) > 1 else None
    with graph.inserting_before(place):
        if weight is not None:  # a parameter: it may be read earlier
            weight = graph.get_attr(weight.target)
        y = call = graph.call_module(node.target, (x, weight, residual), {"fused": True})
        if operator.before.want_sum:
            y = graph.call_function(python.getitem, (call, 0))
    call.meta = dict(node.meta)
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    _erase(node, *(n for n in node.args[1:] if isinstance(n, fx.Node) and len(n.users) == 1))
    return y


def _erase(*nodes: fx.Node | None) -> None:
    for node in nodes:
        if node is not None and not node.users:
            node.graph.erase_node(node)


class _Finder:
    """Recognises norms and sums, and refuses those that cannot be moved."""

    def __init__(self, graph_module: fx.GraphModule, flow: Flow) -> None:
        self._graph_module = graph_module
        self._operators = Operators.of(graph_module)
        self._flow = flow
        self._order = {node: position for position, node in enumerate(graph_module.graph.nodes)}

    def norm(self, node: fx.Node, operator: MeanSparse) -> _Norm | str | None:
        """Return the frozen norm that ``node`` calls for a single reader; why it cannot be taken; or None."""
        found = next((f for f in map(lambda read: read(self, node), _READERS) if f is not None), None)
        if found is None or operator.channel_dim != 1 or len(node.users) != 1:
            return None
        module = found.module
        if module.running_mean is None:
            return "the norm has no running statistics"
        if any(p is not None and p.requires_grad for p in (module.weight, module.bias)):
            return _TRAINED
        return None if self._changed(node.args[0]) else _Norm(node, found)

    def sum(self, node: fx.Node, operator: MeanSparse) -> _Sum | None:
        """Return the residual sum that ``node`` is, if it can be taken."""
        if node.target not in _SUMS or node.kwargs or len(node.args) != 2:
            return None
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        shapes = {self._flow.shape(n) for n in (node, *operands)}
        if len(operands) != 2 or len(shapes) != 1 or operands[0] is operands[1]:
            return None
        if self._changed(node) or any(self._changed(n, but=node) for n in operands):
            return None
        if _in_place(node) and any(self._order[r] > self._order[node] for r in operands[0].users):
            return None  # who reads the overwritten operand later means the sum
        for x, residual in (operands, operands[::-1]):
            norm = self.norm(x, operator)
            if isinstance(norm, _Norm):
                return _Sum(node, x, residual, norm)
        return _Sum(node, *operands, None)

    def _changed(self, node: fx.Node, but: fx.Node | None = None) -> bool:
        """Return whether somebody overwrites a node's value, so that it must not be read at another time."""
        return any(self._overwrites(reader) for reader in node.users if reader is not but)

    def _overwrites(self, reader: fx.Node) -> bool:
        activation = self._operators.activation(reader)
        return _in_place(reader) or bool(activation and activation.inplace)

    def know(self, new: fx.Node, old: fx.Node) -> None:
        """Note that a new node yields what an old one did."""
        self._flow.values[new] = self._flow.values[old]
        self._order[new] = self._order[old]

    # The two forms of a batch norm.

    def read_module(self, node: fx.Node) -> FrozenNorm | None:
        module = self._operators.module(node)
        if type(module) not in _NORMS or len(node.args) != 1 or module.training:
            return None
        return FrozenNorm(module, module.eps)

    def read_function(self, node: fx.Node) -> FrozenNorm | None:
        """Of F.batch_norm with all that it reads from one module, as classes that extend torch's norms call it."""
        if node.target is not F.batch_norm:
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        state = [given.get(name) for name in names[1:5]]
        if given.get("training", False) is not False or not all(isinstance(n, fx.Node) for n in state):
            return None
        if any(n.op != "get_attr" for n in state):
            return None
        owners = {str(n.target).rpartition(".")[0] for n in state}
        own = [str(n.target).rpartition(".")[2] for n in state]
        if len(owners) != 1 or own != list(names[1:5]):
            return None
        return FrozenNorm(self._graph_module.get_submodule(owners.pop()), given.get("eps", 1e-5))


_READERS: tuple[Callable[[_Finder, fx.Node], FrozenNorm | None], ...] = (_Finder.read_module, _Finder.read_function)


def _in_place(node: fx.Node) -> bool:
    """Return whether a call writes into one of its inputs, as far as its name tells."""
    if node.target in _IN_PLACE or node.op not in ("call_function", "call_method"):
        return node.target in _IN_PLACE
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")
