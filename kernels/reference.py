"""The one definition of the operator's semantics, in torch operators only.

    y = act(s(x)),   s(x) = centre if |x - centre| <= threshold else x        (paper, section 3.2)

`mean_sparse` below is a composition of aten operators. It is what torch.compile and export see, and the
oracle of every faster lowering. A channel with a negative threshold passes x through, gradient included:
that is how alpha = 0 is the base model.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("mean", "edge", "smooth")
BACKWARDS = ("exact", "identity", "smooth")

_LOW_PRECISION = (torch.float16, torch.bfloat16)

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    """One row of the table: an activation as torch computes it, forward and backward.

    Attributes:
        forward: ``(s, weight, *constants) -> y``.
        backward: ``(grad_y, s, weight, *constants) -> grad_s``, torch's own derivative formula.
        overwrite: `forward` in place of s, for callers that own s; None where torch has no such form.
        constants: Names of the scalar arguments, in order, with their defaults.
        weight_backward: ``(grad_y, s, weight, *constants) -> grad_weight`` per element, where there is a learned slope.
        clips: Its derivative is zero at zero, and it is s itself wherever its derivative is not zero, so that the
            derivative can be told from the result as well.
        keeps_result: torch's own activation keeps its result for backward and not its input.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    overwrite: Callable[..., Tensor] | None = None
    constants: tuple[tuple[str, float], ...] = ()
    weight_backward: Callable[..., Tensor] | None = None
    clips: bool = False
    keeps_result: bool = False


def _swish_backward(g: Tensor, s: Tensor) -> Tensor:
    q = torch.sigmoid(s)
    return g * (q * (1 + s * (1 - q)))


def _pssilu_backward(g: Tensor, s: Tensor, w: Tensor, shift: float) -> Tensor:
    q = torch.sigmoid(w * s)
    return g * (q - shift + w * s * q * (1 - q)) / (1 - shift)


def _pssilu_weight_backward(g: Tensor, s: Tensor, w: Tensor, shift: float) -> Tensor:
    q = torch.sigmoid(w * s)
    return g * s.square() * q * (1 - q) / (1 - shift)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        lambda s, w: s,
        lambda g, s, w: g,
        lambda s, w: s,
    ),
    "relu": Activation(
        lambda s, w: F.relu(s),
        lambda g, s, w: aten.threshold_backward(g, s, 0.0),
        lambda s, w: aten.relu_(s),
        clips=True,
        keeps_result=True,
    ),
    "relu6": Activation(
        lambda s, w: F.relu6(s),
        lambda g, s, w: aten.hardtanh_backward(g, s, 0.0, 6.0),
        lambda s, w: aten.hardtanh_(s, 0.0, 6.0),
        clips=True,
    ),
    "leaky_relu": Activation(
        lambda s, w, slope: F.leaky_relu(s, slope),
        lambda g, s, w, slope: aten.leaky_relu_backward(g, s, slope, False),
        lambda s, w, slope: aten.leaky_relu_(s, slope),
        constants=(("negative_slope", 0.01),),
    ),
    "prelu": Activation(
        lambda s, w: torch.where(s > 0, s, w * s),
        lambda g, s, w: torch.where(s > 0, g, w * g),
        weight_backward=lambda g, s, w: torch.where(s > 0, torch.zeros_like(s), s * g),
    ),
    "elu": Activation(
        lambda s, w, alpha: F.elu(s, alpha),
        lambda g, s, w, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, s),
        lambda s, w, alpha: aten.elu_(s, alpha),
        constants=(("alpha", 1.0),),
    ),
    "gelu": Activation(
        lambda s, w: F.gelu(s),
        lambda g, s, w: aten.gelu_backward(g, s),
        lambda s, w: aten.gelu_(s),
    ),
    "gelu_tanh": Activation(
        lambda s, w: F.gelu(s, approximate="tanh"),
        lambda g, s, w: aten.gelu_backward(g, s, approximate="tanh"),
        lambda s, w: aten.gelu_(s, approximate="tanh"),
    ),
    "silu": Activation(
        lambda s, w: F.silu(s),
        lambda g, s, w: aten.silu_backward(g, s),
        lambda s, w: aten.silu_(s),
    ),
    # SiLU as libraries write it out themselves; the last bit differs from torch's own.
    "swish": Activation(
        lambda s, w: s * torch.sigmoid(s),
        lambda g, s, w: _swish_backward(g, s),
    ),
    "hardswish": Activation(
        lambda s, w: F.hardswish(s),
        lambda g, s, w: aten.hardswish_backward(g, s),
        lambda s, w: aten.hardswish_(s),
    ),
    "mish": Activation(
        lambda s, w: F.mish(s),
        lambda g, s, w: aten.mish_backward(g, s),
        lambda s, w: aten.mish_(s),
    ),
    "softplus": Activation(
        lambda s, w, beta, limit: F.softplus(s, beta, limit),
        lambda g, s, w, beta, limit: aten.softplus_backward(g, s, beta, limit),
        constants=(("beta", 1.0), ("threshold", 20.0)),
    ),
    # Dai et al. (2022): x * sigmoid(a * x), and shifted by b; a is learned, b is a constant here.
    "psilu": Activation(
        lambda s, w: s * torch.sigmoid(w * s),
        lambda g, s, w: _pssilu_backward(g, s, w, 0.0),
        weight_backward=lambda g, s, w: _pssilu_weight_backward(g, s, w, 0.0),
    ),
    "pssilu": Activation(
        lambda s, w, shift: s * (torch.sigmoid(w * s) - shift) / (1 - shift),
        _pssilu_backward,
        constants=(("shift", 0.0),),
        weight_backward=_pssilu_weight_backward,
    ),
}


