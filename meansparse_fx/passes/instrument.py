"""Floor 4: observers as plain functions of tensors, for compilers.

Requires: any graph and its plan. Ensures: `accumulate` stands before each active site and updates the moments kept
in buffers; nothing else changes. What `observe` does with modules, whose Python state a compiler would freeze.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .. import rewrite
from ..rewrite import PREFIX
from ..sites import SitePlan
from ..statistics import merged
from .lower import read_buffer


class Moments(nn.Module):
    """Count, mean and M2 of one site's channels, all float64 tensors: exact counts up to 2^53."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        for name, shape in (("count", ()), ("mean", (channels,)), ("m2", (channels,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))


def accumulate(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, channel_dim: int) -> Tensor:
    """Return x ``[..., C, ...]``, having merged its moments into the others by Chan's formula, in float64."""
    values = x.numel() // x.shape[channel_dim]
    others = [d for d in range(x.dim()) if d != channel_dim]
    # Relative to the channel's first value, so that the sums cancel nothing; var_mean's one-pass updates cost more.
    first = x.detach().double()
    for d in reversed(others):
        first = first.select(d, 0)
    shape = [-1 if d == channel_dim else 1 for d in range(x.dim())]
    centred = x.detach().double() - first.view(shape)
    total, squares = centred.sum(others), centred.square().sum(others)
    own_mean, own_m2 = first + total / values, (squares - total.square() / values).clamp_min(0)
    share = values / (count + values)
    both = merged(mean, m2, own_mean, own_m2, share, count * share)
    mean.copy_(both[0])
    m2.copy_(both[1])
    count.add_(values)
    return x


def instrument(graph_module: fx.GraphModule, plan: SitePlan, moments: dict[str, Moments]) -> None:
    """Insert `accumulate` before every active site of ``plan``, in place.

    Args:
        moments: By site name, what to accumulate into.
    """
    with rewrite.editing(graph_module, "instrument") as graph:
        for number, place in enumerate(plan.places(graph)):
            site, node, source = place.site, place.node, place.source
            readers = place.readers or tuple(source.users)  # a residual sum is seen by all who read it
            with graph.inserting_before(place.readers[0] if place.readers else node.next):
                buffers = moments[site.name].named_buffers()
                state = [read_buffer(graph_module, f"{PREFIX}_{number}_{part}", buffer) for part, buffer in buffers]
                seen = graph.call_function(accumulate, (source, *state, site.channel_dim))
            seen.meta = dict(source.meta)
            for reader in readers:
                reader.replace_input_with(source, seen)
