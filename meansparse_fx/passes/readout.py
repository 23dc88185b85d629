"""Floor 4: the graph in front of a network's last linear layer, and the graph with another layer in its place.

Requires: a GraphModule that returns logits. Ensures: new GraphModules that share all parameters, buffers and operators,
so that alpha and the backward mode are those of the original.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

from .. import rewrite

NAME = "meansparse_readout"


def last_linear(model: fx.GraphModule) -> fx.Node | None:
    """Return the last linear layer's node, or None."""
    for node in reversed(model.graph.nodes):
        if node.target is F.linear:
            return node
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.Linear):
            return node
    return None


def features_of(model: fx.GraphModule) -> fx.GraphModule:
    """Return a graph whose result is what the last linear layer reads; the model must have one."""
    copy, linear = _copy(model)
    with rewrite.editing(copy, "features_of") as graph:
        (output,) = graph.find_nodes(op="output")
        output.args = (_input_of(linear),)
    return copy


def with_readout(model: fx.GraphModule, readout: nn.Module) -> fx.GraphModule:
    """Return a graph with ``readout`` in the place of the last linear layer, which the model must have."""
    copy, linear = _copy(model)
    copy.add_submodule(NAME, readout)
    with rewrite.editing(copy, "with_readout"):
        rewrite.replace_call(linear, NAME, [_input_of(linear)])
    return copy


def _input_of(linear: fx.Node) -> fx.Node:
    source = linear.args[0] if linear.args else linear.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def _copy(model: fx.GraphModule) -> tuple[fx.GraphModule, fx.Node]:
    copy = rewrite.sharing_copy(model)
    linear = last_linear(copy)
    assert linear is not None
    return copy, linear
