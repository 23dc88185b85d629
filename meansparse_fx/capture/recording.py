"""Floor 2: what a model computes, without computing it: its operator calls, and what flows from one to the next.

Values are numbered, not tensors: a write in place gives its tensor, and every other that shares its memory, a new
number. So where two recordings are equal, the same operators meet the same operands in the same order, and the results
are equal bit for bit, whatever the images hold. The images want gradients while this happens, and a recording says
which operands do, under which mode, through which `torch.autograd.Function` and tensor hooks: so derivatives with
respect to images and parameters are equal, too.
"""

from __future__ import annotations

import hashlib
import types
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..artifacts import tensor_bytes
from ..dataless import Dataless, DatalessMode, Forms, NeedsData, layout_of, storage, tensors, written_by
from ..outputs import flatten
from .derivatives import applied_by, without_checkpoints
from .randomness import draws, state_drawn_from

aten = torch.ops.aten

_KEPT = "which a function kept that copies of the model share: if it is a hook, make it a method of the model"


class Halted(Exception):
    """The call at which to stop has come."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model does with images of one shape.

    Attributes:
        calls: Of each operator call its name, its operands, the layout of its results and whether it is differentiated.
            Results of earlier calls stand there by number, parameters and buffers by name, constants by value, other
            tensors by a digest; each with whether it wants a gradient. Of random ones also the generator's state.
            Applying a `torch.autograd.Function` and setting a tensor hook are calls, too.
        output: The model's output, in the same terms.
    """

    calls: list[tuple] = field(repr=False)
    output: Any


def record(
    model: Callable[[Tensor], Any], images: Tensor, state: dict[str, Tensor], forms: Forms, halt: int | None = None
) -> Recording:
    """Return what ``model`` does with images of this shape, type and device.

    What does not depend on the images is computed. A model that asks how its tensors are laid out is told what torch's
    meta kernels say, of convolutions what the device does; one that asks for memory addresses is not understood.

    What happens past torch's operators is seen neither here nor by a trace: a tensor's class (``type(x) is Tensor`` is
    false here; ``isinstance`` is answered rightly), constants changed through NumPy, torch's settings
    (``torch.backends``) changed on the way.

    Args:
        model: Called once, under the caller's modes and random state. It may keep what it is given: pass a copy.
        state: The parameters and buffers that both sides of a comparison have, by name.
        forms: Remembers what calls give, from one recording to the next.
        halt: Stop before this call.

    Raises:
        Halted: At that call.
        NeedsData: The model asks for values of the images, or changes its own state. Other errors are the model's,
            or those of operators that cannot do without data.

    Example:
        >>> images, models = torch.rand(2, 3), (lambda x: x + x.abs(), lambda x: x.abs() + x)
        >>> first, second = (record(model, images, {}, {}) for model in models)
        >>> [call[0] for call in first.calls], first == second
        (['aten.abs.default', 'aten.add.Tensor'], False)
    """
    recorder = _Recorder(state, forms, halt)
    symbolic: Any = recorder.without_data(images)
    recorder.number(symbolic, (0, 0))
    with without_checkpoints(), applied_by(recorder.apply, lambda value: isinstance(value, Tensor)), recorder:
        if images.is_floating_point() and torch.is_grad_enabled():
            symbolic = symbolic.requires_grad_().clone()  # no leaf, which nobody may write to
            recorder.calls.clear()
            symbolic.value = 0, 0
        output = model(symbolic)
    leaves, form = flatten(output)
    return Recording(recorder.calls, (form, [recorder.term(leaf) for leaf in leaves]))


class _Symbolic(Dataless):
    """A tensor computed from images; ``value`` is the number of what it holds now."""

    maker: _Recorder
    value: tuple | None = None

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NeedsData("an assignment to .data, which is no operator call")

    def register_hook(self, hook: Callable) -> Any:
        self.maker.note("register_hook", self.maker.term(self), _hook_term(hook))
        return super().register_hook(hook)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise NeedsData(f"{func} of a tensor without data, {_KEPT}")


