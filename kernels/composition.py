"""The operator and its gradient as torch operators: what compilers get, what the CPU's kernels are compiled from, and
what small tensors run as it is.

Runs below autograd. On a CPU every fresh large buffer costs its page faults, so the band test and the activation work
in place of one scratch tensor. For compilers, AOTAutograd's partitioner decides what is kept for backward. Left to
autograd, `reference.operator` makes it keep boolean masks beside x: a comparison of two tensors counts as a reduction
there (its output has a quarter of the bytes and less), and reductions are never computed again. Masks are dear: on a
CPU with AVX2, Inductor takes 20 ns to store one boolean and 5 ns to load it, where computing it again from x takes less
than 1 ns. So what follows compares with numbers only, and a gradient that follows from the result is computed from it,
which the next convolution keeps anyway. Then nothing is kept that the base model does not keep.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .records import Options, Vectors
from .reference import (
    ACTIVATIONS,
    folded,
    normed,
    parameters,
    residual_sum,
    scaled,
    shaped,
    smooth_gate,
    smooth_gate_derivative,
    widened,
)


class Gradients(NamedTuple):
    """What backward computes: the gradients of x, of the sum v (the residual's) and of the learned slope."""

    x: Tensor
    v: Tensor | None = None
    weight: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients backward is asked for, besides that of x; of v only where it is another than x's."""

    v: bool = False
    weight: bool = False


def gradient_from_output(options: Options) -> bool:
    """Return whether the gradient of act(s(u)) follows from the result y as well as from u.

    Where the band becomes its centre: y is u outside the band where the slope is one; elsewhere y is the activation of
    the centre or a bound of the activation. All these lie where `backward` finds zero, in the exact mode, and give the
    slope at the centre, in the identity mode. No rounding: if any u is within the threshold of the centre, then the
    centre's nearest neighbour in the dtype of u is.
    """
    row = ACTIVATIONS[options.activation]
    return row.gradient_from_output and options.variant == "mean" and options.backward in ("exact", "identity")


def _inside(distance: Tensor, threshold: Tensor) -> Tensor:
    """Return the mask of the band; ``distance``, u - centre, is overwritten."""
    # a - b <= 0 is a <= b, exactly: a difference of floats is rounded to zero only if they are equal.
    if torch.compiler.is_compiling():
        return distance.abs() - threshold <= 0
    return distance.abs_().sub_(threshold) <= 0


def _sparsify(u: Tensor, centre: Tensor, threshold: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Return s(u) in a fresh tensor, or u itself without a band; and the mask of the band, if there was need of it."""
    if options.variant == "none":
        return u, None
    if options.variant == "smooth":
        return smooth_gate(u, centre, threshold, options.steepness), None
    scratch = u - centre
    inside = _inside(scratch, threshold)
    if options.variant == "edge":
        centre = torch.where(u < centre, centre - threshold, centre + threshold)
    out = None if torch.compiler.is_compiling() else scratch
    return torch.where(inside, centre, u, out=out), inside


def forward(
    x: Tensor, residual: Tensor | None, shortcut: Tensor | None, vectors: Vectors, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return y, and v if it is wanted, in the dtype and memory format of x; arguments as in `reference.operator`."""
    dim = options.channel_dim
    vectors = folded(vectors, options)
    v, rounded = residual_sum(x, residual, vectors, options), None
    if options.want_sum:
        rounded = _in_dtype(v, x.dtype)
        v = widened(rounded)  # y is the function of exactly what others see
    u = normed(v, vectors.sum_norm, options.sum_eps)
    centre, threshold, weight = (shaped(vector, u, dim) for vector in vectors[:3])
    s, _ = _sparsify(u, centre, threshold, options)
    row = ACTIVATIONS[options.activation]
    # Nothing in place, and nothing twice, for Dynamo: of an autograd.Function it puts out all tensors it makes, and in
    # torch 2.11 the gradient of one that is put out twice is lost.
    fresh = torch.compiler.is_compiling()
    overwrite = None if fresh else row.overwrite
    if not fresh and s.stride() != u.stride() and 0 not in u.stride():
        # u has gaps, a slice's. torch's vectorised loops round by how memory lies: with the same gaps, s gives the
        # bits that u would, and the result is dense again.
        s, overwrite = torch.empty_strided(u.shape, u.stride(), dtype=s.dtype, device=s.device).copy_(s), None
    y = (overwrite or row.forward)(s, *parameters(weight, options.constants))
    if shortcut is not None:
        y = y + shortcut if fresh else y.add_(shortcut)
    return _in_dtype(y, x.dtype), rounded


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in a dtype; the same tensor, and to Dynamo as well, if that is its own."""
    return t if t.dtype == dtype else t.to(dtype)


def backward(
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor | None,
    residual: Tensor | None,
    vectors: Vectors,
    options: Options,
    from_sum: bool = False,
    wanted: Wanted = Wanted(),  # noqa: B008, a tuple
) -> Gradients:
    """Return the gradients, everything but x and the residual computed again.

    Args:
        x, residual, vectors, options: As in `forward`.
        grad: Of y.
        grad_sum: Of v, where that is a result that somebody read.
        from_sum: x is not x but v, or what stands for v.
    """
    dim, vectors = options.channel_dim, folded(vectors, options)
    v = widened(x) if from_sum else residual_sum(x, residual, vectors, options)
    u = normed(v, vectors.sum_norm, options.sum_eps)
    grad_u, grad_weight = _activation_gradient(widened(grad), u, vectors, options, wanted.weight)
    grad_v = scaled(grad_u, vectors.sum_weight, dim)
    if grad_sum is not None:
        grad_v = grad_v + grad_sum
    grad_x = scaled(scaled(grad_v, vectors.layer_scale, dim), vectors.input_weight, dim).to(x.dtype)
    return Gradients(grad_x, grad_v.to(x.dtype) if wanted.v else None, grad_weight)


def _activation_gradient(
    grad: Tensor, u: Tensor, vectors: Vectors, options: Options, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of u and of the weight, of y = act(s(u))."""
    dim, row, steepness = options.channel_dim, ACTIVATIONS[options.activation], options.gate_steepness
    centre, threshold, weight = (shaped(vector, u, dim) for vector in vectors[:3])
    given = parameters(weight, options.constants)
    if options.variant == "none":
        return row.backward(grad, u, *given), None
    if options.backward == "exact" and steepness is None and not want_weight:
        # u in the place of s: they differ where the gradient is zero.
        inside = _inside(u - centre, threshold)
        if torch.compiler.is_compiling() or grad.stride() == u.stride():
            masked = torch.where(inside, 0.0, grad)
        else:  # keeps the layout of grad, for torch's loops round by it
            masked = grad.clone().masked_fill_(inside, 0.0)
        return row.backward(masked, u, *given), None
    s, inside = _sparsify(u, centre, threshold, options)
    grad_u = row.backward(grad, s, *given)
    if steepness is not None:
        grad_u = grad_u * smooth_gate_derivative(u, centre, threshold, steepness)
    elif options.backward == "exact":
        grad_u = torch.where(inside, 0.0, grad_u)
    if not want_weight:
        return grad_u, None
    per_element = row.weight_backward(grad, s, *given)
    kept = [dim] if vectors.weight.numel() != 1 else []
    total = per_element.sum([d for d in range(u.dim()) if d not in kept])
    return grad_u, total.view(vectors.weight.shape).to(vectors.weight.dtype)
