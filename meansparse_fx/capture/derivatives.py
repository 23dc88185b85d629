"""Floor 2: what decides a derivative and is no operator call, as nodes of a trace.

Backwards of a model's own (`torch.autograd.Function`) are one call each. Checkpointing, which changes no derivative, is
traced through.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

from torch import Tensor, fx, nn
from torch.autograd.function import Function, FunctionMeta
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from .modes import GRAD_MODE_CALLS

_NO_SETUP = Function.setup_context  # of those whose forward takes the context

# Given the Function, what runs its forward, and its arguments.
Apply = Callable[[type[Function], Callable[[], Any], tuple, dict], Any]

# Assigning to them is no operator call, and changes what others get who hold the tensor.
_ASSIGNMENTS = {
    "data": "it changes a value and no gradient: write x + (q(x) - x).detach(); give weights their values beforehand",
    "requires_grad": "it changes what gradients flow to: write x.detach()",
    "grad": "a graph has no gradients to change: write a torch.autograd.Function",
}


def check_question(attribute: str) -> None:
    """Raise TraceError if reading an attribute of a tensor asks whether gradients are wanted."""
    if attribute in {"grad_fn", "requires_grad", "grad", "is_leaf"}:  # an attack wants them, an evaluation does not
        raise TraceError(f".{attribute} asks whether gradients are wanted, which one graph cannot answer for all")


class ModelProxy(fx.Proxy):
    """Stands for a tensor; refuses assignments that a graph would lose, and questions that it cannot answer."""

    def __getattr__(self, k: str) -> Any:
        check_question(k)
        return super().__getattr__(k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ASSIGNMENTS:
            raise TraceError(f"an assignment to .{name}, which no graph holds; {_ASSIGNMENTS[name]}")
        super().__setattr__(name, value)


def register_hook(tensor: Tensor, hook: Callable) -> Any:
    """Let ``hook`` see, and replace, the gradient of ``tensor``, if it gets one: a graph is run without gradients, too.

    Returns:
        The handle that removes it.
    """
    return tensor.register_hook(hook) if tensor.requires_grad else RemovableHandle(OrderedDict())


def check_hook(hook: Any) -> None:
    """Raise TraceError if a tensor hook holds what belongs to the trace: it would outlive that in the graph."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells] + list(getattr(function, "__defaults__", None) or ())
    held += [getattr(function, "__self__", None)]
    if isinstance(hook, functools.partial):
        held += [*hook.args, *hook.keywords.values()]
    for thing in held:
        if isinstance(thing, fx.Proxy | nn.Module | Tensor):
            kind = "a tensor that the model computes" if isinstance(thing, fx.Proxy) else type(thing).__name__
            raise TraceError(
                f"a tensor hook holds {kind}, which is another one in a copy of the model: write it as a "
                "torch.autograd.Function, or let it hold plain numbers"
            )


@contextmanager
def applied_by(apply: Apply, is_operand: Callable[[Any], bool]) -> Iterator[Callable[[FrameType], bool]]:
    """Let ``apply`` answer where a `torch.autograd.Function` is applied to operands of its.

    ``Function.apply`` is written in C, and a model may hold it under any name. What it asks of the class that it is
    applied to goes through the class's type, in this order: `setup_context`, the arguments' classes, `forward`; in the
    end come the classes of what that returned.

    Args:
        apply: Called in the place of the forward.
        is_operand: Whether an argument is one for ``apply``.

    Yields:
        Whether code in C that applies a Function, called by a frame, looks at its arguments or results now. What says
        then that it is a tensor is taken for one, and its memory read.
    """
    before = vars(FunctionMeta).get("__getattribute__", type.__getattribute__)
    thread, classes_are_read = threading.get_ident(), False
    answered: tuple[FrameType | None, int] = (None, 0)  # the call that `apply` answered last

    def meant(*values: Any) -> bool:
        found: list[bool] = []
        map_aggregate(values, lambda value: found.append(is_operand(value)))
        return any(found)

    def attribute(cls: type[Function], name: str) -> Any:
        nonlocal classes_are_read
        value = before(cls, name)
        if name not in ("setup_context", "forward") or threading.get_ident() != thread:
            return value
        takes_context = type.__getattribute__(cls, "setup_context") is _NO_SETUP
        if name == "setup_context":
            classes_are_read = True
            return value if takes_context else _unless(meant, value)
        if not classes_are_read:  # called by its name instead of applied: plain code
            return value
        caller = sys._getframe(1)
        call = caller, caller.f_lasti

        @functools.wraps(value)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal classes_are_read, answered
            classes_are_read = False
            given = args[1:] if takes_context else args
            run = functools.partial(value, *args, **kwargs)
            if not meant(given, kwargs):
                return run()
            result = apply(cls, run, given, kwargs)
            answered = call
            return result

        return forward

    with mock.patch.object(FunctionMeta, "__getattribute__", attribute, create=True):
        yield lambda frame: classes_are_read or (frame, frame.f_lasti) == answered


def applied_functions(graph_module: fx.GraphModule) -> dict[fx.Node, type[Function]]:
    """Return the `torch.autograd.Function` that a node applies, for those that apply one."""
    nodes = graph_module.graph.find_nodes(op="call_method", target="apply")
    sources: dict[fx.Node, Any] = {n: n.args[0] for n in nodes}
    known: dict[fx.Node, Any] = {
        n: getattr(graph_module, source.target, None) for n, source in sources.items() if source.op == "get_attr"
    }
    return {node: function for node, function in known.items() if isinstance(function, type(Function))}


def own_derivatives(graph_module: fx.GraphModule) -> list[str]:
    """Return the names of what decides derivatives in a graph beside its operators, each once."""
    names = [function.__qualname__ for function in applied_functions(graph_module).values()]
    targets = {node.target for node in graph_module.graph.nodes}
    names += ["a tensor hook"] * (register_hook in targets) + ["no_grad"] * (not targets.isdisjoint(GRAD_MODE_CALLS))
    return list(dict.fromkeys(names))


def _unless(meant: Callable[..., bool], setup_context: Callable) -> Callable:
    @functools.wraps(setup_context)
    def setup(ctx: Any, inputs: Any, output: Any) -> Any:
        return None if meant(output) else setup_context(ctx, inputs, output)

    return setup


class _PlainCheckpoint:
    @staticmethod
    def apply(function: Callable, preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Let `torch.utils.checkpoint` just call what it is given: values and derivatives are the same."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpoint, "CheckpointFunction", _PlainCheckpoint))
        for name in _CHECKPOINTS:
            if hasattr(checkpoint, name):  # the second since torch 2.12 or so
                stack.enter_context(mock.patch.object(checkpoint, name, _nothing_around))
        yield
