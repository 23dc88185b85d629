"""The operator's arguments as two records, which every lowering takes: what is per channel, and everything else.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Vectors(NamedTuple):
    """The per-channel arguments ``[C]``, in the units of what they are applied to; None is left out.

    Attributes:
        centre, threshold: The band, in the units of u.
        weight: The activation's learned slope, ``[C]`` or ``[1]``.
        scale, shift: Of a frozen norm of x: weight / sqrt(variance + eps), and bias - mean * scale.
        layer_scale: Of a LayerScale behind it.
        norm_scale, norm_shift: Of a frozen norm of v.
    """

    centre: Tensor
    threshold: Tensor
    weight: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    layer_scale: Tensor | None = None
    norm_scale: Tensor | None = None
    norm_shift: Tensor | None = None


class Options(NamedTuple):
    """Everything else, as `reference.mean_sparse` has it, and whether v is wanted.

    Backward alone knows one more variant: ``none``, where what is kept already tells s.
    """

    channel_dim: int
    activation: str = "identity"
    constants: Sequence[float] = ()
    variant: str = "mean"
    backward: str = "exact"
    steepness: float = 10.0
    want_sum: bool = False


def options_of(channel_dim: int, activation: str, constants: Sequence[float], *others) -> Options:
    """Return the options as a dispatcher passes them on: there, constants are a list, which no table can look up."""
    return Options(channel_dim, activation, tuple(constants), *others)
