"""Floor 4: who overwrites what in a graph, under whatever name, so that a read may be moved. Changes no graph."""

from __future__ import annotations

import functools
import inspect
import operator as python
from collections import defaultdict
from collections.abc import Callable

from torch import fx
from torch.utils import _pytree as pytree

from ..sites.aliases import Aliases
from ..sites.ops import Operators
from ..sites.shapes import Flow

_IN_PLACE = (
    *(python.iadd, python.isub, python.imul, python.itruediv, python.setitem),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"),
)


class Overwrites(Aliases):
    """The calls of a graph that write into tensors they are given, by the memory they write into."""

    def __init__(self, graph: fx.Graph, operators: Operators, flow: Flow) -> None:
        super().__init__(graph, operators, flow)
        self._operators = operators
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for key in frozenset().union(*(self.memory[n] for n in self._written(node))):
                self._writers[key].append(node)

    def record(self, new: fx.Node, old: fx.Node) -> None:
        """Note that a new node yields what an old one did, as far as its readers can tell."""
        self.order[new] = self.order[old]
        self.hold(new, self.memory[old])

    def changed(self, node: fx.Node, but: fx.Node | None = None) -> bool:
        """Return whether somebody else overwrites a node's value, so that it must not be read at another time."""
        writers = (writer for key in self.memory[node] for writer in self._writers[key])
        return any(writer is not but and self.order[writer] > self.order[node] for writer in writers)

    def read_again(self, node: fx.Node) -> bool:
        """Return whether a call overwrites what others read later under an older name: they mean its result."""
        at = self.order[node]
        older = (h for n in self._written(node) for key in self.memory[n] for h in self.holders[key])
        return any(self.order[reader] > at for h in older if self.order[h] < at for reader in h.users)

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose tensors a call writes into, as far as its name and its arguments tell."""
        given = [node.kwargs.get("out")]
        if node.target == "apply":  # a torch.autograd.Function may write into what it is given
            given.append(node.args)
        if self._in_place(node):
            given.append(node.args[0] if node.args else node.all_input_nodes)
        return [n for n in pytree.tree_leaves(given) if isinstance(n, fx.Node)]

    def _in_place(self, node: fx.Node) -> bool:
        """Return whether a call writes into its first argument."""
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        idle = self._operators.op(node).passes  # in eval mode: dropout writes nothing then
        activation, module = self._operators.activation(node), self._operators.module(node)
        if module is not None:
            asked = getattr(module, "inplace", False) if activation is None else activation.inplace
            return bool(asked) and (module.training or not idle)
        given = _arguments(node)
        if activation is not None and activation.inplace:
            return True
        if given.get("inplace") and not (idle and given.get("training") is False):
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _arguments(node: fx.Node) -> dict:
    """Return a call's arguments by name, with defaults, as far as the function tells their names."""
    signature = _signature(node.target) if node.op == "call_function" else None
    if signature is None:
        return node.kwargs
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return node.kwargs
    bound.apply_defaults()
    return bound.arguments | node.kwargs


@functools.cache
def _signature(target: Callable) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # written in C: such functions name what works in place with an underscore
        return None
