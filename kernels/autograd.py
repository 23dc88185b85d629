"""The operator's derivative: what is kept for backward, and what backward does with it.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import composition, reference
from .composition import Wanted
from .lowering import is_observed
from .records import Vectors

if TYPE_CHECKING:
    from .operator import Call


class _MeanSparse(torch.autograd.Function):
    """Keeps what `Operator.kept_for_backward` says, and the weight; backward computes everything else again.

    A ReLU's result is kept in the place of its input, as torch does: the next convolution keeps the same tensor. The
    other vectors stay with the operator, and backward asks whether they are unchanged: keeping them as well would take
    3 microseconds of a call.
    """

    @staticmethod
    def forward(ctx, call, x, residual=None, shortcut=None, weight=None):
        vectors, source = call.operator.vectors, call.source
        y, v = call.forward(x, residual, shortcut)
        kept = y if source == "result" else x if source == "input" else v
        if residual is None and weight is None:
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(kept, residual if source == "input" else None, weight)
        ctx.call, ctx.version = call, _version(vectors)
        if v is None:
            return y
        ctx.set_materialize_grads(False)
        return y, v

    @staticmethod
    def backward(ctx, grad, grad_sum=None):
        call, saved, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad
        vectors, x, residual = call.operator.vectors, saved[0], None
        if _version(vectors) != ctx.version:
            raise RuntimeError(
                "alpha, statistics, a norm or a LayerScale were changed between a forward pass and its backward: set "
                "them before, or run the forward pass again"
            )
        observed = torch.is_grad_enabled() or is_observed(grad, grad_sum)
        run = functools.partial(_differentiate, call) if observed else call.backward
        if len(needed) == 2 and grad is not None:
            return None, run(vectors, x, grad, grad_sum, None, _X_ALONE)[0]
        if grad is None:
            grad = torch.zeros_like(x)
        if len(saved) > 1:
            _, residual, weight = saved
            vectors = vectors._replace(weight=weight)
        return _gradients(needed, grad, vectors, lambda wanted: run(vectors, x, grad, grad_sum, residual, wanted))


def _version(vectors: Vectors) -> int:
    """Return what tells whether the band, or a norm or a LayerScale, was changed since."""
    version = vectors.centre._version + vectors.threshold._version
    if vectors.scaled or vectors.has_sum_norm:
        version += sum([v._version for v in vectors[3:] if v is not None and not v.is_inference()])
    return version


# Past Function.apply in Python, whose questions `Operator.__call__` answers: 1.2 microseconds.
apply = super(torch.autograd.Function, _MeanSparse).apply
_X_ALONE = Wanted()


class MeanSparseForCompilers(torch.autograd.Function):
    """The same of the composition. Compilers see what is kept and nothing else, so all vectors are kept."""

    @staticmethod
    def forward(ctx, operator, x, residual, shortcut, weight):
        y, v = operator.forward(x, residual, shortcut)
        source = operator.kept_for_backward(x.dtype, residual is not None, shortcut is not None)
        kept = [y if source == "result" else x if source == "input" else v]
        ctx.operator, ctx.source, ctx.keeps_residual = operator, source, source == "input" and residual is not None
        if ctx.keeps_residual:
            kept.append(residual)
        ctx.save_for_backward(*kept, *[vector for vector in operator.vectors if vector is not None])
        if v is None:
            return y
        ctx.set_materialize_grads(False)
        return y, v

    @staticmethod
    def backward(ctx, grad, grad_sum=None):
        operator, saved = ctx.operator, list(ctx.saved_tensors)  # `x, *saved =` is a tuple to Dynamo of torch 2.11
        x = saved.pop(0)
        options, from_sum = operator.for_backward(ctx.source)
        residual = saved.pop(0) if ctx.keeps_residual else None
        vectors = Vectors(*[None if v is None else saved.pop(0) for v in operator.vectors])
        if grad is None:
            grad = torch.zeros_like(x)
        return _gradients(
            ctx.needs_input_grad,
            grad,
            vectors,
            lambda wanted: composition.backward(x, grad, grad_sum, residual, vectors, options, from_sum, wanted),
        )


def _gradients(
    needed: Sequence[bool], grad: Tensor, vectors: Vectors, backward: Callable[[Wanted], Sequence[Tensor | None]]
) -> tuple[Tensor | None, ...]:
    """Return what a Function's backward returns, for the inputs operator, x, residual, shortcut and weight."""
    _, want_x, want_residual, want_shortcut, want_weight = *needed, *[False] * (5 - len(needed))
    grad_x = grad_v = grad_weight = None
    if want_x or want_residual or want_weight:
        grad_x, grad_v, *rest = backward(Wanted(want_residual and vectors.scaled, want_weight))
        grad_weight = rest[0] if rest else None  # kernels, which compute none, leave its place out
    grad_residual = None
    if want_residual:
        grad_residual = grad_v if vectors.scaled else grad_x
    found = None, grad_x, grad_residual, grad if want_shortcut else None, grad_weight
    return found[: len(needed)]


def _differentiate(
    call: Call,
    vectors: Vectors,
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor | None,
    residual: Tensor | None,
    wanted: Wanted,
) -> Sequence[Tensor | None]:
    """Return the gradients as `Call.backward` does, by differentiating the reference: themselves differentiable."""
    operator, source = call.operator, call.source
    options, dim = operator.options, operator.options.channel_dim
    if source == "result":  # whose derivative by y is zero wherever there is one
        options, from_sum = operator.for_backward(source)
        return composition.backward(x.detach(), grad, None, None, vectors, options, from_sum, wanted)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, residual, weight = _alias(x), _alias(residual), _alias(vectors.weight)
        v = reference.residual_sum(x, residual, vectors, options) if source == "input" else reference.widened(x)
        y = reference.activated(v, vectors._replace(weight=weight), options)
        leaves = [v, weight] if wanted.weight else [v]
        grad_v, *grad_weight = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=again)
        if grad_sum is not None:
            grad_v = grad_v + grad_sum
        scales = vectors.layer_scale, reference.folded(vectors, options).input_weight
        grad_x = reference.scaled(reference.scaled(grad_v, scales[0], dim), scales[1], dim)
    return grad_x.to(x.dtype), grad_v.to(x.dtype), grad_weight[0] if wanted.weight else None


def _alias(t: Tensor | None) -> Tensor | None:
    """Return t as another node of the graph, so that a gradient by it does not take in those of what it was made of."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