def widened(x: Tensor) -> Tensor:
    """Return x in its computing dtype: float16 and bfloat16 are computed in float32."""
    return x.float() if x.dtype in _LOW_PRECISION else x


def per_channel(vector: Tensor, rank: int, channel_dim: int) -> Tensor:
    """Return ``vector`` ``[C]`` shaped to broadcast along ``channel_dim`` of a tensor of ``rank`` dimensions."""
    shape = [1] * rank
    shape[channel_dim] = -1
    return vector.view(shape)


def inside_band(x: Tensor, centre: Tensor, threshold: Tensor) -> Tensor:
    """Return the mask of elements the operator replaces; all arguments broadcast. Empty where threshold < 0."""
    return (x - centre).abs() <= threshold


def sparsify(x: Tensor, centre: Tensor, threshold: Tensor, variant: str, backward: str, steepness: float) -> Tensor:
    """Return s(x), differentiable as ``backward`` says; centre and threshold broadcast against x."""
    inside = inside_band(x, centre, threshold)
    if variant == "smooth":
        hard = soft = smooth_gate(x, centre, threshold, steepness)
    else:
        snapped = torch.where(x < centre, centre - threshold, centre + threshold) if variant == "edge" else centre
        if backward == "identity":
            snapped = snapped + (x - x.detach())  # a zero whose derivative is one; x is finite inside the band
        hard = torch.where(inside, snapped, x)
        soft = smooth_gate(x, centre, threshold, steepness) if backward == "smooth" else hard
    if variant == "smooth" and backward == "identity":
        soft = x
    if soft is hard:
        return hard
    # The derivative of soft under the values of hard.
    return hard.detach() + torch.where(soft.detach().isfinite(), soft - soft.detach(), soft.new_zeros(()))


def _gate(d: Tensor, threshold: Tensor, steepness: float) -> tuple[Tensor, Tensor]:
    """Return the distance from the centre in thresholds, and the sigmoid gate of it."""
    relative = d.abs() / threshold.clamp_min(torch.finfo(threshold.dtype).tiny)
    return relative, torch.sigmoid(steepness * (relative - 1))


def smooth_gate(x: Tensor, centre: Tensor, threshold: Tensor, steepness: float) -> Tensor:
    """Return centre + (x - centre) * sigmoid(steepness * (|x - centre| / threshold - 1)); x where threshold < 0."""
    d = x - centre
    _, gate = _gate(d, threshold, steepness)
    return torch.where((threshold >= 0) & d.isfinite(), centre + d * gate, x)


def smooth_gate_derivative(x: Tensor, centre: Tensor, threshold: Tensor, steepness: float) -> Tensor:
    """Return d smooth_gate / dx = gate + steepness * |x - centre| / threshold * gate * (1 - gate)."""
    d = x - centre
    relative, gate = _gate(d, threshold, steepness)
    # Far out the second term is infinity times zero; its limit is zero.
    slope = torch.where(gate < 1, steepness * relative * gate * (1 - gate), torch.zeros_like(gate))
    return torch.where((threshold >= 0) & d.isfinite(), gate + slope, torch.ones_like(gate))


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
) -> Tensor:
    """Return act(s(x)) as a composition of torch operators.

    Args:
        x: ``[..., C, ...]``, any floating dtype; float16 and bfloat16 are computed in float32 and rounded once.
        centre: ``[C]``, what values inside the band become.
        threshold: ``[C]``, half the band's width in the units of x; negative means the identity.
        channel_dim: Dimension of x that holds the channels, not negative.
        activation: A name in `ACTIVATIONS`.
        constants: Scalar arguments of the activation, in the order of its row.
        weight: ``[C]`` or ``[1]``, the learned slope of an activation that has one.
        variant: ``mean`` (the paper's), ``edge`` (the nearer edge of the band) or ``smooth`` (a sigmoid gate).
        backward: ``exact``, ``identity`` (straight through the operator) or ``smooth`` (the smooth variant's).
        steepness: Of the smooth gate, per relative distance to the band's edge.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centre, threshold = (per_channel(v.to(wide.dtype), x.dim(), channel_dim) for v in (centre, threshold))
    s = sparsify(wide, centre, threshold, variant, backward, steepness)
    if weight is not None:
        weight = per_channel(weight.to(wide.dtype), x.dim(), channel_dim)
    return ACTIVATIONS[activation].forward(s, weight, *constants).to(x.dtype)
