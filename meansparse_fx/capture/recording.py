"""Floor 2: what a model computes, without computing it: its operator calls, and what flows from one to the next.

Values are numbered, not tensors: a write in place gives its tensor, and every other that shares its memory, a new
number. So where two recordings are equal, the same operators meet the same operands in the same order, and the results
are equal bit for bit, whatever the images hold. The images want gradients while this happens, and a recording says
which operands do, under which mode, through which `torch.autograd.Function` and tensor hooks: so derivatives with
respect to images and parameters are equal, too. Imports torch, `derivatives`, `dispatched` and floor 1.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..outputs import flatten
from .derivatives import applied_by, without_checkpoints
from .dispatched import (
    CONVOLUTIONS,
    Histories,
    Unrecordable,
    allocated_like,
    change_shape,
    digest,
    drawn,
    functional_name,
    hook_term,
    laid_out,
    layout_of,
    mapped,
    meta,
    same_types,
    storage,
    tensors,
    version,
    written_by,
)

aten = torch.ops.aten

_KEPT = "which a function kept that copies of the model share: if it is a hook, make it a method of the model"
Forms = dict[tuple, tuple[type | None, list]]  # a call, operands' layouts in their place -> its results' layouts


class Halted(Exception):
    """The call at which to stop has come."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model does with images of one shape.

    Attributes:
        calls: Of each operator call its name, its operands, the layout of its results and whether it is differentiated.
            Results of earlier calls stand there by number, parameters and buffers by name, constants by value, other
            tensors by a digest; each with whether it wants a gradient. Of random ones also a digest of the generator's
            state. Applying a `torch.autograd.Function` and setting a tensor hook are calls, too.
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
        Unrecordable: The model asks for values of the images, or changes its own state. Other errors are the model's,
            or those of operators that cannot do without data.

    Example:
        >>> images, models = torch.rand(2, 3), (lambda x: x + x.abs(), lambda x: x.abs() + x)
        >>> first, second = (record(model, images, {}, {}) for model in models)
        >>> [call[0] for call in first.calls], first == second
        (['aten.abs.default', 'aten.add.Tensor'], False)
    """
    recorder = _Recorder(state, forms, halt)
    symbolic: Any = recorder.new_value(torch.empty_like(images, device="meta"), images.device, 0)
    with without_checkpoints(), applied_by(recorder.apply, lambda value: isinstance(value, Tensor)), recorder:
        if images.is_floating_point() and torch.is_grad_enabled():
            symbolic = symbolic.requires_grad_().clone()  # no leaf, which nobody may write to
            recorder.calls.clear()
            symbolic.value = 0, 0
        output = model(symbolic)
    leaves, form = flatten(output)
    return Recording(recorder.calls, (form, [recorder.term(leaf) for leaf in leaves]))


class _Symbolic(Tensor):
    """A tensor computed from images, that holds nothing.

    Attributes:
        meta: Its stand-in on the meta device, by which torch says what shape a result has.
        value: The number of what it holds now.
        recorder: Whose number that is.
    """

    meta: Tensor
    value: tuple
    recorder: _Recorder
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, value: tuple, recorder: _Recorder) -> _Symbolic:
        symbolic = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        symbolic.meta, symbolic.value, symbolic.recorder = meta, value, recorder
        return symbolic

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        raise Unrecordable("an assignment to .data, which is no operator call")

    def register_hook(self, hook: Callable) -> Any:
        self.recorder.note("register_hook", self.recorder.term(self), hook_term(hook))
        return super().register_hook(hook)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise Unrecordable(f"{func} of a tensor without data, {_KEPT}")


class _Recorder(TorchDispatchMode):
    def __init__(self, state: dict[str, Tensor], forms: Forms, halt: int | None) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._forms, self._halt = forms, halt
        self._state: dict[int, tuple[str, int]] = {}  # storage -> the name of a tensor in it, and its version
        for name, tensor in state.items():
            self._state.setdefault(storage(tensor), (name, version(tensor)))
        self._own: set[int] = set()  # storages that the model made itself just now, without images
        # By id, with the tensor, or another one would get its id.
        self._digests: dict[int, tuple[tuple, bytes, Tensor]] = {}
        self._metas: dict[int, tuple[tuple, Tensor, Tensor]] = {}
        self._sharing: dict[int, list[weakref.ref[_Symbolic]]] = defaultdict(list)  # storage -> symbolic tensors in it
        self._histories = Histories({key: name for key, (name, _) in self._state.items()})

    def note(self, *call: Any) -> None:
        """Add a call."""
        if len(self.calls) == self._halt:
            raise Halted
        self.calls.append(call)

    def apply(self, function: type, run: Callable[[], Any], args: tuple, kwargs: dict) -> Any:
        """Note that a `torch.autograd.Function` is applied, and run its forward."""
        self.note(function, self.term(args), self.term(tuple(kwargs.items())))
        return run()

    def new_value(self, meta: Tensor, device: torch.device, position: int) -> _Symbolic:
        """Return a new symbolic tensor, a result of the last call."""
        if meta.is_conj() or meta.is_neg():
            raise Unrecordable("a lazy conjugate")
        symbolic = _Symbolic(meta, device, (len(self.calls), position), self)
        self._sharing[storage(meta)].append(weakref.ref(symbolic))
        return symbolic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors((args, kwargs)))
        symbolic = [t for t in operands if type(t) is _Symbolic]
        if not all(g.recorder is self for g in symbolic):
            raise Unrecordable(f"{func}: the model kept a tensor of an earlier call")
        written: list[Any] = list(tensors(written_by(func, args, kwargs)))
        if not all(type(t) is _Symbolic or storage(t) in self._own for t in written):
            raise Unrecordable(f"{func} writes into what was there before: a parameter, a buffer, a constant")
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not symbolic:
            if random:  # the numbers are the same only if they are drawn in the same order
                self.note(str(func), self.term(args), self.term(tuple(kwargs.items())), drawn(args, kwargs))
            result = func(*args, **kwargs)
            self._own |= {storage(t) for t in tensors(result)} - {storage(t) for t in operands}
            return result
        if not all(type(t) is _Symbolic for t in written):
            raise Unrecordable(f"{func} writes images into a constant")
        if func is aten.alias.default:  # the same tensor; autograd takes one of a view that was written to
            result = self.new_value(func(symbolic[0].meta), symbolic[0].device, 0)
            result.value = symbolic[0].value
            return result
        same_type = same_types(func, operands, symbolic[0].device)
        terms: tuple = self.term(args), self.term(tuple(kwargs.items()))
        if random:
            terms = *terms, drawn(args, kwargs)
        if func is aten._fused_sdp_choice.default:
            # What it chooses depends on the device. It never touches the memory.
            args, kwargs = mapped((args, kwargs), lambda v: allocated_like(v) if isinstance(v, Tensor) else v)
            return func(*args, **kwargs)
        container, parts = self._result(func, args, kwargs)
        # `x += y` and `x = x + y` compute the same, unless another type is cast back.
        plain = written and same_type and not random
        name = functional_name(func) if plain else str(func)
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
        self.note(name, *terms, [layout_of(p) for p in parts], differentiated)
        self._write(written)
        device = torch.device(kwargs.get("device") or symbolic[0].device)
        own = {id(g.meta): g for g in symbolic}  # what an in-place call returns is its operand
        fresh = iter(range(len(written), len(written) + len(parts)))
        seen = [
            p if not isinstance(p, Tensor) else own[id(p)] if id(p) in own else self.new_value(p, device, next(fresh))
            for p in parts
        ]
        return seen[0] if container is None else container(seen)

    def _result(self, func: Any, args: tuple, kwargs: dict) -> tuple[type | None, list[Any]]:
        """Return what a call gives, on the meta device: its container, if any, and the parts in it."""
        key = None
        if not any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns)):
            # Remembered, because meta kernels are slow, batch norm's 3 ms: a ResNet-50 records in 0.03 s, not in 0.10.
            key = func, layout_of(args), layout_of(tuple(kwargs.items()))
            if key in self._forms:
                container, forms = self._forms[key]
                return container, [meta(*form[1:4]) if type(form) is tuple else form for form in forms]
        given = kwargs | {"device": torch.device("meta")} if "device" in kwargs else kwargs
        result = func(*mapped(args, self._stand_in), **mapped(given, self._stand_in))
        if torch.Tag.inplace_view in func.tags:
            change_shape(func, args, kwargs)
        container = type(result) if isinstance(result, tuple | list) else None
        parts = [result] if container is None else list(result)
        if not all(p is None or isinstance(p, Tensor | int | float) for p in parts):
            raise Unrecordable(f"{func} gives {type(result).__name__}")
        if func in CONVOLUTIONS:
            parts = [laid_out(result, func, args, kwargs)]
        if key is not None:
            self._forms[key] = container, [layout_of(p) if isinstance(p, Tensor) else p for p in parts]
        return container, parts

    def _write(self, written: list[_Symbolic]) -> None:
        """Number anew what the last call wrote, and what else lies in that memory."""
        for position, symbolic in enumerate(written):
            for other in self._sharing[storage(symbolic.meta)]:
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
        if name is not None and at_start == version(tensor):
            return name, tensor.storage_offset(), *form
        before = storage(tensor), tensor.storage_offset(), version(tensor)
        known = self._digests.get(id(tensor))
        if known is None or known[0] != before or tensor.is_inference():
            known = before, digest(tensor), tensor
            self._digests[id(tensor)] = known
        return known[1], *form

    def _stand_in(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if type(value) is _Symbolic:
            return value.meta
        form = value.shape, value.stride(), value.dtype
        known = self._metas.get(id(value))
        if known is None or known[0] != form:
            known = self._metas[id(value)] = form, meta(*form), value
        return known[1]
