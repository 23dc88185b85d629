"""The operator's arguments as two records, which every lowering takes: what is per channel, and everything else.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Results = tuple[Tensor, Tensor | None]  # y and v, or the gradients of x and v; None for a v that nobody wants
Norm = tuple[Tensor | None, ...]  # mean, variance, weight and bias of a batch norm in eval mode; all None without one
Runner = Callable[..., Results]  # of the vectors, as a record, and the tensors


class Vectors(NamedTuple):
    """The per-channel arguments ``[C]``, in the units of what they are applied to; None is left out.

    Attributes:
        centre, threshold: The band, in the units of u.
        weight: The activation's learned slope, ``[C]`` or ``[1]``.
        input_mean, input_variance, input_weight, input_bias: Of a batch norm of x in eval mode, the last two or none;
            or folded, the last two alone: scale and shift.
        layer_scale: Of a LayerScale after it.
        sum_mean, sum_variance, sum_weight, sum_bias: Of a batch norm of v.
    """

    centre: Tensor
    threshold: Tensor
    weight: Tensor | None = None
    input_mean: Tensor | None = None
    input_variance: Tensor | None = None
    input_weight: Tensor | None = None
    input_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    sum_mean: Tensor | None = None
    sum_variance: Tensor | None = None
    sum_weight: Tensor | None = None
    sum_bias: Tensor | None = None

    @property
    def input_norm(self) -> Norm:
        """The vectors of the norm of x."""
        return self[3:7]

    @property
    def sum_norm(self) -> Norm:
        """The vectors of the norm of v."""
        return self[8:12]

    @property
    def scaled(self) -> bool:
        """Whether x is scaled on its way into v; else its gradient is the residual's, and one tensor serves as both."""
        return self.has_input_norm or self.layer_scale is not None

    @property
    def has_input_norm(self) -> bool:
        """Whether there is a norm of x."""
        return self.input_mean is not None or self.input_weight is not None

    @property
    def has_sum_norm(self) -> bool:
        """Whether there is a norm of v."""
        return self.sum_mean is not None or self.sum_weight is not None

    @property
    def gapped(self) -> bool:
        """Whether a vector has gaps between its elements."""
        return any(v is not None and not v.is_contiguous() for v in self)

    def contiguous(self) -> Vectors:
        """Return the vectors without such gaps."""
        return Vectors(*[v if v is None else v.contiguous() for v in self])


class Options(NamedTuple):
    """Everything else.

    Backward alone knows one more variant: ``none``, where what is kept already stands for s.

    Attributes:
        channel_dim: Dimension of x that holds the channels, not negative.
        activation: A name in `reference.ACTIVATIONS`.
        constants: Scalar arguments of the activation, in the order of its row.
        variant: ``mean`` (the paper's), ``edge`` (the nearer edge of the band) or ``smooth`` (a sigmoid gate).
        backward: ``exact``, ``identity`` (straight through the operator) or ``smooth`` (of a sigmoid gate).
        steepness: Of the smooth variant's gate, per relative distance to the band's edge.
        backward_steepness: Of the smooth backward's gate; values do not depend on it.
        want_sum: v is a second result.
        input_eps, sum_eps: Of the norms of x and of v, added to their variances.
    """

    channel_dim: int
    activation: str = "identity"
    constants: tuple[float, ...] = ()
    variant: str = "mean"
    backward: str = "exact"
    steepness: float = 10.0
    backward_steepness: float = 10.0
    want_sum: bool = False
    input_eps: float = 1e-5
    sum_eps: float = 1e-5

    @property
    def gate_steepness(self) -> float | None:
        """The steepness of the gate whose derivative backward takes; None where it takes none."""
        if self.backward == "smooth":
            return self.backward_steepness
        return self.steepness if self.backward == "exact" and self.variant == "smooth" else None
