"""Floor 2: proxies that know what their node yields for two example batches of different size.

What both agree on (channels, dtype, device, the length of a tuple) is answered while tracing. What differs depends on
the batch, and stays in the graph as arithmetic. Values of images never answer anything; values of parameters and
buffers do.
"""

from __future__ import annotations

import builtins
import dis
import functools
import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from .derivatives import ModelProxy
from .functions import values_of
from .guards import BATCH_SIZES


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace on examples runs; it starts again with others where these do not serve.

    Attributes:
        values: Examples are computed for real, as some operator or module needs. Otherwise without data.
        namespaces: Globals of the source files that turn a size which depends on the batch into an int or a float:
            no object can answer `int()` but with an int, so there these functions are others while tracing.
    """

    values: bool = False
    namespaces: tuple[dict[str, Any], ...] = ()


class Retrace(Exception):
    """Tracing has to start again with other options; no failure of the model."""

    def __init__(self, options: TraceOptions) -> None:
        super().__init__("tracing starts again with other options")
        self.options = options


class Sizes(tuple):
    """The shape of a tensor, where some sizes depend on the batch."""

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return Sizes(part) if isinstance(key, slice) else part

    def numel(self) -> Any:
        """Return the product, as torch.Size does."""
        product: Any = 1
        for size in self:
            product = product * size
        return product


class ExampleProxy(ModelProxy):
    """Stands for a node's result, and knows it for each example batch.

    Attributes:
        examples: One for each batch, or a single one if it does not depend on the images.
        depends_on_values: Its sizes, or it itself if it is a number, depend on values of the images.
        may_differ: Sizes that the batch decided are no longer among those that differ: ``x[:2]``, ``x.squeeze()``. The
            examples agree on them, and other batches may not.
    """

    tracer: Any

    def __init__(
        self, node: fx.Node, tracer: fx.Tracer, examples: tuple, depends_on_values: bool, may_differ: bool = False
    ) -> None:
        super().__init__(node, tracer)
        self.examples = examples
        self.depends_on_values = depends_on_values
        self.may_differ = may_differ

    def __getattr__(self, k: str) -> Any:
        with self.tracer.evaluating():
            example = getattr(self.__dict__["examples"][0], k)
        if callable(example):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", k, (self, *args), kwargs)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __len__(self) -> int:
        if not self._has_one_length():
            return self._ask_again(sys._getframe(1))
        return self.tracer.create_proxy("call_function", len, (self,), {})

    def __iter__(self) -> Iterator[Any]:
        if not self._has_one_length():
            raise TraceError("a loop runs as often as there are images in a batch, or as their values say")
        proxy: Any = self
        return (proxy[i] for i in range(len(proxy)))

    def _has_one_length(self) -> bool:
        return len({len(example) for example in self.examples}) == 1 and not self.depends_on_values

    def _ask_again(self, frame: FrameType) -> Any:
        """Trace again with other `int`, `float` and `len` in the file that called one of them."""
        options = self.tracer.options
        if any(frame.f_globals is namespace for namespace in options.namespaces):
            raise TraceError("a number is needed here, and it depends on the batch size")
        raise Retrace(replace(options, namespaces=(*options.namespaces, frame.f_globals)))


class TensorProxy(ExampleProxy):
    """Stands for a tensor. One that is computed from parameters and buffers alone has a value, too."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(x, torch.Tensor)
        caller = sys._getframe(1)
        return TensorProxy if self.__dict__["tracer"].classes_are_read(caller) or not _asks(caller) else Tensor

    def __bool__(self) -> bool:
        harmless = _without_raising(sys._getframe(1)) if len(self.examples) > 1 else None
        return bool(self._value()) if harmless is None else harmless

    def __int__(self) -> int:
        return int(self._value())

    def __index__(self) -> int:
        return operator.index(self._value())

    def __float__(self) -> float:
        return float(self._value())

    def __setitem__(self, key: Any, value: Any) -> None:
        own, mask = self.examples[0], key.examples[0] if type(key) is TensorProxy else None
        if mask is not None and mask.dtype is torch.bool and mask.shape == own.shape and type(value) in (int, float):
            self.tracer.create_proxy("call_method", "masked_fill_", (self, key, value), {})  # known as a function
        else:
            self.tracer.create_proxy("call_method", "__setitem__", (self, key, value), {})

    def _value(self) -> Tensor:
        if len(self.examples) > 1:
            raise TraceError("a number or a branch depends on values that are computed from the images")
        self.tracer.note_read(self)
        return self.examples[0].detach()


