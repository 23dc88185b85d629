"""The operator as everybody calls it: vectors and options bound and checked once, autograd, and who runs it.

`Operator` is a call of the operator but for its tensors. The first call with tensors of one layout finds out what runs
them (a Triton launch, a loop compiled for the CPU, or torch operators) and keeps it; the next ones look it up. There is
no operator of a `torch.library` behind it: its dispatch cost 40 microseconds a call, and whoever wants to see, count or
transform a call is better served by the reference, which is made of torch's own operators.

Floor 0: torch and, lazily where a kernel is launched, triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from . import compiled, composition, layout, reference
from .composition import Wanted
from .records import Options, Vectors

Results = tuple[Tensor, Tensor | None]  # y, and v if it is wanted

_PLAIN = (Tensor, Parameter)
_LIMIT = 4096  # of layouts kept, for a model that sees ever new ones

# What runs a call, by all it depends on. An `Operator` keeps those that it used, under fewer words.
_RUNNERS: dict[Hashable, Callable] = {}


def lowering() -> str:
    """Return the lowering asked for by MEANSPARSE_FX_LOWERING: ``auto`` (default), ``triton`` or ``eager``."""
    choice = os.environ.get("MEANSPARSE_FX_LOWERING", "auto")
    if choice not in ("auto", "triton", "eager"):
        raise ValueError(f"MEANSPARSE_FX_LOWERING={choice!r}: expected auto, triton or eager")
    return choice


def lowering_of(x: Tensor, channel_dim: int, weight: Tensor | None = None, choice: str | None = None) -> str:
    """Return what computes the operator by itself on x: ``triton``, ``compiled`` or ``eager``."""
    choice = choice or lowering()
    if choice == "triton" or (choice == "auto" and x.is_cuda and x.dtype in layout.DTYPES):
        return "triton"
    if choice == "auto" and x.device.type == "cpu" and compiled.takes(x, channel_dim, weight):
        return "compiled"
    return "eager"


def is_observed(x: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None) -> bool:
    """Return whether somebody observes or transforms what is done with these: a transform of torch.func, forward-mode
    differentiation, a mode, a tracer, a subclass. Not a profiler, which changes nothing.
    """
    return (
        type(x) not in _PLAIN
        or (residual is not None and type(residual) not in _PLAIN)
        or (shortcut is not None and type(shortcut) not in _PLAIN)
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._is_torch_function_mode_enabled() and _function_mode_observes())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _function_mode_observes() -> bool:
    # torch.set_default_device is a mode, too.
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


class Operator:
    """The operator with its vectors and options.

    Args:
        vectors: Per channel, on one device. Their values may change; where one is another tensor, that is another
            Operator.
        options: Everything else.
        choice: Of the lowering, by default as `lowering` says at this moment; ``composition`` is what compilers get.

    Raises:
        ValueError: Unlike sizes or unknown options.
    """

    __slots__ = ("_backwards", "_forwards", "_sources", "choice", "options", "vectors")

    def __init__(self, vectors: Vectors, options: Options, choice: str | None = None) -> None:
        self.vectors, self.options = vectors, options
        self.choice = choice or lowering()
        self._forwards: dict[Hashable, Callable] = {}
        self._backwards: dict[Hashable, Callable] = {}
        self._sources: dict[Hashable, str] = {}
        # While torch.jit traces, sizes are tensors.
        if self.choice != "composition" and torch._C._get_tracing_state() is None:
            _check(vectors, options)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or y and v with ``options.want_sum``, in the dtype and memory format of x.

        Args:
            x: ``[..., C, ...]``, any floating dtype; float16 and bfloat16 are computed in float32.
            residual: Of x's shape, or one that broadcasts to it; added before the operator.
            shortcut: Likewise; added after it.
        """
        weight, composed = self.vectors.weight, self.choice == "composition"
        # Exported programs hold no autograd.Function. To Dynamo of torch 2.11 is_exporting() is true always.
        by_reference = torch.compiler._is_exporting_flag if composed else is_observed(x, residual, shortcut)
        if by_reference or self._promotes(x.dtype, residual, shortcut):
            y, v = reference.operator(x, residual, shortcut, self.vectors, self.options)
        elif not (
            torch.is_grad_enabled()
            and (
                x.requires_grad
                or (residual is not None and residual.requires_grad)
                or (shortcut is not None and shortcut.requires_grad)
                or (weight is not None and weight.requires_grad)
            )
        ):
            y, v = self.forward(x, residual, shortcut)
        elif composed:
            return _MeanSparse.apply(self, x, residual, shortcut, weight)
        elif residual is None and shortcut is None and weight is None:
            return _apply(self, x)
        else:
            return _apply(self, x, residual, shortcut, weight)
        return (y, v) if self.options.want_sum else y

    def forward(self, x: Tensor, residual: Tensor | None, shortcut: Tensor | None) -> Results:
        """Return y and v, below autograd."""
        if self.choice == "composition":
            return composition.forward(x, residual, shortcut, self.vectors, self.options)
        case = x.shape, x.stride(), x.dtype, x.device, torch.get_num_threads()
        if residual is not None or shortcut is not None:
            case = (*case, *_described(residual), *_described(shortcut))
        run = self._forwards.get(case)
        if run is None:
            run = self._runner(self._forwards, case, _forward_runner, (x, residual, shortcut))
        return run(self.vectors, x, residual, shortcut)

    def backward(
        self,
        vectors: Vectors,
        grad: Tensor,
        grad_sum: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        source: str,
        want_sum: bool,
        want_weight: bool,
    ) -> Sequence[Tensor | None]:
        """Return the gradients of x, v and the weight from what `kept_for_backward` names, below autograd.

        Args:
            vectors: As they were kept.
            grad, grad_sum: Of y; of v, where that is a result that somebody read.
            x: What was kept; the residual beside it.
            want_sum, want_weight: Whether anybody wants those of v and of the weight.
        """
        if self.choice == "composition":
            options, from_sum = self._for_backward(source)
            wanted = Wanted(want_sum, want_weight)
            return composition.backward(grad, grad_sum, x, residual, vectors, options, from_sum, wanted)
        case = (
            x.shape, x.stride(), x.dtype, x.device, torch.get_num_threads(),
            grad.stride(), grad.dtype, source, want_sum, want_weight,
        )  # fmt: skip
        if residual is not None or grad_sum is not None:
            case = (*case, *_described(residual), *_described(grad_sum))
        run = self._backwards.get(case)
        if run is None:
            rest = *self._for_backward(source), Wanted(want_sum, want_weight)
            run = self._runner(self._backwards, case, _backward_runner, (grad, grad_sum, x, residual), *rest)
        return run(vectors, grad, grad_sum, x, residual)

    def kept_for_backward(self, dtype: torch.dtype, has_residual: bool, has_shortcut: bool) -> str:
        """Return what backward is computed from: the ``input`` (and the residual), the ``sum`` v, or the ``result`` y.

        Args:
            dtype: Of x.
        """
        case = dtype, has_residual, has_shortcut
        found = self._sources.get(case)
        if found is None:
            found = self._sources[case] = self._source(*case)
        return found

    def _source(self, dtype: torch.dtype, has_residual: bool, has_shortcut: bool) -> str:
        options, vectors = self.options, self.vectors
        if options.want_sum:
            return "sum"
        # Compilers keep what they like, and the next convolution keeps y.
        likes_result = self.choice == "composition" or reference.ACTIVATIONS[options.activation].result_is_kept
        if has_shortcut or not likes_result:
            return "input"
        # y then stands for u, which is v. In half precision y is rounded and v was not: that could take it to the
        # other side of the band's edge, unless x itself is u.
        x_is_u = not has_residual and all(vector is None for vector in vectors.before)
        unrounded = x_is_u or dtype in (torch.float32, torch.float64)
        plain = vectors.norm_scale is None and composition.gradient_from_result(options)
        return "result" if plain and unrounded else "input"

    def _for_backward(self, source: str) -> tuple[Options, bool]:
        """Return the options of a backward from what was kept, and whether that stands for v."""
        if source == "result" and self.options.backward == "identity":
            # y tells the slope at s(u); a band around it would ask again.
            return self.options._replace(variant="none"), True
        return self.options, source != "input"

    def versions(self) -> tuple[int, ...]:
        """Return what tells whether the band, or a LayerScale, was changed since."""
        vectors = self.vectors
        if vectors.layer_scale is None:
            return vectors.centre._version, vectors.threshold._version
        return vectors.centre._version, vectors.threshold._version, vectors.layer_scale._version

    def _promotes(self, dtype: torch.dtype, residual: Tensor | None, shortcut: Tensor | None) -> bool:
        """Return whether the results are of another dtype than x, or of several, as autocast makes them."""
        scale = self.vectors.layer_scale
        if residual is None and shortcut is None and scale is None:
            return False
        return (
            (residual is not None and residual.dtype != dtype)
            or (shortcut is not None and shortcut.dtype != dtype)
            or (scale is not None and scale.dtype != dtype)
        )

    def _runner(self, known: dict, case: Hashable, make: Callable, tensors: tuple, *rest: Any) -> Callable:
        """Return what runs calls of these tensors, and remember it."""
        given = tuple(_given(v) for v in self.vectors)
        key = make, self.options, self.choice, given, case, *rest
        run = _RUNNERS.get(key)
        if run is None:
            if len(_RUNNERS) >= _LIMIT:
                _RUNNERS.clear()
            run = _RUNNERS[key] = make(self, *tensors, *rest)
        if len(known) >= _LIMIT:
            known.clear()
        known[case] = run
        return run


