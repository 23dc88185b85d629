"""Floor 4: operators as plain functions of tensors, for compilers.

Requires: a graph that calls `MeanSparse` modules. Ensures: it calls `kernels.ops.composed` instead, with
centre and threshold read from buffers: compilers see aten operators, and values that may change.

A call of a module would hide its options from AOTAutograd's cache, which takes modules in a graph for torch's own:
the same graph with another backward would get the first one's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx

from ..kernels import ops
from ..nn import MeanSparse
from ..rewrite import PREFIX

Call = Callable[..., Tensor]


def lower(graph_module: fx.GraphModule, shared: Mapping[str, MeanSparse], call: Call = ops.composed) -> None:
    """Replace each operator's module by ``call``, in place.

    Args:
        shared: By site name, the operator whose centre and threshold to read.
        call: What to call, with the arguments of `ops.mean_sparse`.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module"):
        operator = graph_module.get_submodule(node.target)
        if not isinstance(operator, MeanSparse):
            continue
        x, weight = (*node.args, None)[:2]
        with graph.inserting_before(node):
            name = f"{PREFIX}_{operator.name.replace('.', '_')}"
            band = [
                read_buffer(graph_module, f"{name}_{part}", getattr(shared[operator.name], part))
                for part in ("centre", "threshold")
            ]
            arguments = (operator.channel_dim, *_activation(operator), weight)
            options = (operator.variant, operator.backward, operator.steepness, operator.backward_steepness)
            new = graph.call_function(call, (x, *band, *arguments, *options))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    del graph_module._modules[PREFIX]
    graph.lint()
    graph_module.recompile()


def _activation(operator: MeanSparse) -> tuple[str, tuple[float, ...]]:
    activation = operator.activation
    return (activation.name, activation.constants) if activation else ("identity", ())


def read_buffer(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Return a node, at the graph's insertion point, that reads ``value``, made a buffer of the graph.

    Compilers take buffers for inputs, so that they see it change. Those behind Dynamo ask where it was found.
    """
    from torch._dynamo.source import LocalSource  # here, where Dynamo is loaded: it takes a second

    while name in graph_module._buffers:
        name += "_"
    graph_module.register_buffer(name, value, persistent=False)
    if (sources := getattr(graph_module, "_param_name_to_source", None)) is not None:
        sources[name] = LocalSource(name)
    return graph_module.graph.get_attr(name)
