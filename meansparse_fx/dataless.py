"""Floor 1: running a model without computing: tensors that hold nothing, and what operators make of them.

torch's meta kernels tell shapes, strides and types; of convolutions, whose layout depends on the device, the choice of
back end does. torch's own FakeTensor does the same, and a network of conv, norm and activation takes ten times as long
in it. Imports torch only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_CONVOLUTIONS = {aten.convolution.default, aten._convolution.default}

# They take indices beside what they index. Elsewhere operands of two types may be an error that only real ones raise.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten.embedding, aten.gather, aten.index_select}

_HOLDING = (Tensor, tuple, list, dict)

Forms = dict[tuple, tuple[type | None, list]]  # a call, operands' layouts in their place -> its results' layouts


class NeedsData(Exception):
    """Values are asked for, or something happens that only real tensors show."""


class Dataless(Tensor):
    """A tensor that holds nothing.

    Attributes:
        meta: Its stand-in on the meta device, by which torch says what shape a result has.
        maker: The mode it was made in, which answers its calls, entered or not.
    """

    meta: Tensor
    maker: DatalessMode
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, maker: DatalessMode) -> Dataless:
        if meta.is_conj() or meta.is_neg():
            raise NeedsData("a lazy conjugate")
        own = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        own.meta, own.maker = meta, maker
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        maker = next(t.maker for t in tensors((args, kwargs)) if isinstance(t, Dataless))
        return maker.__torch_dispatch__(func, types, args, kwargs)


class DatalessMode(TorchDispatchMode):
    """In this mode, calls that are given dataless tensors, and those that make new ones, give dataless ones.

    What is computed from other tensors alone is computed.

    Args:
        forms: Remembers what calls give, from one mode to the next.

    Example:
        >>> mode = DatalessMode()
        >>> with mode:
        ...     y = torch.nn.functional.max_pool2d(mode.without_data(torch.zeros(2, 3, 8, 8)), 2)
        >>> y.shape, y.device
        (torch.Size([2, 3, 4, 4]), device(type='cpu'))
    """

    tensor_class: type[Dataless] = Dataless  # of what it makes

    def __init__(self, forms: Forms | None = None) -> None:
        super().__init__()
        self._forms: Forms = {} if forms is None else forms
        self._stand_ins: dict[int, tuple[tuple, Tensor, Tensor]] = {}  # by id, with the tensor, or others would get it

    def without_data(self, tensor: Tensor) -> Dataless:
        """Return a tensor of the same form and device."""
        return self.tensor_class(torch.empty_like(tensor, device="meta"), tensor.device, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors((args, kwargs))
        if operands and not any(isinstance(t, Dataless) for t in operands):
            return func(*args, **kwargs)
        self.check(func, operands, tensors(written_by(func, args, kwargs)))
        return self.result(func, args, kwargs, operands)

    def check(self, func: Any, operands: list[Tensor], written: list[Tensor]) -> None:
        """Refuse calls that a meta kernel does not mind and a real one may, and tensors of another mode."""
        dataless = [t for t in operands if isinstance(t, Dataless)]
        if any(t.maker is not self for t in dataless):
            raise NeedsData(f"{func}: the model kept a tensor of an earlier call")
        if not all(isinstance(t, Dataless) for t in written):
            raise NeedsData(f"{func} writes images into a constant")
        sized = [t for t in operands if t.dim()]
        if any(t.device != dataless[0].device for t in sized):
            raise NeedsData(f"{func} gets tensors of two devices")
        mixed = {t.dtype for t in sized} - {torch.bool}
        if len(mixed) > 1 and torch.Tag.pointwise not in func.tags and func.overloadpacket not in _INDEXING:
            raise NeedsData(f"{func} gets tensors of two types")

    def result(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        """Return what a call gives; what works in place returns its operand."""
        own = {id(t.meta): t for t in operands if isinstance(t, Dataless)}
        device = next((t.device for t in own.values()), None) or torch.get_default_device()
        if func is aten._fused_sdp_choice.default:
            # What it chooses depends on the device. It never touches the memory.
            args, kwargs = mapped((args, kwargs), lambda v: _allocated_like(v) if isinstance(v, Tensor) else v)
            return func(*args, **kwargs)
        container, parts = self._parts(func, args, kwargs)
        if any(t.shape != t.meta.shape for t in own.values()):
            raise NeedsData(f"{func} resizes what it writes into")
        device = torch.device(kwargs.get("device") or device)

        def presented(part: Any) -> Any:
            if id(part) in own:  # the stand-in of an operand
                return own[id(part)]
            return self.tensor_class(part, device, self) if isinstance(part, Tensor) else part

        results = [presented(part) for part in parts]
        return results[0] if container is None else container(results)

    def _parts(self, func: Any, args: tuple, kwargs: dict) -> tuple[type | None, list[Any]]:
        """Return what a call gives, on the meta device: its container, if any, and the parts in it."""
        key = None
        if not _aliases(func):
            # Remembered, because meta kernels are slow: a convolution's takes 0.3 ms, a layer norm's 2.
            key = func, layout_of(args), layout_of(tuple(kwargs.items()))
            if key in self._forms:
                container, forms = self._forms[key]
                return container, [_meta(*form[1:4]) if type(form) is tuple else form for form in forms]
        given = kwargs | {"device": torch.device("meta")} if "device" in kwargs else kwargs
        if func is aten.native_batch_norm.default and not args[5] and args[0].is_contiguous():
            x = self._stand_in(args[0])  # in eval mode; the meta kernel takes 1 ms, which is a twentieth of a ResNet-50
            result: Any = (torch.empty_like(x), x.new_empty(0), x.new_empty(0))
        else:
            result = func(*mapped(args, self._stand_in), **mapped(given, self._stand_in))
        if _aliases(func) and torch.Tag.inplace_view in func.tags:
            _change_shape(func, args, kwargs)
        container = type(result) if isinstance(result, tuple | list) else None
        parts = [result] if container is None else list(result)
        if not all(p is None or isinstance(p, Tensor | int | float) for p in parts):
            raise NeedsData(f"{func} gives {type(result).__name__}")
        if func in _CONVOLUTIONS:
            parts = [_laid_out(result, func, args, kwargs)]
        if key is not None:
            self._forms[key] = container, [layout_of(p) if isinstance(p, Tensor) else p for p in parts]
        return container, parts

    def _stand_in(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, Dataless):
            return value.meta
        form = value.shape, value.stride(), value.dtype
        known = self._stand_ins.get(id(value))
        if known is None or known[0] != form:
            known = self._stand_ins[id(value)] = form, _meta(*form), value
        return known[1]


def storage(tensor: Tensor) -> int:
    """Return which memory a tensor lies in, or would."""
    return (tensor.meta if isinstance(tensor, Dataless) else tensor).untyped_storage()._cdata


def written_by(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Return the arguments that a call writes to."""
    if not (_aliases(func) and func._schema.is_mutable):
        return []
    writes = {a.name: a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments}
    named = {**dict(zip(writes, args, strict=False)), **kwargs}
    return [value for name, value in named.items() if writes[name]]


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [t for part in value if isinstance(part, _HOLDING) for t in tensors(part)]


