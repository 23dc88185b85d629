"""The operator by itself as one function of tensors, and the moments of its input.

Whoever calls an operator often binds it once, as an `Operator`.

Floor 0: torch and, lazily where a kernel is launched, triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import compiled_moments, reference
from .lowering import lowering, lowering_of
from .operator import Operator
from .records import Options, Vectors

__all__ = ["activation_moments", "channel_moments", "composed", "lowering", "lowering_of", "mean_sparse"]


def mean_sparse(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    channel_dim: int,
    activation: str = "identity",
    constants: Sequence[float] = (),
    weight: Tensor | None = None,
    variant: str = "mean",
    backward: str = "exact",
    steepness: float = 10.0,
    backward_steepness: float = 10.0,
    choice: str | None = None,
) -> Tensor:
    """Return act(s(x)); arguments as in `Vectors` and `Options`, semantics as in `reference.operator`.

    Only x, or the result of a ReLU, the per-channel vectors and the weight are kept for backward. Compilers get
    `composed`, unless ``choice`` says otherwise; see `Operator`.
    """
    # Read the numbers here. With dynamic=True they are symbols that Dynamo makes where one is first used: in torch 2.14
    # that would be inside the backward of one call, out of reach of the next call's.
    constants = tuple(map(float, constants))
    options = Options(
        channel_dim, activation, constants, variant, backward, float(steepness), float(backward_steepness)
    )
    choice = choice or ("composition" if torch.compiler.is_compiling() else None)
    return Operator(Vectors(centre, threshold, weight), options, choice)(x)


def composed(*arguments: Any, **options: Any) -> Tensor:
    """Return `mean_sparse` of the same arguments as torch operators that suit compilers, whoever calls."""
    return mean_sparse(*arguments, **options, choice="composition")


def channel_moments(x: Tensor, channel_dim: int) -> tuple[int, Tensor, Tensor]:
    """Return the count, the mean ``[C]`` and M2 ``[C]`` (float64) of each channel of x.

    The Triton kernel reads x once and is exact to float32 rounding relative to the deviation; on a CPU everything
    is float64.
    """
    x = x.resolve_neg()  # kernels read what lies in memory
    count = x.numel() // x.shape[channel_dim]
    if count == 0:
        zeros = torch.zeros(2, x.shape[channel_dim], dtype=torch.float64, device=x.device)
        return 0, zeros[0], zeros[1]
    if lowering() == "auto" and x.device.type == "cpu" and compiled_moments.takes(x, channel_dim):
        return compiled_moments.channel_moments(x, channel_dim)
    if lowering_of(x, channel_dim) == "triton":
        return _triton_moments(x, channel_dim)[1]
    others = [d for d in range(x.dim()) if d != channel_dim]
    variance, mean = torch.var_mean(x.double(), dim=others, correction=0)
    return count, mean, variance * count


def activation_moments(
    x: Tensor, channel_dim: int, activation: str, constants: Sequence[float] = (), weight: Tensor | None = None
) -> tuple[Tensor, tuple[int, Tensor, Tensor]]:
    """Return act(x), and the moments of x as `channel_moments` does: on a GPU from one read of x."""
    x = x.resolve_neg()
    if x.numel() and lowering_of(x, channel_dim, weight) == "triton":
        return _triton_moments(x, channel_dim, activation, constants, weight)
    wide = x if x.dtype == torch.float64 else x.float()
    slope = None if weight is None else reference.per_channel(weight.to(wide.dtype), x.dim(), channel_dim)
    y = reference.ACTIVATIONS[activation].forward(wide, *reference.parameters(slope, constants)).to(x.dtype)
    return y, channel_moments(x, channel_dim)


def _triton_moments(*arguments: Any) -> Any:
    from .moments import moments  # imports triton, which a CPU does without

    return moments(*arguments)
