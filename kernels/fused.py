"""The operator together with what stands before it: one call for norm, sum, norm, threshold and activation.

    v = (x * scale + shift) * layer_scale + residual,   u = v * norm_scale + norm_shift,   y = act(s(u))

Every factor is optional; v is a second result where others read it too. Only x, or v, and the residual are kept for
backward. The norms are frozen: their gradients do not exist here.

Floor 0: torch and, lazily through the CUDA lowering, triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled, eager, ops
from .reference import per_channel


class Vectors(NamedTuple):
    """The per-channel arguments ``[C]``, in the units of what they are applied to; None is left out.

    Attributes:
        centre, threshold: The band, in the units of u.
        weight: The activation's learned slope, ``[C]`` or ``[1]``.
        scale, shift: Of a frozen norm of x.
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
    """Everything else, as `reference.mean_sparse` has it, and whether v is wanted."""

    channel_dim: int
    activation: str = "identity"
    constants: tuple[float, ...] = ()
    variant: str = "mean"
    backward: str = "exact"
    steepness: float = 10.0
    want_sum: bool = False


# The composition in torch operators, which the CPU's compiled kernels are compiled from.


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _affine(v: Tensor, scale: Tensor | None, shift: Tensor | None, channel_dim: int) -> Tensor:
    scale, shift = (None if p is None else per_channel(p.to(v.dtype), v.dim(), channel_dim) for p in (scale, shift))
    if scale is not None and shift is not None:
        return torch.addcmul(shift, v, scale)
    return v if scale is None else v * scale


def _sum(x: Tensor, residual: Tensor | None, vectors: Vectors, channel_dim: int) -> Tensor:
    """Return v in the computing dtype."""
    v = _affine(x, vectors.scale, vectors.shift, channel_dim)
    v = _affine(v, vectors.layer_scale, None, channel_dim)
    return v if residual is None else v + residual


