"""Floor 2: how many activations a model calls, how many a graph shows, and which its leaves write out."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..activations import match_function, match_module
from ..dataless import tensors
from ..formulas import FEATURES, POINTS, formula_of
from ..hook_refusals import allow_hooks
from ..published import published_operator
from .derivatives import applied_by

_STEPS = 12  # of calls that an activation is written out of, at most


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
                allow_hooks(module)  # of a graph that does not call it, as `restore` returns them: hooks are refused
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


class WrittenOut(TorchFunctionMode):
    """Finds activations that a graph's leaves write out: what tensors are as functions of earlier ones, at `POINTS`.

    Attributes:
        leaves: The modules looked into, by path: neither torch.nn's, nor TorchScript, nor in a table.
        found: What they compute of `formulas.FEATURES`, in words.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        called = {
            n.target: graph_module.get_submodule(n.target) for n in graph_module.graph.find_nodes(op="call_module")
        }
        self.leaves = {path: module for path, module in called.items() if _is_python(module)}
        self.found: dict[str, None] = {}
        self._inside = ""
        self._known: dict[int, tuple[Tensor, dict[object, Tensor]]] = {}  # a tensor's values, by the one it starts from
        self._hooks = ExitStack()
        for path, module in self.leaves.items():
            enter = partial(self._enter, f"{path} ({type(module).__name__})")
            self._hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.enter_context(module.register_forward_hook(lambda *_: self._look(""), prepend=True))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _enter(self, inside: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # What is given no tensor computes nothing of the images: a table of positions.
        self._look(inside if tensors((args, kwargs)) else "")

    def _look(self, inside: str) -> None:
        self._inside = inside
        self._known.clear()

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = args[0] if result is None and args else result  # x[mask] = 0 returns nothing
        if self._inside and isinstance(written, Tensor) and written.numel() > 1:
            functions = self._functions(func, args, kwargs or {}, written.shape)
            for values in functions.values():
                if values.is_floating_point() and (name := formula_of(values.double(), FEATURES)):
                    self.found[f"a {name} in {self._inside}"] = None
            self._known[id(written)] = written, {**functions, object(): POINTS}
        return result

    def _functions(self, func: Callable, args: tuple, kwargs: dict, shape: torch.Size) -> dict[object, Tensor]:
        """Return the values of a call's result by where they start, if it computes number by number."""
        operands = [t for t in tensors((args, kwargs)) if t.numel() > 1]
        known = {id(t): self._known.setdefault(id(t), (t, {object(): POINTS}))[1] for t in operands}
        functions: dict[object, Tensor] = {}
        if not known or any(t.shape != shape for t in operands):
            return functions
        for start in list(next(iter(known.values())))[-_STEPS:]:
            with suppress(Exception):  # not of the same start, or no function of a number
                given = {key: values[start].clone() for key, values in known.items()}
                own = pytree.tree_map(lambda v, given=given: given.get(id(v), v), (args, kwargs))
                values = func(*own[0], **own[1])
                values = own[0][0] if values is None else values
                if values.shape == POINTS.shape:
                    functions[start] = values
        return functions


def _is_python(module: nn.Module) -> bool:
    known = match_module(module) is not None or published_operator(module) is not None
    return (
        not known
        and not isinstance(module, torch.jit.ScriptModule)
        and not type(module).__module__.startswith("torch.nn.")
    )
