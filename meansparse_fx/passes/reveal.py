"""Floor 4: the graph of an attacker who looks inside.

Requires: a GraphModule made by `sparsify`. Ensures: a new GraphModule that computes the same and returns, beside the
result, what each operator saw: its input and the mask of its band. Operators, parameters and buffers are shared, so
alpha and the backward mode are those of the original.
"""

from __future__ import annotations

from torch import Tensor, fx

from .. import rewrite
from ..kernels.reference import inside_band, per_channel
from ..nn import MeanSparse
from ..rewrite import sharing_copy


def reveal(sparse: fx.GraphModule) -> fx.GraphModule:
    """Return a graph whose result is ``(result of sparse, {site name: (input, mask)})``; a base has no sites."""
    revealed = sharing_copy(sparse)
    seen: dict[str, fx.Node] = {}
    with rewrite.editing(revealed, "reveal") as graph:
        for node, operator in rewrite.calls_of(revealed, MeanSparse):
            with graph.inserting_before(node):
                band = [graph.get_attr(f"{node.target}.{part}") for part in ("centre", "threshold")]
                seen[operator.name] = graph.call_function(look, (node.args[0], *band, operator.channel_dim))
        (output,) = graph.find_nodes(op="output")
        output.args = ((output.args[0], seen),)
    return revealed


def look(x: Tensor, centre: Tensor, threshold: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Return x ``[..., C, ...]`` and where it lies in the band; x as it is now, whatever overwrites it later."""
    band = (per_channel(v.to(x.dtype), x.dim(), channel_dim) for v in (centre, threshold))
    return x.clone(), inside_band(x.detach(), *band)
