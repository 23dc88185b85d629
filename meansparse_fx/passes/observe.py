"""Floor 4: the instrumented graph.

Requires: a GraphModule made by `sparsify`. Ensures: a new GraphModule that makes the base model's own calls
with a `ChannelMoments` observer before each site, under the same path; parameters are shared.
"""

from __future__ import annotations

from torch import fx, nn

from ..nn import ChannelMoments, MeanSparse
from ..rewrite import insert_module_before, sharing_copy
from ..statistics import PREFIX
from .restore import take_out


def observe(sparse: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, ChannelMoments]]:
    """Return the instrumented graph of ``sparse`` and its observers by site name."""
    observed = sharing_copy(sparse)
    del observed._modules[PREFIX]
    observers: dict[str, ChannelMoments] = {}
    for node in list(observed.graph.nodes):
        if node.op != "call_module" or not node.target.startswith(f"{PREFIX}."):
            continue
        operator = sparse.get_submodule(node.target)
        if isinstance(operator, MeanSparse):
            observer = ChannelMoments(operator.name, operator.channels, operator.channel_dim)
            observers[operator.name] = observer.to(operator.mean.device)
            insert_module_before(node, node.args[0], node.target)
            take_out(node, operator)
    observed._modules[PREFIX] = nn.Module()
    for name, observer in observers.items():
        observed.add_submodule(f"{PREFIX}.{name}", observer)
    observed.graph.lint()
    observed.recompile()
    return observed, observers
