"""Floor 4: let what an in-place activation did to a graph's input still happen to it.

Requires: a graph with operators in the place of in-place activations. Ensures: where the overwritten tensor came
from outside of the graph, as it does after a graph break, it is overwritten again.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .. import rewrite
from ..rewrite import PREFIX
from ..sites import Site


def write_back(graph_module: fx.GraphModule, sites: Iterable[Site]) -> None:
    """Copy the results of the sites' activations over their inputs, in place."""
    with rewrite.editing(graph_module, "write_back") as graph:
        for site in sites:
            operator = next(n for n in graph.nodes if n.target == f"{PREFIX}.{site.name}")
            source = operator.args[0]
            # A bare operator is followed by the activation, which overwrites the operator's result only.
            fused = graph_module.get_submodule(operator.target).activation is not None
            result = operator if fused else next(n for n in graph.nodes if n.name == site.node)
            with graph.inserting_before(operator):
                kept = graph.call_method("clone", (source,))  # backward needs the old values
                operator.replace_input_with(source, kept)
            with graph.inserting_after(result):
                overwritten = graph.call_method("copy_", (source, result))
            result.replace_all_uses_with(overwritten, delete_user_cb=lambda user, own=overwritten: user is not own)