def _described(t: Tensor | None) -> tuple:
    return (None,) if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _given(vector: Tensor | None) -> Hashable:
    return None if vector is None else (vector.shape, vector.stride(), vector.dtype, vector.device)


def _check(vectors: Vectors, options: Options) -> None:
    """Raise ValueError unless a kernel can read all of the vectors and knows all of the options."""
    if options.activation not in reference.ACTIVATIONS:
        raise ValueError(f"no activation {options.activation!r}: one of {', '.join(reference.ACTIVATIONS)}")
    for name, known in (("variant", reference.VARIANTS), ("backward", reference.BACKWARDS)):
        if getattr(options, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(options, name)!r}")
    channels = vectors.centre.numel()
    for name, vector in zip(Vectors._fields, vectors, strict=True):
        if vector is not None and vector.numel() != channels and not (name == "weight" and vector.numel() == 1):
            raise ValueError(f"{name} has {vector.numel()} elements for {channels} channels")


def _forward_runner(
    operator: Operator, x: Tensor, residual: Tensor | None, shortcut: Tensor | None
) -> Callable[..., Results]:
    """Return ``(vectors, x, residual, shortcut) -> (y, v)`` for tensors like these."""
    options = operator.options
    _check_tensors(x, residual, shortcut, operator)
    where, run = _lowering(operator, x), None
    if where == "triton":
        from . import launch  # imports triton, which a CPU does without

        run = launch.forward_runner(operator.vectors, options, x, residual, shortcut)
    elif where == "compiled":
        run = compiled.forward_runner(operator.vectors, options, x, residual, shortcut)
    return run or (lambda vectors, x, residual, shortcut: composition.forward(x, residual, shortcut, vectors, options))


