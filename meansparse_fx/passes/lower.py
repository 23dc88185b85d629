"""Floor 4: operators as plain functions of tensors, for compilers.

Requires: a graph that calls `MeanSparse` modules. Ensures: it calls a function instead, for compilers
`kernels.ops.composed`, with centre and threshold read from buffers: they see aten operators, and values that change.

A call of a module would hide its options from AOTAutograd's cache, which takes modules in a graph for torch's own:
the same graph with another backward would get the first one's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx

from .. import rewrite
from ..nn import MeanSparse
from ..rewrite import PREFIX

Call = Callable[..., Tensor]


def lower(graph_module: fx.GraphModule, shared: Mapping[str, MeanSparse], call: Call) -> None:
    """Replace each operator's module by ``call``, in place.

    Args:
        shared: By site name, the operator whose centre and threshold to read.
        call: What to call, with the arguments of `ops.mean_sparse`.
    """
    with rewrite.editing(graph_module, "lower"):
        for node, operator in rewrite.calls_of(graph_module, MeanSparse):
            _lower(graph_module, node, operator, shared[operator.name], call)
        del graph_module._modules[PREFIX]


def _lower(graph_module: fx.GraphModule, node: fx.Node, operator: MeanSparse, shared: MeanSparse, call: Call) -> None:
    graph, (x, weight) = node.graph, (*node.args, None)[:2]
    with graph.inserting_before(node):
        site = f"{PREFIX}_{operator.name.replace('.', '_')}"
        band = [read_buffer(graph_module, f"{site}_{part}", getattr(shared, part)) for part in ("centre", "threshold")]
        activation = operator.activation
        name, constants = (activation.name, activation.constants) if activation else ("identity", ())
        options = (operator.variant, operator.backward, operator.steepness, operator.backward_steepness)
        new = graph.call_function(call, (x, *band, operator.channel_dim, name, constants, weight, *options))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def read_buffer(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Return a node, at the graph's insertion point, that reads ``value``, made a buffer of the graph.

    Compilers take buffers for inputs, so that they see it change. Those behind Dynamo ask where it was found.
    """
    from torch._dynamo.source import LocalSource  # here, where Dynamo is loaded: it takes a second

    while name in graph_module._buffers:
        name += "_"
    graph_module.register_buffer(name, value)
    if (sources := getattr(graph_module, "_param_name_to_source", None)) is not None:
        sources[name] = LocalSource(name)
    return graph_module.graph.get_attr(name)
