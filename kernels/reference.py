"""The one definition of the operator, in plain torch operators, differentiable in every mode and to any order.

    y = act(s(u)) + shortcut,   u = sum_norm(v),   v = input_norm(x) * layer_scale + residual
    s(u) = centre if |u - centre| <= threshold else u                         (paper, section 3.2)

Every factor is optional; the operator by itself is act(s(x)). A channel with a negative threshold passes u through,
gradient included: that is how alpha = 0 is the base model. Norms and LayerScale are frozen: a scale and a shift per
channel. Whoever observes or transforms a call gets `operator` below; every faster lowering is held against it.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .records import Norm, Options, Vectors

VARIANTS = ("mean", "edge", "smooth")
BACKWARDS = ("exact", "identity", "smooth")

_LOW_PRECISION = (torch.float16, torch.bfloat16)

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    """One row of the table: an activation as torch computes it, forward and backward.

    Each row has a Triton function of its name in `device_activations.ACTIVATIONS`. With both, whatever the tables of
    `meansparse_fx.activations` call by that name is fused.

    Attributes:
        forward: ``(s, *parameters) -> y``; parameters are the learned slope, if there is one, and the constants.
        backward: ``(grad_y, s, *parameters) -> grad_s``, torch's own derivative formula.
        overwrite: `forward` in place of s, for callers that own s; None where torch has no such form.
        constants: Names of the scalar arguments, in order, with their defaults.
        weight_backward: ``(grad_y, s, *parameters) -> grad_weight`` per element, where there is a learned slope.
        gradient_from_output: Its derivative is zero at zero, and it is s itself wherever its derivative is not zero,
            so that the derivative follows from the result as well as from the input.
        result_is_kept: torch's own activation keeps its result for backward and not its input.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    overwrite: Callable[..., Tensor] | None = None
    constants: tuple[tuple[str, float], ...] = ()
    weight_backward: Callable[..., Tensor] | None = None
    gradient_from_output: bool = False
    result_is_kept: bool = False


def _pssilu_backward(g: Tensor, s: Tensor, w: Tensor, shift: float = 0.0) -> Tensor:
    q = torch.sigmoid(w * s)
    return g * (q - shift + w * s * q * (1 - q)) / (1 - shift)


def _pssilu_weight_backward(g: Tensor, s: Tensor, w: Tensor, shift: float = 0.0) -> Tensor:
    q = torch.sigmoid(w * s)
    return g * s.square() * q * (1 - q) / (1 - shift)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda s: s, lambda g, s: g, lambda s: s),
    "relu": Activation(
        F.relu,
        lambda g, s: aten.threshold_backward(g, s, 0.0),
        aten.relu_,
        gradient_from_output=True,
        result_is_kept=True,
    ),
    "relu6": Activation(
        F.relu6,
        lambda g, s: aten.hardtanh_backward(g, s, 0.0, 6.0),
        lambda s: aten.hardtanh_(s, 0.0, 6.0),
        gradient_from_output=True,
    ),
    "leaky_relu": Activation(
        F.leaky_relu,
        lambda g, s, slope: aten.leaky_relu_backward(g, s, slope, False),
        aten.leaky_relu_,
        constants=(("negative_slope", 0.01),),
    ),
    "prelu": Activation(
        lambda s, w: torch.where(s > 0, s, w * s),
        lambda g, s, w: torch.where(s > 0, g, w * g),
        weight_backward=lambda g, s, w: torch.where(s > 0, torch.zeros_like(s), s * g),
    ),
    "elu": Activation(
        F.elu,
        lambda g, s, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, s),
        aten.elu_,
        constants=(("alpha", 1.0),),
    ),
    "gelu": Activation(F.gelu, aten.gelu_backward, aten.gelu_),
    "gelu_tanh": Activation(
        lambda s: F.gelu(s, approximate="tanh"),
        lambda g, s: aten.gelu_backward(g, s, approximate="tanh"),
        lambda s: aten.gelu_(s, approximate="tanh"),
    ),
    "silu": Activation(F.silu, aten.silu_backward, aten.silu_),
    # SiLU as libraries write it out themselves; the last bit differs from torch's own.
    "swish": Activation(lambda s: s * torch.sigmoid(s), aten.silu_backward),
    "hardswish": Activation(F.hardswish, aten.hardswish_backward, aten.hardswish_),
    "mish": Activation(F.mish, aten.mish_backward, aten.mish_),
    "softplus": Activation(
        F.softplus,
        aten.softplus_backward,
        constants=(("beta", 1.0), ("threshold", 20.0)),
    ),
    # Dai et al. (2022): x * sigmoid(a * x), and shifted by b; a is learned, b is a constant here.
    "psilu": Activation(
        lambda s, w: s * torch.sigmoid(w * s),
        _pssilu_backward,
        weight_backward=_pssilu_weight_backward,
    ),
    "pssilu": Activation(
        lambda s, w, shift: s * (torch.sigmoid(w * s) - shift) / (1 - shift),
        _pssilu_backward,
        constants=(("shift", 0.0),),
        weight_backward=_pssilu_weight_backward,
    ),
}


def parameters(weight: Tensor | None, constants: Sequence[float]) -> tuple[Any, ...]:
    """Return what an activation is called with after its tensors."""
    return tuple(constants) if weight is None else (weight, *constants)