def _backward_runner(
    operator: Operator,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    options: Options,
    from_sum: bool,
    wanted: Wanted,
) -> Callable[..., Sequence[Tensor | None]]:
    """Return ``(vectors, grad, grad_sum, x, residual) -> gradients`` for tensors like these."""
    where, run, tensors = _lowering(operator, x), None, (grad, grad_sum, x, residual)
    # The gradient of a learned slope is torch's: it takes a sum over all other dimensions.
    if where == "triton" and not wanted.weight:
        from . import launch

        run = launch.backward_runner(operator.vectors, options, *tensors, from_sum, wanted)
    elif where == "compiled":
        run = compiled.backward_runner(operator.vectors, options, *tensors, from_sum, wanted)
    return run or (lambda vectors, *tensors: composition.backward(*tensors, vectors, options, from_sum, wanted))


def _lowering(operator: Operator, x: Tensor) -> str:
    """Return what computes the operator on x: ``triton``, ``compiled`` or ``eager``."""
    dim, weight = operator.options.channel_dim, operator.vectors.weight
    where = lowering_of(x, dim, weight, operator.choice) if x.numel() else "eager"
    # Inductor would keep v in float32 where others see it rounded.
    rounds = operator.options.want_sum and x.dtype not in (torch.float32, torch.float64)
    return "eager" if where == "compiled" and rounds else where


def _check_tensors(x: Tensor, residual: Tensor | None, shortcut: Tensor | None, operator: Operator) -> None:
    """Raise ValueError unless a kernel can read all that belongs to x."""
    channels, dim = operator.vectors.centre.numel(), operator.options.channel_dim
    if x.shape[dim] != channels:
        raise ValueError(f"x has {x.shape[dim]} channels at dim {dim}, the operator {channels}")
    for t in (residual, shortcut, *operator.vectors):
        if t is not None and t.device != x.device:
            raise ValueError(f"x is on {x.device}, and what belongs to it on {t.device}: move the model or the images")
    for t in (residual, shortcut):
        if t is not None:
            layout.expanded_to(t, x.shape)


