"""Floor 2: how many activations a model calls, and how many a graph shows. Imports torch, `derivatives` and floor 1."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..activations import match_function, match_module
from ..formulas import FEATURES, POINTS, formula_of
from .derivatives import applied_by


def count_activations(graph_module: fx.GraphModule) -> int:
    """Return how many calls of known activations the graph makes."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    nodes = graph_module.graph.nodes
    functions = sum(_is_activation(n.target) for n in nodes if n.op in ("call_function", "call_method"))
    return functions + sum(match_module(modules[n.target]) is not None for n in nodes if n.op == "call_module")


def _is_activation(target: Callable | str) -> bool:
    return match_function(target, (), {}) is not None  # whatever its arguments


def hides_an_activation(function: type[torch.autograd.Function], others: tuple) -> bool:
    """Return whether a `torch.autograd.Function` computes a function of `formulas.FEATURES`, in whatever calls.

    Args:
        function: One whose forward is known to be made of torch's operators alone: it is run on a few numbers.
        others: What it is given besides its first argument.
    """
    try:
        with torch.no_grad():
            values = function.apply(POINTS.clone(), *others)
        return values.shape == POINTS.shape and formula_of(values, FEATURES) is not None
    except Exception:  # no function of a number, or of other arguments
        return False


class ActivationCounter(TorchFunctionMode):
    """Counts the activations that a model calls: its activation modules, and outside of them the functions.

    Inside ``__torch_function__`` the mode is off, so a function that calls another counts once. A
    `torch.autograd.Function` whose forward calls some counts once, too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._count = 0
        self._depth = 0
        self._own_backwards: set[type] = set()
        self._watching = ExitStack()
        for module in model.modules():
            if match_module(module) is not None:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, prepend=True)  # its own hooks call what they call

    def found(self) -> tuple[int, frozenset[type]]:
        """Return how many there were since the mode was entered, and the Functions that call some."""
        return self._count, frozenset(self._own_backwards)

    def __enter__(self) -> ActivationCounter:
        self._count = 0
        self._watching.enter_context(applied_by(self._apply, lambda value: isinstance(value, Tensor)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._watching.close()

    def _apply(self, function: type, run: Callable[[], Any], args: tuple, kwargs: dict) -> Any:
        before = self._count
        result = run()
        if self._count > before:
            self._count = before + 1
            self._own_backwards.add(function)
        return result

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._count += self._depth == 0
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        target = func.__name__ if isinstance(func, types.MethodDescriptorType) else func
        if self._depth == 0 and _is_activation(target):
            self._count += 1
        return func(*args, **kwargs)