def widened(x: Tensor) -> Tensor:
    """Return x in its computing dtype: float16 and bfloat16 are computed in float32."""
    return x.float() if x.dtype in _LOW_PRECISION else x


def per_channel(vector: Tensor, rank: int, channel_dim: int) -> Tensor:
    """Return ``vector`` ``[C]`` shaped to broadcast along ``channel_dim`` of a tensor of ``rank`` dimensions."""
    shape = [1] * rank
    shape[channel_dim] = -1
    return vector.view(shape)


def shaped(vector: Tensor | None, like: Tensor, channel_dim: int) -> Tensor | None:
    """Return a per-channel vector that broadcasts against ``like``, in its dtype."""
    if vector is None:
        return None
    return per_channel(vector if vector.dtype == like.dtype else vector.to(like.dtype), like.dim(), channel_dim)


def scaled(v: Tensor, scale: Tensor | None, channel_dim: int) -> Tensor:
    """Return v times a LayerScale, if there is one."""
    return v if scale is None else v * shaped(scale, v, channel_dim)


def normed(v: Tensor, norm: Norm, eps: float) -> Tensor:
    """Return a batch norm of v, whose channels are dimension 1, given as it is or `folded`; v itself without one."""
    mean, _, weight, bias = norm
    if mean is not None:
        return F.batch_norm(v, *[t if t is None else t.to(v.dtype) for t in norm], False, 0.0, eps)
    return v if bias is None else torch.addcmul(shaped(bias, v, 1), v, shaped(weight, v, 1))


def folded(vectors: Vectors, options: Options) -> Vectors:
    """Return the vectors with their norms folded."""
    input_norm, sum_norm = vectors.input_norm, vectors.sum_norm
    if input_norm[0] is None and sum_norm[0] is None:
        return vectors
    input_norm, sum_norm = folded_norm(input_norm, options.input_eps), folded_norm(sum_norm, options.sum_eps)
    return Vectors(*vectors[:3], *input_norm, vectors.layer_scale, *sum_norm)


def folded_norm(norm: Norm, eps: float) -> Norm:
    """Return a norm as scale and shift in the places of its weight and bias, float32 or wider; or as it is, if none."""
    if norm[0] is None:
        return norm
    mean, variance, weight, bias = (t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in norm)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    return None, None, scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def residual_sum(x: Tensor, residual: Tensor | None, vectors: Vectors, options: Options) -> Tensor:
    """Return v = input_norm(x) * layer_scale + residual in the computing dtype."""
    v = normed(widened(x), vectors.input_norm, options.input_eps)
    v = scaled(v, vectors.layer_scale, options.channel_dim)
    return v if residual is None else v + widened(residual)


def inside_band(x: Tensor, centre: Tensor, threshold: Tensor) -> Tensor:
    """Return the mask of elements the operator replaces; all arguments broadcast. Empty where threshold < 0."""
    return (x - centre).abs() <= threshold


def sparsify(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    variant: str,
    backward: str,
    steepness: float,
    backward_steepness: float = 10.0,
) -> Tensor:
    """Return s(x), differentiable as ``backward`` says; centre and threshold broadcast against x."""
    inside = inside_band(x, centre, threshold)
    if variant == "smooth":
        hard = soft = smooth_gate(x, centre, threshold, steepness)
    else:
        snapped = torch.where(x < centre, centre - threshold, centre + threshold) if variant == "edge" else centre
        if backward == "identity":
            snapped = snapped + (x - x.detach())  # a zero whose derivative is one; x is finite inside the band
        hard = soft = torch.where(inside, snapped, x)
    if backward == "smooth":
        soft = smooth_gate(x, centre, threshold, backward_steepness)
    elif variant == "smooth" and backward == "identity":
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


def activated(v: Tensor, vectors: Vectors, options: Options) -> Tensor:
    """Return act(s(sum_norm(v))) of a v in its computing dtype."""
    dim = options.channel_dim
    u = normed(v, vectors.sum_norm, options.sum_eps)
    centre, threshold, weight = (shaped(vector, u, dim) for vector in vectors[:3])
    s = sparsify(u, centre, threshold, options.variant, options.backward, options.steepness, options.backward_steepness)
    return ACTIVATIONS[options.activation].forward(s, *parameters(weight, options.constants))


def operator(
    x: Tensor, residual: Tensor | None, shortcut: Tensor | None, vectors: Vectors, options: Options
) -> tuple[Tensor, Tensor]:
    """Return y and v as a composition of torch operators.

    Args:
        x: ``[..., C, ...]``, any floating dtype; float16 and bfloat16 are computed in float32 and rounded once.
        residual, shortcut: Of x's shape, or broadcasting to it. Of several dtypes, as autocast makes them, the results
            have those that single torch operators would give them.
        vectors: Per channel.
        options: Everything else. A v that is wanted is rounded first, and y is the function of that.
    """
    v = residual_sum(x, residual, vectors, options)
    parts = (t.dtype for t in (residual, vectors.layer_scale) if t is not None)
    dtype = reduce(torch.promote_types, parts, x.dtype)
    rounded = v.to(dtype)
    y = activated(widened(rounded) if options.want_sum else v, vectors, options)
    if shortcut is not None:
        y, dtype = y + shortcut, torch.promote_types(dtype, shortcut.dtype)
    return y.to(dtype), rounded
