"""Floor 4: the instrumented graph.

Requires: a GraphModule made by `sparsify`. Ensures: a new GraphModule that makes the base model's own calls
with a `ChannelMoments` observer before each site, under the same path; parameters are shared. Fused, the observer
makes the activation's call too: one read of the tensor where there were two.
"""

from __future__ import annotations

from torch import fx, nn

from .. import rewrite
from ..hook_refusals import callable_copy
from ..nn import MeanSparse
from ..observer import ChannelMoments
from ..rewrite import PREFIX, insert_module_before, operand, sharing_copy
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
        observer = ChannelMoments(operator.name, operator.channels, operator.channel_dim, activation, operator.dims)
        observed.add_submodule(target, observer)
        observers[operator.name] = observer
    with rewrite.editing(observed, "observe"):
        for node, observer in rewrite.calls_of(observed, ChannelMoments):
            if observer.activation is None:
                insert_module_before([node], operand(node), str(node.target))
                operator = operators[str(node.target)]
                original = take_out(node, operator)
                if (path := operator.replaced) is not None:  # the module itself refuses calls
                    called = f"{PREFIX}.called.{original.name}"
                    observed.add_submodule(called, callable_copy(observed.get_submodule(path)))
                    original.target = called
    return observed, observers
