"""Floor 4: the instrumented graph.

Requires: a GraphModule made by `sparsify`. Ensures: a new GraphModule that makes the base model's own calls
with a `ChannelMoments` observer before each site, under the same path; parameters are shared. Fused, the observer
makes the activation's call too: one read of the tensor where there were two.
"""

from __future__ import annotations

from torch import fx, nn

from ..nn import MeanSparse
from ..observer import ChannelMoments
from ..rewrite import PREFIX, insert_module_before, sharing_copy
from .restore import take_out


def observe(sparse: fx.GraphModule, fused: bool = False) -> tuple[fx.GraphModule, dict[str, ChannelMoments]]:
    """Return the instrumented graph of ``sparse`` and its observers by site name, in graph order.

    Args:
        fused: Let observers compute the activation where the operator does: for GPUs, where the moments kernel
            writes it from the same read.
    """
    observed = sharing_copy(sparse)
    operators = {n: m for n, m in sparse.named_modules() if isinstance(m, MeanSparse)}
    observers: dict[str, ChannelMoments] = {}
    observed._modules[PREFIX] = nn.Module()
    for target, operator in operators.items():
        activation = operator.activation if fused else None
        observer = ChannelMoments(operator.name, operator.channels, operator.channel_dim, activation)
        observed.add_submodule(target, observer)
        observers[operator.name] = observer
    for node in list(observed.graph.nodes):
        if (
            node.op == "call_module"
            and node.target in operators
            and observed.get_submodule(node.target).activation is None
        ):
            insert_module_before([node], node.args[0], node.target)
            take_out(node, operators[node.target])
    observed.graph.lint()
    observed.recompile()
    return observed, observers
