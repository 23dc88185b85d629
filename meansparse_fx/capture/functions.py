"""Floor 2: functions registered as activations, each call of one a single node, under whatever name a model holds it.

torch.fx follows a plain function into its body, and its own `wrap` sees only the names of one module's globals. What
all names share is the function's code, which here is another while a model is traced. Functions that torch.compile or
TorchScript have compiled are the Python they were made from: torch.fx cannot look into the one, and crashes in the
other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from ..errors import CaptureError

T = TypeVar("T")
_ScriptFunction = torch.jit.ScriptFunction
_CALL = _ScriptFunction.__call__


def values_of(kind: type[T], arguments: Any) -> list[T]:
    """Return the values of a kind in arguments that a graph can hold."""
    found: list[T] = []
    map_aggregate(arguments, lambda value: found.append(value) if isinstance(value, kind) else None)
    return found


@contextmanager
def as_single_calls(functions: Iterable[Callable], call: Callable[[Callable, tuple, dict], Any]) -> Iterator[None]:
    """Let ``call(function, args, kwargs)`` answer where one of these functions is given a proxy."""
    codes = {function: function.__code__ for function in functions if isinstance(function, FunctionType)}
    try:
        for function, code in codes.items():
            function.__code__ = _relaying(_answer(function, call), code)
        yield
    finally:
        for function, code in codes.items():
            function.__code__ = code


def _answer(function: FunctionType, call: Callable[[Callable, tuple, dict], Any]) -> Callable[[tuple, dict], Any]:
    own = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__

    def answer(args: tuple, kwargs: dict) -> Any:
        return call(function, args, kwargs) if values_of(fx.Proxy, (args, kwargs)) else own(*args, **kwargs)

    return answer


def _relay(*args: Any, **kwargs: Any) -> Any:
    answer: Any = "answer"
    return answer(args, kwargs)


def _relaying(answer: Callable[[tuple, dict], Any], instead_of: CodeType) -> CodeType:
    """Return code that calls ``answer(args, kwargs)`` and fits a function with that code's closure."""
    constants = tuple(answer if constant == "answer" else constant for constant in _relay.__code__.co_consts)
    return _relay.__code__.replace(co_consts=constants, co_freevars=instead_of.co_freevars)


@contextmanager
def expanded_by_tuples() -> Iterator[None]:
    """Give `Tensor.expand` its sizes as one tuple: given one by one, torch does not see that one is a proxy."""
    expand = Tensor.expand

    def by_tuple(tensor: Tensor, *size: Any, **options: Any) -> Any:
        whole = size if len(size) != 1 or isinstance(size[0], fx.Proxy) else size[0]
        given = (tensor, whole) if size else (tensor,)
        if proxies := values_of(fx.Proxy, (given, options)):  # torch would record this function, which no file can hold
            return proxies[0].tracer.create_proxy("call_method", "expand", given, options)
        return expand(*given, **options)

    with mock.patch.object(Tensor, "expand", by_tuple):
        yield


@contextmanager
def without_compilers() -> Iterator[None]:
    """Run what torch.compile made eagerly, and trace through it and through functions of TorchScript."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_ScriptFunction, "__call__", _call))
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:  # or there is nothing compiled; it takes a second
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs))):
        return _CALL(function, *args, **kwargs)
    original = getattr(function, "_torchdynamo_inline", None)
    if original is None:
        raise CaptureError(
            f"{function.name} is a function of TorchScript, without its Python: call the one it was made from"
        )
    return original(*args, **kwargs)
