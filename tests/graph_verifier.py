"""What holds of a graph after every pass, whatever the pass: looked at in every test, see `conftest`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from meansparse_fx import rewrite
from meansparse_fx.nn import MeanSparse
from meansparse_fx.published import published_operator
from meansparse_fx.sites.ops import Operators, is_in_place, name_of

_editing = rewrite.editing


@contextmanager
def verified_editing(graph_module: fx.GraphModule, by: str) -> Iterator[fx.Graph]:
    """Do what `rewrite.editing` does, and look at what the pass ``by`` left."""
    before = _own_keys(graph_module)
    published = [f"{path}." for path, m in graph_module.named_modules() if published_operator(m) is not None]
    with _editing(graph_module, by) as graph:
        yield graph
    gone = before ^ _own_keys(graph_module)
    assert all(key.startswith(tuple(published)) for key in gone), f"{by} changed the state_dict: {gone}"
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:  # nothing dangling: all that is read is there, and whatever a pass puts in is read
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            assert hasattr(graph_module.get_submodule(owner), name), f"{by}: {node} reads nothing"
        idle = node.meta.get("pass") == by and not node.users and node.op != "output"
        assert not idle or is_in_place(name_of(node)), f"{by}: nobody reads {node.format_node()}"
    called = {n: graph_module.get_submodule(str(n.target)) for n in graph.find_nodes(op="call_module")}
    operators = {node: module for node, module in called.items() if isinstance(module, MeanSparse)}
    counts = Counter(operator.name for operator in operators.values())
    assert set(counts.values()) <= {1}, f"{by}: several operators at one site: {counts}"
    if by == "sparsify":
        held = {m.name for m in graph_module.modules() if isinstance(m, MeanSparse)}
        assert held == counts.keys(), f"{by}: operators that no graph calls: {held - counts.keys()}"
        known = Operators.of(graph_module)
        for node, operator in operators.items():  # what read an input overwritten in place reads the result
            source = rewrite.operand(node)
            overwriting = [user for user in node.users if operator.activation is None and known.writes(user)]
            if operator.activation is not None and operator.activation.inplace:
                overwriting.append(node)
            late = [user for user in source.users for w in overwriting if user is not node and order[user] > order[w]]
            assert not late, f"{by}: {late} read {source}, which {node} has in the place of an in-place call"


def _own_keys(graph_module: fx.GraphModule) -> set[str]:
    return {key for key in graph_module.state_dict() if not key.startswith(rewrite.PREFIX)}
