"""Floor 4: checkpointed parts of a graph of Dynamo's become part of the graph, as `transform` traces through them.

Requires: a graph of Dynamo's. Ensures: the same function and derivatives, and every call where sites are looked for;
what a checkpoint would compute again is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def inline_checkpoints(graph_module: fx.GraphModule) -> bool:
    """Inline every call of `torch.utils.checkpoint`, nested ones too, in place; return whether there were any."""
    graph, wrapper = graph_module.graph, torch.ops.higher_order.tag_activation_checkpoint
    found = False
    while call := next((n for n in graph.nodes if n.target is wrapper), None):
        attribute, *inputs = call.args
        assert isinstance(attribute, fx.Node)
        body = graph_module.get_submodule(str(attribute.target))
        assert isinstance(body, fx.GraphModule)
        given: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with graph.inserting_before(call):
            for node in body.graph.find_nodes(op="get_attr"):  # bodies of checkpoints inside, and constants
                name = f"{attribute.target}_{node.target}"
                setattr(graph_module, name, getattr(body, str(node.target)))
                given[node] = graph.get_attr(name)
            results: Any = graph.graph_copy(body.graph, given)
        for taken in list(call.users):  # getitem: a checkpoint returns a tuple
            taken.replace_all_uses_with(results[taken.args[1]])
            graph.erase_node(taken)
        graph.erase_node(call)
        if not attribute.users:
            graph.erase_node(attribute)
        found = True
    return found
