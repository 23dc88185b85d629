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
    """Copy the results of the sites' operators over their inputs, in place."""
    with rewrite.editing(graph_module, "write_back") as graph:
        for site in sites:
            operator = next(n for n in graph.nodes if n.target == f"{PREFIX}.{site.name}")
            source = operator.args[0]
            with graph.inserting_before(operator):
                kept = graph.call_method("clone", (source,))  # backward needs the old values
                operator.replace_input_with(source, kept)
            with graph.inserting_after(operator):
                # What a bare operator is followed by, the activation, then overwrites the same tensor.
                overwritten = graph.call_method("copy_", (source, operator))
            operator.replace_all_uses_with(overwritten, delete_user_cb=lambda user, own=overwritten: user is not own)
