"""The operator as everybody calls it: vectors and options bound and checked once, and what runs each call.

`Operator` is a call of the operator but for its tensors. The first call with tensors of one layout finds out what runs
them (a Triton launch, a loop compiled for the CPU, or torch operators) and keeps it; the next ones look it up. There is
no operator of a `torch.library` behind it: its dispatch cost 40 microseconds a call, and whoever wants to see, count or
transform a call is better served by the reference, which is made of torch's own operators.

Floor 0: torch and, lazily where a kernel is launched, triton.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import compiled, composition, layout, reference
from .autograd import MeanSparseForCompilers, apply
from .composition import Wanted
from .lowering import is_observed, lowering, lowering_of
from .records import Options, Results, Runner, Vectors

_LIMIT = 4096  # of layouts kept, for a model that sees ever new ones

# What runs a call, by all it depends on. An `Operator` keeps those that it used, under fewer words.
_RUNNERS: dict[Hashable, Callable] = {}


class Operator:
    """The operator with its vectors and options.

    Args:
        vectors: Per channel, on one device. Their values may change; where one is another tensor, that is another
            Operator.
        choice: Of the lowering, by default as `lowering` says at this moment; ``composition`` is what compilers get.

    Raises:
        ValueError: Unlike sizes or unknown options.
    """

    __slots__ = ("_calls", "choice", "options", "vectors")

    def __init__(self, vectors: Vectors, options: Options, choice: str | None = None) -> None:
        self.vectors, self.options = vectors, options
        self.choice = choice or lowering()
        self._calls: dict[Hashable, Call] = {}
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
        vectors, composed = self.vectors, self.choice == "composition"
        weight, alone = vectors.weight, residual is None and shortcut is None
        # Exported programs hold no autograd.Function. To Dynamo of torch 2.11 is_exporting() is true always.
        by_reference = torch.compiler._is_exporting_flag if composed else is_observed(x, residual, shortcut)
        if by_reference or ((not alone or vectors.layer_scale is not None) and self._promotes(x, residual, shortcut)):
            y, v = reference.operator(x, residual, shortcut, vectors, self.options)
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
            return MeanSparseForCompilers.apply(self, x, residual, shortcut, weight)
        elif alone and weight is None:
            return apply(self.call_of(x), x)
        else:
            return apply(self.call_of(x, residual, shortcut), x, residual, shortcut, weight)
        return (y, v) if self.options.want_sum else y

    def forward(self, x: Tensor, residual: Tensor | None, shortcut: Tensor | None) -> Results:
        """Return y and v, below autograd."""
        if self.choice == "composition":
            return composition.forward(x, residual, shortcut, self.vectors, self.options)
        return self.call_of(x, residual, shortcut).forward(x, residual, shortcut)

    def kept_for_backward(self, dtype: torch.dtype, has_residual: bool, has_shortcut: bool) -> str:
        """Return what backward is computed from: the ``input`` (and the residual), the ``sum`` v, or the ``result`` y.

        Args:
            dtype: Of x.
        """
        options, vectors = self.options, self.vectors
        if options.want_sum:
            return "sum"
        # Compilers keep what they like, and the next convolution keeps y.
        likes_result = self.choice == "composition" or reference.ACTIVATIONS[options.activation].result_is_kept
        if has_shortcut or not likes_result:
            return "input"
        # y then stands for u, which is v. In half precision y is rounded and v was not: that could take it to the
        # other side of the band's edge, unless x itself is u.
        x_is_u = not has_residual and all(vector is None for vector in vectors[3:])
        unrounded = x_is_u or dtype in (torch.float32, torch.float64)
        plain = not vectors.has_sum_norm and composition.gradient_from_output(options)
        return "result" if plain and unrounded else "input"

    def for_backward(self, source: str) -> tuple[Options, bool]:
        """Return the options of a backward from what was kept, and whether that stands for v."""
        if source == "result" and self.options.backward == "identity":
            # y tells the slope at s(u); a band around it would ask again.
            return self.options._replace(variant="none"), True
        return self.options, source != "input"

    def _promotes(self, x: Tensor, residual: Tensor | None, shortcut: Tensor | None) -> bool:
        """Return whether the results are of another dtype than x, or of several, as autocast makes them."""
        return any(t is not None and t.dtype != x.dtype for t in (residual, shortcut, self.vectors.layer_scale))

    def call_of(self, x: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None) -> Call:
        """Return what is known of calls with tensors like these."""
        case: Hashable = x.shape, x.stride(), x.dtype, x.device
        if residual is not None or shortcut is not None:
            case = case, _described(residual), _described(shortcut)
        found = self._calls.get(case)
        if found is None:
            if len(self._calls) >= _LIMIT:
                self._calls.clear()
            run = _runner(self, case, _forward_runner, (x, residual, shortcut))
            source = self.kept_for_backward(x.dtype, residual is not None, shortcut is not None)
            found = self._calls[case] = Call(self, case, run, source)
        return found


class Call:
    """What is known of an operator's calls with tensors of one layout.

    Attributes:
        source: What backward is computed from; see `Operator.kept_for_backward`.
    """

    __slots__ = ("_backwards", "_case", "_forward", "operator", "source")

    def __init__(self, operator: Operator, case: Hashable, forward: Runner, source: str) -> None:
        self.operator, self._case, self._forward, self.source = operator, case, forward, source
        self._backwards: dict[Hashable, Callable] = {}

    def forward(self, x: Tensor, residual: Tensor | None, shortcut: Tensor | None) -> Results:
        """Return y and v, below autograd."""
        return self._forward(self.operator.vectors, x, residual, shortcut)

    def backward(
        self,
        vectors: Vectors,
        x: Tensor,
        grad: Tensor,
        grad_sum: Tensor | None,
        residual: Tensor | None,
        wanted: Wanted,
    ) -> Sequence[Tensor | None]:
        """Return the gradients of x and v, and of the weight if it is wanted, below autograd.

        Args:
            vectors: As they were kept.
            x: What was kept; the residual beside it.
            grad, grad_sum: Of y; of v, where that is a result that somebody read.
        """
        # autograd has seen to it that gradients are of the results' shape and dtype; hooks of what is kept may give it
        # back in another layout.
        case: Hashable = x.stride(), grad.stride(), wanted
        if residual is not None or grad_sum is not None:
            case = case, _described(residual), _described(grad_sum)
        run = self._backwards.get(case)
        if run is None:
            rest = *self.operator.for_backward(self.source), wanted
            tensors = x, grad, grad_sum, residual
            run = _runner(self.operator, (self._case, case), _backward_runner, tensors, *rest)
            self._backwards[case] = run
        return run(vectors, x, grad, grad_sum, residual)


def _runner(operator: Operator, case: Hashable, make: Callable, tensors: tuple, *rest: Any) -> Callable:
    """Return what runs calls of these tensors; one runner serves all operators that are alike."""
    given = tuple(_described(v) for v in operator.vectors)
    key = make, operator.options, operator.choice, given, case, *rest
    run = _RUNNERS.get(key)
    if run is None:
        if len(_RUNNERS) >= _LIMIT:
            _RUNNERS.clear()
        run = _RUNNERS[key] = make(operator, *tensors, *rest)
    return run


def _described(t: Tensor | None) -> tuple:
    return (None,) if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _check(vectors: Vectors, options: Options) -> None:
    """Raise ValueError unless a kernel can read all of the vectors and knows all of the options."""
    if options.activation not in reference.ACTIVATIONS:
        raise ValueError(f"no activation {options.activation!r}: one of {', '.join(reference.ACTIVATIONS)}")
    learned = reference.ACTIVATIONS[options.activation].weight_backward is not None
    if learned != (vectors.weight is not None):
        raise ValueError(f"{options.activation} takes {'a' if learned else 'no'} weight, a learned slope")
    for name, known in (("variant", reference.VARIANTS), ("backward", reference.BACKWARDS)):
        if getattr(options, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(options, name)!r}")
    if options.channel_dim != 1 and (vectors.has_input_norm or vectors.has_sum_norm):
        raise ValueError(f"batch norms have their channels at dim 1, the operator at dim {options.channel_dim}")
    channels = vectors.centre.numel()
    for name, vector in zip(Vectors._fields, vectors, strict=True):
        if vector is not None and vector.numel() != channels and not (name == "weight" and vector.numel() == 1):
            raise ValueError(f"{name} has {vector.numel()} elements for {channels} channels")


def _forward_runner(operator: Operator, x: Tensor, residual: Tensor | None, shortcut: Tensor | None) -> Runner:
    """Return ``(vectors, x, residual, shortcut) -> (y, v)`` for tensors like these."""
    _check_tensors(x, residual, shortcut, operator)
    options, fast = operator.options, _fast_lowering(operator, x)
    run = fast and fast.forward_runner(operator.vectors, options, x, residual, shortcut)
    return run or (lambda vectors, *tensors: composition.forward(*tensors, vectors, options))


def _backward_runner(
    operator: Operator,
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor | None,
    residual: Tensor | None,
    options: Options,
    from_sum: bool,
    wanted: Wanted,
) -> Callable[..., Sequence[Tensor | None]]:
    """Return ``(vectors, x, grad, grad_sum, residual) -> gradients`` for tensors like these."""
    # The gradient of a learned slope is torch's: it takes a sum over all other dimensions.
    fast = None if wanted.weight else _fast_lowering(operator, x)
    run = fast and fast.backward_runner(operator.vectors, options, x, grad, grad_sum, residual, from_sum, wanted)
    return run or (lambda vectors, *tensors: composition.backward(*tensors, vectors, options, from_sum, wanted))


def _fast_lowering(operator: Operator, x: Tensor) -> ModuleType | None:
    """Return the module that makes the runners of calls like this; None for torch operators."""
    dim, weight = operator.options.channel_dim, operator.vectors.weight
    where = lowering_of(x, dim, weight, operator.choice) if x.numel() else "eager"
    if where == "triton":
        from . import launch  # imports triton, which a CPU does without

        return launch
    # Inductor would keep v in float32 where others see it rounded.
    rounds = operator.options.want_sum and x.dtype not in (torch.float32, torch.float64)
    return compiled if where == "compiled" and not rounds else None


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