class _MeanSparse(torch.autograd.Function):
    """Keeps what `Operator.kept_for_backward` says, and the weight; backward computes everything else again.

    A ReLU's result is kept in the place of its input, as torch does: the next convolution keeps the same tensor. The
    other vectors stay with the operator, and backward asks whether they are unchanged: keeping them as well would take
    3 microseconds of a call. Compilers see what is kept and nothing else, so there they are.
    """

    @staticmethod
    def forward(ctx, operator, x, residual=None, shortcut=None, weight=None):
        y, v = operator.forward(x, residual, shortcut)
        source = operator.kept_for_backward(x.dtype, residual is not None, shortcut is not None)
        kept = y if source == "result" else v if source == "sum" else x
        ctx.operator, ctx.source = operator, source
        ctx.keeps_residual = source == "input" and residual is not None
        if operator.choice == "composition":
            vectors = [vector for vector in operator.vectors if vector is not None]
            ctx.save_for_backward(kept, *([residual] if ctx.keeps_residual else []), *vectors)
        else:
            ctx.versions = operator.versions()
            if residual is None and weight is None:
                ctx.save_for_backward(kept)
            else:
                ctx.save_for_backward(kept, residual if ctx.keeps_residual else None, weight)
        if v is None:
            return y
        ctx.set_materialize_grads(False)
        return y, v

    @staticmethod
    def backward(ctx, grad, grad_sum=None):
        operator, source, needed = ctx.operator, ctx.source, ctx.needs_input_grad
        want_sum = want_weight = False
        grad_shortcut = residual = None
        saved, vectors = ctx.saved_tensors, operator.vectors
        x = saved[0]
        if len(needed) > 2:
            _, want_x, want_sum, want_shortcut, want_weight = needed
            grad_shortcut = grad if want_shortcut else None
            if not (want_x or want_sum or want_weight):
                return None, None, None, grad_shortcut, None
        if grad is None:
            grad = torch.zeros_like(x)
        if operator.choice == "composition":
            residual = saved[1] if ctx.keeps_residual else None
            kept = iter(saved[2 if ctx.keeps_residual else 1 :])
            vectors = Vectors(*[None if v is None else next(kept) for v in vectors])
            run = Operator.backward
        else:
            if operator.versions() != ctx.versions:
                raise RuntimeError(
                    "alpha, statistics or a LayerScale were changed between a forward pass and its backward: set them "
                    "before, or run the forward pass again"
                )
            if len(saved) > 1:
                _, residual, weight = saved
                if weight is not None:
                    vectors = vectors._replace(weight=weight)
            run = _differentiate if torch.is_grad_enabled() or is_observed(grad, grad_sum) else Operator.backward
        grad_x, grad_v, grad_weight = run(operator, vectors, grad, grad_sum, x, residual, source, want_sum, want_weight)
        return None, grad_x, grad_v if want_sum else None, grad_shortcut, grad_weight


# Past Function.apply in Python, whose questions `Operator.__call__` answers: 1.2 microseconds.
_apply = super(torch.autograd.Function, _MeanSparse).apply


def _differentiate(
    operator: Operator,
    vectors: Vectors,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    source: str,
    want_sum: bool,
    want_weight: bool,
) -> Sequence[Tensor | None]:
    """Return the gradients as `Operator.backward` does, by differentiating the reference: themselves differentiable."""
    options, dim = operator.options, operator.options.channel_dim
    if source == "result":  # whose derivative by y is zero wherever there is one
        options, from_sum = operator._for_backward(source)
        return composition.backward(grad, None, x.detach(), None, vectors, options, from_sum, Wanted(want_sum))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, residual, weight = _alias(x), _alias(residual), _alias(vectors.weight)
        v = reference.widened(x)
        if source == "input":
            v = reference.residual_sum(x, residual, vectors, dim)
        y = reference.activated(v, vectors._replace(weight=weight), options)
        leaves = [v, weight] if want_weight else [v]
        grad_v, *grad_weight = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=again)
        if grad_sum is not None:
            grad_v = grad_v + grad_sum
        grad_x = reference.affine(reference.affine(grad_v, vectors.layer_scale, None, dim), vectors.scale, None, dim)
    return grad_x.to(x.dtype), grad_v.to(x.dtype), grad_weight[0] if want_weight else None


def _alias(t: Tensor | None) -> Tensor | None:
    """Return t as another node of the graph, so that a gradient by it does not take in those of what it was made of."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
