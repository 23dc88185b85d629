"""Floor 4: who overwrites what in a graph, under whatever name, so that a read may be moved. Changes no graph."""

from __future__ import annotations

from collections import defaultdict

from torch import fx
from torch.utils import _pytree as pytree

from ..sites.aliases import Aliases
from ..sites.ops import Operators
from ..sites.shapes import Flow


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
        if self._operators.writes(node):
            given.append(node.args[0] if node.args else node.all_input_nodes)
        return [n for n in pytree.tree_leaves(given) if isinstance(n, fx.Node)]