class _Recorder(DatalessMode):
    tensor_class = _Symbolic

    def __init__(self, state: dict[str, Tensor], forms: Forms, halt: int | None) -> None:
        super().__init__(forms)
        self.calls: list[tuple] = []
        self._halt = halt
        self._state: dict[int, tuple[str, int]] = {}  # storage -> the name of a tensor in it, and its version
        for name, tensor in state.items():
            self._state.setdefault(storage(tensor), (name, _version(tensor)))
        self._own: set[int] = set()  # storages that the model made itself just now, without images
        # By id, with the tensor, or another one would get its id.
        self._digests: dict[int, tuple[tuple, bytes, Tensor]] = {}
        self._sharing: dict[int, list[weakref.ref[_Symbolic]]] = defaultdict(list)  # storage -> symbolic tensors in it
        self._histories = _Histories({key: name for key, (name, _) in self._state.items()})

    def note(self, *call: Any) -> None:
        """Add a call."""
        if len(self.calls) == self._halt:
            raise Halted
        self.calls.append(call)

    def apply(self, function: type, run: Callable[[], Any], args: tuple, kwargs: dict) -> Any:
        """Note that a `torch.autograd.Function` is applied, and run its forward."""
        self.note(function, self.term(args), self.term(tuple(kwargs.items())))
        return run()

    def number(self, symbolic: Any, value: tuple) -> None:
        """Give a new symbolic tensor its number."""
        symbolic.value = value
        self._sharing[storage(symbolic)].append(weakref.ref(symbolic))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors((args, kwargs))
        symbolic: list[Any] = [t for t in operands if type(t) is _Symbolic]
        written: list[Any] = tensors(written_by(func, args, kwargs))
        if not all(type(t) is _Symbolic or storage(t) in self._own for t in written):
            raise NeedsData(f"{func} writes into what was there before: a parameter, a buffer, a constant")
        if symbolic:
            self.check(func, operands, written)
        random = draws(func, args, kwargs)
        terms: tuple = ()
        if symbolic or random:
            terms = self.term(args), self.term(tuple(kwargs.items()))
        if random:
            terms = *terms, state_drawn_from(args, kwargs)
        if not symbolic:
            if random:  # the numbers are the same only if they are drawn in the same order
                self.note(str(func), *terms)
            result = func(*args, **kwargs)
            self._own |= {storage(t) for t in tensors(result)} - {storage(t) for t in operands}
            return result
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
        one_type = len({t.dtype for t in operands}) == 1 and operands[0].is_floating_point()
        result = self.result(func, args, kwargs, operands)
        if func is aten._fused_sdp_choice.default:
            return result
        if func is aten.alias.default:  # the same tensor; autograd takes one of a view that was written to
            self.number(result, symbolic[0].value)
            return result
        # `x += y` and `x = x + y` compute the same, unless another type is cast back.
        name = _functional_name(func) if written and one_type and not random else str(func)
        parts = result if isinstance(result, tuple | list) else [result]
        self.note(name, *terms, [layout_of(p) for p in parts], differentiated)
        self._write(written)
        fresh = (p for p in parts if type(p) is _Symbolic and p.value is None)
        for position, part in enumerate(fresh, len(written)):
            self.number(part, (len(self.calls), position))
        return result

    def _write(self, written: list[_Symbolic]) -> None:
        """Number anew what the last call wrote, and what else lies in that memory."""
        for position, symbolic in enumerate(written):
            for other in self._sharing[storage(symbolic)]:
                if (alias := other()) is not None:
                    alias.value = (len(self.calls), "through", alias.value)
            symbolic.value = (len(self.calls), position)

    def term(self, value: Any) -> Any:
        """Return what stands for an operand: equal terms are equal operands."""
        if isinstance(value, Tensor):
            return (value.value, value.requires_grad) if type(value) is _Symbolic else self._named(value)
        if isinstance(value, tuple | list):
            return (type(value), *map(self.term, value))
        if isinstance(value, int | float | complex):
            return type(value), repr(value)  # 0, 0.0 and -0.0 differ, and nan is nan
        return value

    def _named(self, tensor: Tensor) -> tuple:
        form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *self._histories.of(tensor)
        name, at_start = self._state.get(storage(tensor), (None, None))
        if name is not None and at_start == _version(tensor):
            return name, tensor.storage_offset(), *form
        before = storage(tensor), tensor.storage_offset(), _version(tensor)
        known = self._digests.get(id(tensor))
        if known is None or known[0] != before or tensor.is_inference():
            known = before, _digest(tensor), tensor
            self._digests[id(tensor)] = known
        return known[1], *form


class _Histories:
    """Describes the parts of autograd's graph that parameters alone are in.

    Args:
        names: Of parameters and buffers, by their storage.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._known: dict[int, tuple[bytes, Any]] = {}  # by id of a node, with the node, or another would get its id

    def of(self, tensor: Tensor) -> tuple:
        """Return nothing for a tensor that wants no gradient, else its hooks and where its gradient goes."""
        if not tensor.requires_grad:
            return ()
        hooks = tuple(map(_hook_term, (tensor._backward_hooks or {}).values()))
        return (*hooks, b"" if tensor.grad_fn is None else self._digest(tensor.grad_fn))

    def _digest(self, node: Any) -> bytes:
        """Return what only nodes share that come from the same operators and parameters."""
        if id(node) not in self._known:
            leaf = getattr(node, "variable", None)
            name = self._names.get(storage(leaf)) if isinstance(leaf, Tensor) else None
            sources = [None if n is None else (self._digest(n), index) for n, index in node.next_functions]
            description = f"{type(node).__module__}.{type(node).__qualname__}", node.name(), name, sources
            self._known[id(node)] = hashlib.sha256(repr(description).encode()).digest(), node
        return self._known[id(node)][0]


def _hook_term(hook: Any) -> Any:
    """Return what stands for a tensor hook: a function that is defined anew at each call is the same."""
    if type(hook) is not types.FunctionType:
        return hook
    return hook.__code__, hook.__defaults__, tuple(cell.cell_contents for cell in hook.__closure__ or ())


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _digest(tensor: Tensor) -> bytes:
    """Return what only tensors of the same values share."""
    return hashlib.sha256(tensor_bytes(tensor.detach().resolve_conj().resolve_neg())).digest()


def _functional_name(func: Any) -> str:
    """Return the name of the call that gives what ``func`` writes."""
    return f"{func._schema.name.replace('::', '.').removesuffix('_')}.{func._overloadname}"
