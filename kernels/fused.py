"""The operator together with what stands around it: one call for norm, sum, norm, threshold, activation and sum.

    v = (x * scale + shift) * layer_scale + residual,   u = v * norm_scale + norm_shift,   y = act(s(u)) + shortcut

Every factor is optional; v is a second result where others read it too. Only x, or v, and the residual are kept for
backward; where u is v and a ReLU's gradient can be told from its result, that result alone. Norms and LayerScale are
frozen: their gradients do not exist here. The shortcut's gradient is y's own tensor.

Floor 0: torch and, lazily through the CUDA lowering, triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled, composed, ops, traced
from .records import Options, Vectors, options_of
from .reference import ACTIVATIONS

_library = torch.library.Library("meansparse", "FRAGMENT")
_TAIL = "int channel_dim, str activation, float[] constants, str variant, str backward, float steepness, bool want_sum"
_library.define(f"fused(Tensor x, Tensor? residual, Tensor? shortcut, Tensor?[] vectors, {_TAIL}) -> (Tensor, Tensor)")
_library.define(
    f"fused_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? residual, Tensor?[] vectors, {_TAIL})"
    " -> (Tensor, Tensor, Tensor)"
)


def _lowering(x: Tensor, vectors: Vectors, options: Options) -> str:
    """Return what computes the operator on x: ``triton``, ``compiled`` or ``eager``."""
    where = ops.lowering_of(x, options.channel_dim, vectors.weight)
    # Inductor would keep v in float32 where others see it rounded.
    return "eager" if where == "compiled" and x.dtype not in (torch.float32, torch.float64) else where


def _triton_forward(x, residual, shortcut, vectors, options):
    from .launch import mean_sparse_forward  # imports triton, which a CPU does without

    results = mean_sparse_forward(x, vectors, options, residual, shortcut)
    return results if options.want_sum else (results, x.new_empty(0))


def _triton_backward(grad, grad_sum, x, residual, vectors, options):
    from .launch import mean_sparse_backward

    found = mean_sparse_backward(grad, x, vectors, options, residual, grad_sum, want_grad_sum=residual is not None)
    grad_residual = x.new_empty(0) if residual is None else found.v
    return found.x, grad_residual, x.new_empty(0) if found.weight is None else found.weight


def _compiled_forward(x, residual, shortcut, vectors, options):
    options = options._replace(backward="exact")  # which values do not depend on
    return tuple(compiled.on_views(composed.forward, (x, residual, shortcut), x, vectors, options))


def _compiled_backward(grad, grad_sum, x, residual, vectors, options):
    return tuple(compiled.on_views(composed.backward, (grad, grad_sum, x, residual), x, vectors, options))


_FORWARD = {"triton": _triton_forward, "compiled": _compiled_forward, "eager": composed.forward}
_BACKWARD = {"triton": _triton_backward, "compiled": _compiled_backward, "eager": composed.backward}


def _forward(x, residual, shortcut, vectors, *options):
    vectors, options = Vectors(*vectors), options_of(*options)
    return _FORWARD[_lowering(x, vectors, options)](x, residual, shortcut, vectors, options)


def _backward(grad, grad_sum, x, residual, vectors, *options):
    vectors, options = Vectors(*vectors), options_of(*options)
    return _BACKWARD[_lowering(x, vectors, options)](grad, grad_sum, x, residual, vectors, options)


_library.impl("fused", _forward, "CompositeExplicitAutograd")
_library.impl("fused_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("meansparse::fused", lib=_library)
def _(x, residual, shortcut, vectors, *options):
    return torch.empty_like(x), torch.empty_like(x) if Options(*options).want_sum else x.new_empty(0)


@torch.library.register_fake("meansparse::fused_backward", lib=_library)
def _(grad, grad_sum, x, residual, vectors, *options):
    weight = Vectors(*vectors).weight
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), grad_weight


def _told_by_result(x: Tensor, shortcut: Tensor | None, vectors: Vectors, options: Options) -> bool:
    """Return whether backward needs y alone, which the next convolution keeps anyway.

    y then stands for v. In half precision it is rounded, which could take it to the other side of the band's edge.
    """
    plain = shortcut is None and vectors.norm_scale is None and not options.want_sum
    row = ACTIVATIONS[options.activation]
    exact = x.dtype in (torch.float32, torch.float64)
    return plain and exact and row.keeps_result and traced.tells(options.activation, options.variant, options.backward)


class _Fused(torch.autograd.Function):
    """Keeps x and the residual, or what stands for their sum; backward computes everything else again."""

    @staticmethod
    def forward(ctx, x, residual, shortcut, weight, vectors, options):
        if ops.nobody_looks_on(x):
            y, v = _forward(x, residual, shortcut, vectors, *options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, v = torch.ops.meansparse.fused.default(x, residual, shortcut, vectors, *options)
        ctx.set_materialize_grads(False)
        ctx.want_sum, ctx.has_residual = options.want_sum, residual is not None
        kept = (v,) if options.want_sum else (x, residual)
        if _told_by_result(x, shortcut, vectors, options):
            kept, options = (y,), options._replace(want_sum=True)
            if options.backward == "identity":  # y tells the slope at s(u); a band around it would ask again
                options = options._replace(variant="none")
        ctx.options = options  # with want_sum: of v, not of x and the residual
        ctx.given = [vector is not None for vector in vectors]
        held = [vector for vector in vectors if vector is not None]
        ctx.save_for_backward(*kept, *held)
        return y, v

    @staticmethod
    def backward(ctx, grad, grad_sum):
        grad_shortcut = grad if ctx.needs_input_grad[2] else None
        if not any(ctx.needs_input_grad[i] for i in (0, 1, 3)):
            return None, None, grad_shortcut, None, None, None
        saved = iter(ctx.saved_tensors)
        x = next(saved)
        residual = x if ctx.options.want_sum and ctx.has_residual else None
        if not ctx.options.want_sum:
            residual = next(saved)
        vectors = [next(saved) if given else None for given in ctx.given]
        if grad is None:
            grad = torch.zeros_like(x)
        if not ctx.want_sum:
            grad_sum = None
        plain = ops.nobody_looks_on(grad) and not torch.is_grad_enabled()
        run = _backward if plain else torch.ops.meansparse.fused_backward.default
        grad_x, grad_residual, grad_weight = run(grad, grad_sum, x, residual, vectors, *ctx.options)
        grad_residual = grad_residual if ctx.has_residual else None
        grad_weight = None if Vectors(*vectors).weight is None else grad_weight
        return grad_x, grad_residual, grad_shortcut, grad_weight, None, None


def _autograd(x, residual, shortcut, vectors, *options):
    vectors, options = Vectors(*vectors), options_of(*options)
    if ops.wants_gradient(x, residual, shortcut, vectors.weight):
        return _Fused.apply(x, residual, shortcut, vectors.weight, vectors, options)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.meansparse.fused.default(x, residual, shortcut, vectors, *options)


_library.impl("fused", _autograd, "Autograd")


def fused(
    x: Tensor, residual: Tensor | None, shortcut: Tensor | None, vectors: Vectors, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y, or y and v where ``options.want_sum`` says so, in the dtype and memory format of x.

    Args:
        x: ``[..., C, ...]``, any floating dtype; float16 and bfloat16 are computed in float32.
        residual: Of x's dtype, and its shape or one that broadcasts to it; added before the operator.
        shortcut: Likewise; added behind it.
        vectors: Per channel.
        options: Everything else.
    """
    if not ops.nobody_looks_on(x):
        y, v = torch.ops.meansparse.fused.default(x, residual, shortcut, list(vectors), *options)
    elif ops.wants_gradient(x, residual, shortcut, vectors.weight):
        y, v = _Fused.apply(x, residual, shortcut, vectors.weight, vectors, options)
    else:
        y, v = _forward(x, residual, shortcut, vectors, *options)
    return (y, v) if options.want_sum else y
