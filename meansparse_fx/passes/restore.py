"""Floor 4: take the operators out again.

Requires: a GraphModule made by `sparsify`. Ensures: a new GraphModule that makes the base model's own calls,
shares its parameters, and holds nothing under ``meansparse.``.
"""

from __future__ import annotations

from torch import fx

from .. import rewrite
from ..copies import copied
from ..errors import StateError
from ..nn import MeanSparse
from ..rewrite import PREFIX, bypass, operand, replay_call, sharing_copy
from .uncalled import refuse_hooks


def restore(sparse: fx.GraphModule) -> fx.GraphModule:
    """Return the base model of ``sparse``; parameters and buffers are shared, not copied.

    Raises:
        StateError: It is not what `transform` returned.
    """
    if not isinstance(sparse, fx.GraphModule) or PREFIX not in sparse._modules:
        raise StateError("restore needs the GraphModule that transform returned")
    base = sharing_copy(sparse)
    with rewrite.editing(base, "restore"):
        for node, operator in rewrite.calls_of(base, MeanSparse):
            take_out(node, operator)
        del base._modules[PREFIX]
    base.meta.pop("plan", None)
    # Modules of its own, which take hooks: the operators' places are theirs again.
    own = copied(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
    assert isinstance(own, fx.GraphModule)
    refuse_hooks(own)
    return own


def take_out(node: fx.Node, operator: MeanSparse) -> fx.Node:
    """Put the original call back in the place of an operator's node; return the node that now makes its value."""
    if operator.replaces is None:
        source = operand(node)
        bypass(node)
        return source
    weights = [operand(node, i) for i in range(1, len(node.args))]
    original = replay_call(node, operator.replaces)
    for weight in weights:  # the get_attr that sparsify added, if it did
        if not weight.users:
            weight.graph.erase_node(weight)
    return original
