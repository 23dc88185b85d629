"""Floor 2: what a dispatched call and its tensors tell of themselves, and where gradients go. Torch, floor 1 only."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ..artifacts import tensor_bytes

aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten._convolution.default}


# They take indices beside what they index. Elsewhere operands of two types may be an error that only real ones raise.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten.embedding, aten.gather, aten.index_select}


class Unrecordable(Exception):
    """The images' values are asked for, or something else happens that a recording cannot hold."""


def storage(tensor: Tensor) -> int:
    """Return which memory a tensor lies in."""
    return tensor.untyped_storage()._cdata


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def digest(tensor: Tensor) -> bytes:
    """Return what only tensors of the same values share."""
    return hashlib.sha256(tensor_bytes(tensor.detach().resolve_conj().resolve_neg())).digest()


def written_by(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Return the arguments that a call writes to."""
    if not func._schema.is_mutable:
        return []
    writes = {a.name: a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments}
    named = {**dict(zip(writes, args, strict=False)), **kwargs}
    return [value for name, value in named.items() if writes[name]]


def functional_name(func: Any) -> str:
    """Return the name of the call that gives what ``func`` writes."""
    return f"{func._schema.name.replace('::', '.').removesuffix('_')}.{func._overloadname}"


def change_shape(func: Any, args: tuple, kwargs: dict) -> None:
    """Let a call change the shape of a symbolic tensor itself, as it has changed its stand-in's."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with no_dispatch():
            func(*args, **kwargs)
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def laid_out(result: Tensor, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Return a convolution's result, a meta tensor, with the strides that the device gives it.

    The meta kernel does not know the device. As `torch._subclasses.fake_impls.conv` does it for fake tensors.
    """
    named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    images, weight = allocated_like(named["input"]), allocated_like(named["weight"])
    bias = None if named["bias"] is None else allocated_like(named["bias"])
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = {name: named[name] for name in names}
    backend = torch._C._select_conv_backend(images, weight, bias, **options, bias_sizes=None)
    flat = weight.dim() == 3  # torch adds a dimension
    if flat:
        images, weight, result = images.contiguous().unsqueeze(2), weight.unsqueeze(2), result.unsqueeze(2)
    layout = torch._C._conv_determine_backend_memory_format(images, weight, backend)
    result = torch.empty_like(result, memory_format=layout)
    return result.squeeze(2) if flat else result


def allocated_like(tensor: Tensor) -> Tensor:
    """Return a tensor of the same form, its memory never touched."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def generator_state(device: torch.device) -> bytes:
    """Return what the device's random numbers follow from."""
    of_cpu = device.type == "cpu"
    return digest(torch.get_rng_state() if of_cpu else torch.get_device_module(device).get_rng_state(device))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def mapped(value: Any, f: Callable[[Any], Any]) -> Any:
    """Return tuples, lists and dicts with ``f`` of all that is in them."""
    if isinstance(value, dict):
        return {key: mapped(part, f) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, f) for part in value)
    return f(value)


def meta(shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
    """Return a tensor of that form on the meta device."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def layout_of(value: Any) -> Any:
    """Return a value with the layout of tensors in their place."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return (type(value), *map(layout_of, value))
    return (type(value), repr(value)) if isinstance(value, int | float | complex) else value


def drawn(args: tuple, kwargs: dict) -> bytes:
    """Return what the numbers of a random call follow from, and move on: seeding is no operator call."""
    if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        raise Unrecordable("random numbers of a generator of its own")
    operand = next(tensors((args, kwargs)), None)
    device = torch.device(kwargs.get("device") or ("cpu" if operand is None else operand.device))
    state = generator_state(device)
    torch.rand((), device=device)
    return state


def same_types(func: Any, operands: list[Tensor], device: torch.device) -> bool:
    """Refuse what a meta kernel does not mind and a real one may; return whether all operands have one type."""
    sized = [t for t in operands if t.dim()]
    if any(t.device != device for t in sized):
        raise Unrecordable(f"{func} gets tensors of two devices")
    types = {t.dtype for t in operands}
    mixed = {t.dtype for t in sized} - {torch.bool}
    if len(mixed) > 1 and torch.Tag.pointwise not in func.tags and func.overloadpacket not in _INDEXING:
        raise Unrecordable(f"{func} gets tensors of two types")
    return len(types) == 1 and all(t.is_floating_point for t in types)


class Histories:
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
        hooks = tuple(map(hook_term, (tensor._backward_hooks or {}).values()))
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


def hook_term(hook: Any) -> Any:
    """Return what stands for a tensor hook: a function that is defined anew at each call is the same."""
    if type(hook) is not types.FunctionType:
        return hook
    return hook.__code__, hook.__defaults__, tuple(cell.cell_contents for cell in hook.__closure__ or ())