def forward(x: Tensor, residual: Tensor | None, vectors: Vectors, options: Options) -> tuple[Tensor, Tensor]:
    """Return y, and v (empty unless wanted), in the dtype and memory format of x."""
    dim, activation, constants, variant, _, steepness, want_sum = options
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    v = _sum(x.to(dtype), _wide(residual, dtype), vectors, dim)
    rounded = v.to(x.dtype)
    if want_sum:
        v = rounded.to(dtype)  # y is the function of exactly what others see
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    band = (vectors.centre, vectors.threshold, vectors.weight)
    y = eager.forward(u, *band, dim, activation, constants, variant, steepness).to(x.dtype)
    return y, (rounded if want_sum else x.new_empty(0))


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    vectors: Vectors,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the residual and of the weight, each empty where there is none.

    Args:
        grad: Of y.
        grad_sum: Of v, where that is a result that somebody read.
        x: As in `forward`; with ``want_sum`` the v that it returned.
        residual: As in `forward`; with ``want_sum`` only whether there is one counts.
    """
    dim, activation, constants, variant, mode, steepness, want_sum = options
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    v = x.to(dtype) if want_sum else _sum(x.to(dtype), _wide(residual, dtype), vectors, dim)
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    band = (vectors.centre, vectors.threshold, vectors.weight)
    grad_u, grad_weight = eager.backward(grad.to(dtype), u, *band, dim, activation, constants, variant, mode, steepness)
    grad_v = _affine(grad_u, vectors.norm_scale, None, dim)
    if grad_sum is not None:
        grad_v = grad_v + grad_sum
    grad_x = _affine(_affine(grad_v, vectors.layer_scale, None, dim), vectors.scale, None, dim)
    grad_x = grad_x.to(x.dtype)
    if residual is None:
        return grad_x, x.new_empty(0), grad_weight
    return grad_x, grad_v.to(x.dtype), grad_weight


# The CPU's compiled kernels: the same composition on views with the channels in the middle or innermost.


def _flat_forward(x, residual, *rest):
    *vectors, options = rest
    return forward(x, residual, Vectors(*vectors), options)


def _flat_backward(grad, grad_sum, x, residual, *rest):
    *vectors, options = rest
    return backward(grad, grad_sum, x, residual, Vectors(*vectors), options)


def _on_views(
    plain: Callable, tensors: Sequence[Tensor | None], x: Tensor, vectors: Vectors, options: Options
) -> Iterator[Tensor]:
    """Yield the results of a compiled function of tensors shaped like x, as views shaped like x."""
    dim = options.channel_dim
    flat = [None if t is None else compiled.flatten(compiled.laid_out_like(t.detach(), x), dim) for t in tensors]
    given = tuple(t is not None for t in (*tensors, *vectors))
    call = compiled.kernel(plain, options.activation, (x.dim() > 2, given), options._replace(channel_dim=1))
    with torch.no_grad():
        for result in call(*flat, *vectors):
            yield compiled.unflatten(result, x, dim) if result.numel() == x.numel() else result


def _compiled_forward(x, residual, vectors, options):
    return tuple(_on_views(_flat_forward, (x, residual), x, vectors, options))


def _compiled_backward(grad, grad_sum, x, residual, vectors, options):
    return tuple(_on_views(_flat_backward, (grad, grad_sum, x, residual), x, vectors, options))


# The Triton kernels.


def _triton_arguments(vectors: Vectors, options: Options) -> tuple[tuple, dict]:
    centre, threshold, weight, *_ = vectors
    band = (centre, threshold, options.channel_dim, options.activation, options.constants, weight)
    return band, dict(zip(Vectors._fields[3:], vectors[3:], strict=True))


def _triton_forward(x, residual, vectors, options):
    from .elementwise import mean_sparse_forward  # imports triton, which a CPU does without

    band, prologue = _triton_arguments(vectors, options)
    steepness, want_sum = options.steepness, options.want_sum
    results = mean_sparse_forward(
        x, *band, options.variant, steepness, residual=residual, want_sum=want_sum, **prologue
    )
    return results if want_sum else (results, x.new_empty(0))


def _triton_backward(grad, grad_sum, x, residual, vectors, options):
    from .elementwise import mean_sparse_backward

    band, prologue = _triton_arguments(vectors, options)
    found = mean_sparse_backward(
        grad, x, *band, options.variant, options.backward, options.steepness, residual=residual, grad_sum=grad_sum,
        from_sum=options.want_sum, want_grad_sum=residual is not None, **prologue,
    )  # fmt: skip
    grad_residual = x.new_empty(0) if residual is None else found.v
    return found.x, grad_residual, x.new_empty(0) if found.weight is None else found.weight


# What torch sees.

_library = torch.library.Library("meansparse", "FRAGMENT")
_TAIL = "int channel_dim, str activation, float[] constants, str variant, str backward, float steepness, bool want_sum"
_library.define(f"fused(Tensor x, Tensor? residual, Tensor?[] vectors, {_TAIL}) -> (Tensor, Tensor)")
_library.define(
    f"fused_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? residual, Tensor?[] vectors, {_TAIL})"
    " -> (Tensor, Tensor, Tensor)"
)


def _lowering(x: Tensor, vectors: Vectors, options: Options) -> str:
    """Return what computes the operator on x: ``triton``, ``compiled`` or ``eager``."""
    where = ops.lowering_of(x, options.channel_dim, vectors.weight)
    # Inductor would keep v in float32 where others see it rounded.
    return "eager" if where == "compiled" and x.dtype not in (torch.float32, torch.float64) else where


_FORWARD = {"triton": _triton_forward, "compiled": _compiled_forward, "eager": forward}
_BACKWARD = {"triton": _triton_backward, "compiled": _compiled_backward, "eager": backward}


def _forward(x, residual, vectors, *options):
    vectors, options = Vectors(*vectors), Options(*options)._replace(constants=tuple(options[2]))
    return _FORWARD[_lowering(x, vectors, options)](x, residual, vectors, options)


def _backward(grad, grad_sum, x, residual, vectors, *options):
    vectors, options = Vectors(*vectors), Options(*options)._replace(constants=tuple(options[2]))
    return _BACKWARD[_lowering(x, vectors, options)](grad, grad_sum, x, residual, vectors, options)


_library.impl("fused", _forward, "CompositeExplicitAutograd")
_library.impl("fused_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("meansparse::fused", lib=_library)
def _(x, residual, vectors, *options):
    return torch.empty_like(x), torch.empty_like(x) if Options(*options).want_sum else x.new_empty(0)


@torch.library.register_fake("meansparse::fused_backward", lib=_library)
def _(grad, grad_sum, x, residual, vectors, *options):
    weight = Vectors(*vectors).weight
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), grad_weight


class _Fused(torch.autograd.Function):
    """Keeps x and the residual, or v where it is a result anyway; backward computes everything else again."""

    @staticmethod
    def forward(ctx, x, residual, weight, vectors, options):
        with torch._C._AutoDispatchBelowAutograd():
            y, v = torch.ops.meansparse.fused.default(x, residual, vectors, *options)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.has_residual = options, residual is not None
        ctx.given = [vector is not None for vector in vectors]
        held = [vector for vector in vectors if vector is not None]
        ctx.save_for_backward(*((v,) if options.want_sum else (x, residual)), *held)
        return y, v

    @staticmethod
    def backward(ctx, grad, grad_sum):
        saved = iter(ctx.saved_tensors)
        x = next(saved)
        residual = x if ctx.options.want_sum and ctx.has_residual else None
        if not ctx.options.want_sum:
            residual = next(saved)
        vectors = [next(saved) if given else None for given in ctx.given]
        if grad is None:
            grad = torch.zeros_like(x)
        if not ctx.options.want_sum:
            grad_sum = None
        grad_x, grad_residual, grad_weight = torch.ops.meansparse.fused_backward.default(
            grad, grad_sum, x, residual, vectors, *ctx.options
        )
        has_weight = Vectors(*vectors).weight is not None
        return grad_x, grad_residual if ctx.has_residual else None, grad_weight if has_weight else None, None, None


def _autograd(x, residual, vectors, *options):
    vectors, options = Vectors(*vectors), Options(*options)
    wanted = any(t is not None and t.requires_grad for t in (x, residual, vectors.weight))
    if torch.is_grad_enabled() and wanted:
        return _Fused.apply(x, residual, vectors.weight, vectors, options)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.meansparse.fused.default(x, residual, vectors, *options)


_library.impl("fused", _autograd, "Autograd")


def fused(x: Tensor, residual: Tensor | None, vectors: Vectors, options: Options) -> Tensor | tuple[Tensor, Tensor]:
    """Return y, or y and v where ``options.want_sum`` says so, in the dtype and memory format of x.

    Args:
        x: ``[..., C, ...]``, any floating dtype; float16 and bfloat16 are computed in float32.
        residual: Of x's shape and dtype.
        vectors: Per channel.
        options: Everything else.
    """
    y, v = torch.ops.meansparse.fused.default(x, residual, list(vectors), *options)
    return (y, v) if options.want_sum else y
