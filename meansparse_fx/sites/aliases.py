"""Floor 2: which nodes lie in one memory, who overwrites it, and whether an in-place activation may become a plain one.

In place, it changes its input for everyone who holds it. Readers of the input node itself are no problem: a pass
lets them read the result. A view made before, and read after, would keep the old values: that is an error.
Imports `ops`, `plan`, `shapes` and floor 1 only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import fx
from torch.utils import _pytree as pytree

from ..errors import SiteError
from .ops import Operators
from .plan import Site
from .shapes import Flow


class Overwrites:
    """Which nodes of a graph may lie in one memory, and the calls that write into tensors they are given.

    Attributes:
        order: By node, its position in the graph.
        memory: By node, keys of the memory it may lie in.
        holders: By key, the nodes that may lie there, in order.
    """

    def __init__(self, graph: fx.Graph, operators: Operators, flow: Flow) -> None:
        self._operators = operators
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.memory: dict[fx.Node, frozenset[int]] = {}
        self.holders: dict[int, list[fx.Node]] = defaultdict(list)
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            memory = flow.memory.get(node, frozenset())
            if operators.op(node).may_alias:
                # What was a copy for these images may be a view for others, or in another memory format.
                memory |= frozenset().union(*(self.memory[n] for n in node.all_input_nodes[:1]))
            self._hold(node, memory)
            for key in frozenset().union(*(self.memory[n] for n in self._written(node))):
                self._writers[key].append(node)

    def _hold(self, node: fx.Node, memory: frozenset[int]) -> None:
        self.memory[node] = memory
        for key in memory:
            self.holders[key].append(node)

    def record(self, new: fx.Node, old: fx.Node) -> None:
        """Note that a new node yields what an old one did, as far as its readers can tell."""
        self.order[new] = self.order[old]
        self._hold(new, self.memory[old])

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return the calls that overwrite a node's value."""
        found = (writer for key in self.memory[node] for writer in self._writers[key])
        return [writer for writer in found if self.order[writer] > self.order[node]]

    def changed(self, node: fx.Node, but: fx.Node | None = None) -> bool:
        """Return whether somebody else overwrites a node's value, so that it must not be read at another time."""
        return any(writer is not but for writer in self.writers(node))

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


def check_inplace(graph: fx.Graph, operators: Operators, flow: Flow, sites: Iterable[Site]) -> None:
    """Raise SiteError if a site's in-place activation changes a tensor that is read later under another name."""
    aliases = Overwrites(graph, operators, flow)
    order = aliases.order
    nodes = {node.name: node for node in order}
    for site in sites:
        name, node, source = site.name, nodes[site.node], nodes[site.source]
        for holder in dict.fromkeys(h for key in aliases.memory[source] for h in aliases.holders[key]):
            if holder is source or order[holder] >= order[node]:
                continue
            reader = next((r for r in holder.users if order[r] > order[node] and _reads(r, flow)), None)
            if reader is not None:
                raise SiteError(
                    f"{name}: the activation works in place, and {operators.label(reader)} later reads "
                    f"{operators.label(holder)}, which shares its input's memory. Give the activation inplace=False "
                    f"if that is what the model means, or leave the site out: Placement(exclude=({name!r},))"
                )


def _reads(reader: fx.Node, flow: Flow) -> bool:
    """Return whether a reader looks at the values: x.shape does not."""
    return reader.op == "output" or flow.is_tensor(reader)


def changed_inputs(graph: fx.Graph, sites: Iterable[Site], flow: Flow, inputs: Iterable[fx.Node]) -> frozenset[str]:
    """Return the names of the sites whose in-place activation overwrites one of the graph's inputs, or a view of it.

    Whoever passed that tensor may read it again, beyond this graph.
    """
    nodes = {node.name: node for node in graph.nodes}
    outside = frozenset().union(*(flow.memory[n] for n in inputs))
    inplace = [s for s in sites if s.activation and s.activation.inplace]
    return frozenset(s.name for s in inplace if flow.memory[nodes[s.source]] & outside)