# As methods, because a generated `x += y` would bind x anew when it is traced again.
for _name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"):
    setattr(
        TensorProxy, _name, lambda self, other, _n=_name: self.tracer.create_proxy("call_method", _n, (self, other), {})
    )


class NumberProxy(ExampleProxy):
    """Stands for a number that depends on the batch size."""

    __iter__ = __len__ = __getitem__ = None  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(n, int)
        return type(self.__dict__["examples"][0])

    def __bool__(self) -> bool:
        if self.depends_on_values:
            raise TraceError("a branch depends on a number that is computed from the images")
        answers = [bool(example) for example in self.examples]
        if len(set(answers)) == 1:
            self.tracer.expect(self.node, answers[0])
            return answers[0]
        cases = " and ".join(f"{answer} for {n}" for answer, n in zip(answers, BATCH_SIZES, strict=True))
        raise TraceError(f"a branch depends on the batch size: {cases} images")

    def __round__(self, *digits: int) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __int__(self) -> int:
        return self._ask_again(sys._getframe(1))

    def __float__(self) -> float:
        return self._ask_again(sys._getframe(1))

    def __index__(self) -> int:
        raise TypeError("a number is needed here, and it depends on the batch size")


def _asks(frame: FrameType) -> bool:
    """Return whether a line of Python asks what something is; code in C that asks goes on to read a tensor's memory."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
    return not line or any(word in line for word in ("isinstance", "__class__", "case "))


def _without_raising(frame: FrameType) -> bool | None:
    """Return the answer that raises nothing, if ``frame`` is about to ask for one and raises on the other; else None.

    So `assert not x.isnan().any()` passes: the model itself held on the example images what it checks of values, and
    the graph does not repeat it.
    """
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOT_TAKEN")]
    here = next(k for k, i in enumerate(code) if i.offset >= frame.f_lasti)
    # Where the truth is asked for by an instruction of its own, the jump follows it.
    jump = next((k for k in range(here, min(here + 3, len(code))) if "POP_JUMP" in code[k].opname), None)
    if jump is None:
        return None
    target = next((k for k, i in enumerate(code) if i.offset >= code[jump].argval), len(code))
    on_jump = "IF_TRUE" in code[jump].opname
    if _raises(code[jump + 1 :]):
        return on_jump
    return not on_jump if _raises(code[target:]) else None


def _raises(code: list[dis.Instruction]) -> bool:
    """Return whether ``code`` comes to a raise statement before anything else may happen."""
    for instruction in code:
        if instruction.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in instruction.opname or instruction.opname.startswith(("RETURN", "STORE", "FOR_ITER")):
            return False
    return False


# Functions that know nothing of proxies: those that fx wraps, and those of Python's that return only its own numbers.


def wrapped(function: Callable) -> Callable:
    """Return a function that is recorded where an argument is a proxy. fx's own expects a proxy back, no answer."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not (proxies := values_of(ExampleProxy, (args, kwargs))):
            return function(*args, **kwargs)
        if function in FACTORIES and not isinstance(args[0], tuple | list):
            args = (args,)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call


# torch looks for proxies in a tuple of sizes, but not in sizes given one by one.
FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)


class _NumberType(type):
    """A type that converts proxies symbolically and is its plain base for everything else."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _recorded(cls.__bases__[0], args, kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__bases__[0])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__bases__[0])


def _recorded(function: Callable, args: tuple, kwargs: dict) -> Any:
    if args and isinstance(args[0], ExampleProxy) and len(args[0].examples) > 1:
        return args[0].tracer.create_proxy("call_function", function, args, kwargs)
    return function(*args, **kwargs)


BUILTINS: dict[Any, Any] = {
    int: _NumberType("int", (int,), {}),
    float: _NumberType("float", (float,), {}),
    len: lambda *args: _recorded(len, args, {}),
}


@contextmanager
def replaced_builtins(namespaces: tuple[dict[str, Any], ...]) -> Iterator[None]:
    """Hide Python's `int`, `float` and `len` from these source files; names of their own stay."""
    hidden = [
        (space, function.__name__, other)
        for space in namespaces
        for function, other in BUILTINS.items()
        if function.__name__ not in space and hasattr(builtins, function.__name__)
    ]
    for space, name, other in hidden:
        space[name] = other
    try:
        yield
    finally:
        for space, name, _ in hidden:
            del space[name]
