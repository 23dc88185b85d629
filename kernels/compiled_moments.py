"""Channel moments on a CPU: one read of x, float64 in registers, compiled by Inductor into one loop.

x is widened element by element and taken relative to its channel's first element, so that sum and sum of squares
are exact to float64 rounding whatever the mean: the first element belongs to the data, so its distance from the mean
is at most sqrt(n) deviations, and the cancellation costs at most a factor n of 2^-53.

torch.var_mean of a widened copy costs 15 to 40 times a ReLU of the same tensor, this 0.8 to 1.7 times (AMD EPYC, one
thread, 0.3 to 6 million elements of [N, C, HW] and of channels-last).

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import compiled
from .layout import DTYPES
from .unguarded import Unguarded

MIN_ELEMENTS = 1 << 12  # chosen when a compiled call cost 60 microseconds of its own
ROWS = 64  # of a channels-last tensor at a time: a block that stays in the cache while its columns are summed


def takes(x: Tensor, channel_dim: int) -> bool:
    """Return whether this lowering handles x."""
    return x.dtype in (torch.float64, *DTYPES) and compiled.takes(x, channel_dim, at_least=MIN_ELEMENTS)


def channel_moments(x: Tensor, channel_dim: int) -> tuple[int, Tensor, Tensor]:
    """Return count, mean ``[C]`` and M2 ``[C]``, float64."""
    flat = compiled.flatten(x.detach(), channel_dim)
    assert flat is not None  # `takes` was asked
    if flat.dim() == 2 and len(flat) < ROWS:  # no whole block: Inductor cannot compile a view of none
        flat = flat[:, :, None]
    # Without a rest, or with one of a single number, the traced program is another.
    rest = min(flat.shape[0] % ROWS * flat.shape[1], 2) if flat.dim() == 2 else 0
    mean, m2 = _kernel(flat.dim() == 3, rest)(flat)
    return x.numel() // x.shape[channel_dim], mean, m2


def _spatial_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of each channel of x ``[outer, C, inner]``."""
    first = x[0, :, 0].double()
    d = x.double() - first[:, None]
    return _finish(first, d.sum((0, 2)), d.square().sum((0, 2)), x.shape[0] * x.shape[2])


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of each channel of x ``[rows, C]``, by blocks of rows and a rest."""
    first = x[0].double()
    whole = x.shape[0] // ROWS * ROWS
    d = x[:whole].view(-1, ROWS, x.shape[1]).double() - first
    rest = x[whole:].double() - first
    total = d.sum(1).sum(0) + rest.sum(0)
    squares = d.square().sum(1).sum(0) + rest.square().sum(0)
    return _finish(first, total, squares, x.shape[0])


def _finish(first: Tensor, total: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean = total / count
    # Rounding may leave a negative M2 of a constant channel; NaN passes through clamp.
    return first + mean, (squares - total * mean).clamp_min(0)


@functools.cache
def _kernel(spatial: bool, _rest: int) -> Unguarded:
    """Return the compiled form of one of the two; of another object for each kind of rest, which sizes do not tell."""
    plain = _spatial_moments if spatial else _row_moments
    return Unguarded(plain, plain.__name__)