@functools.cache
def _aliases(func: Any) -> bool:
    """Return whether a call writes into what it is given, or returns a view of it."""
    return any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))


def mapped(value: Any, f: Callable[[Any], Any]) -> Any:
    """Return tuples, lists and dicts with ``f`` of all that is in them."""
    if isinstance(value, dict):
        return {key: mapped(part, f) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, f) for part in value)
    return f(value)


def layout_of(value: Any) -> Any:
    """Return a value with the layout of tensors in their place."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return (type(value), *map(layout_of, value))
    return (type(value), repr(value)) if isinstance(value, int | float | complex) else value


def _change_shape(func: Any, args: tuple, kwargs: dict) -> None:
    """Let a call change the shape of a dataless tensor itself, as it has changed its stand-in's."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with no_dispatch():
            func(*args, **kwargs)
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def _laid_out(result: Tensor, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Return a convolution's result, a meta tensor, with the strides that the device gives it.

    The meta kernel does not know the device. As `torch._subclasses.fake_impls.conv` does it for fake tensors.
    """
    named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    images, weight = _allocated_like(named["input"]), _allocated_like(named["weight"])
    bias = None if named["bias"] is None else _allocated_like(named["bias"])
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = {name: named[name] for name in names}
    backend = torch._C._select_conv_backend(images, weight, bias, **options, bias_sizes=None)
    flat = weight.dim() == 3  # torch adds a dimension
    if flat:
        images, weight, result = images.contiguous().unsqueeze(2), weight.unsqueeze(2), result.unsqueeze(2)
    layout = torch._C._conv_determine_backend_memory_format(images, weight, backend)
    result = torch.empty_like(result, memory_format=layout)
    return result.squeeze(2) if flat else result


def _allocated_like(tensor: Tensor) -> Tensor:
    """Return a tensor of the same form, its memory never touched."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _meta(shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
