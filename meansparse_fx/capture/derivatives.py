"""Floor 2: what decides a derivative or a precision and is no operator call, as nodes of a trace.

Backwards of a model's own (`torch.autograd.Function`) are one call each. Gradient modes and autocast are calls, too,
where the model enters and leaves them. Checkpointing, which changes no derivative, is traced through. Imports torch.
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

import torch
from torch import Tensor, fx, nn
from torch.autograd import grad_mode
from torch.autograd.function import Function, FunctionMeta
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
_NO_SETUP = Function.setup_context  # of those whose forward takes the context
_enter_inference, _exit_inference = grad_mode._enter_inference_mode, grad_mode._exit_inference_mode
_AUTOCAST = torch.autocast.__enter__, torch.autocast.__exit__

# Given the Function, what runs its forward, and its arguments.
Apply = Callable[[type[Function], Callable[[], Any], tuple, dict], Any]

# Assigning to them is no operator call, and changes what others get who hold the tensor.
_ASSIGNMENTS = {
    "data": "it changes a value and no gradient: write x + (q(x) - x).detach(); give weights their values beforehand",
    "requires_grad": "it changes what gradients flow to: write x.detach()",
    "grad": "a graph has no gradients to change: write a torch.autograd.Function",
}


def enter_autocast(device: str, dtype: torch.dtype, enabled: bool, cache: bool) -> torch.autocast:
    """Begin to autocast; return what `leave_autocast` ends."""
    if torch.compiler.is_dynamo_compiling():
        return torch.amp.autocast_mode._enter_autocast(device, dtype, enabled, cache)
    mode = torch.autocast(device, dtype, enabled, cache)
    mode.__enter__()  # which torch's own function for graphs forgets in an export
    return mode


def leave_autocast(mode: torch.autocast) -> None:
    """Put autocast back as it was."""
    if torch.compiler.is_dynamo_compiling():
        torch.amp.autocast_mode._exit_autocast(mode)
    else:
        mode.__exit__(None, None, None)


# No operator may be moved over them.
MODE_CALLS = (_set_grad_enabled, _enter_inference, _exit_inference, enter_autocast, leave_autocast)


class GradMode(int):
    """Whether gradients are on, for a traced model to keep and to set again; the graph asks that when it runs."""

    node: fx.Node

    def __bool__(self) -> bool:
        raise TraceError("a branch asks whether gradients are wanted, which one graph cannot answer for all")


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
    thread, looking = threading.get_ident(), False
    answered: tuple[FrameType | None, int] = (None, 0)  # the call that `apply` answered last

    def meant(*values: Any) -> bool:
        found: list[bool] = []
        map_aggregate(values, lambda value: found.append(is_operand(value)))
        return any(found)

    def attribute(cls: type[Function], name: str) -> Any:
        nonlocal looking
        value = before(cls, name)
        if name not in ("setup_context", "forward") or threading.get_ident() != thread:
            return value
        takes_context = type.__getattribute__(cls, "setup_context") is _NO_SETUP
        if name == "setup_context":
            looking = True
            return value if takes_context else _unless(meant, value)
        if not looking:  # called by its name instead of applied: plain code
            return value
        caller = sys._getframe(1)
        call = caller, caller.f_lasti

        @functools.wraps(value)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal looking, answered
            looking = False
            given = args[1:] if takes_context else args
            run = functools.partial(value, *args, **kwargs)
            if not meant(given, kwargs):
                return run()
            result = apply(cls, run, given, kwargs)
            answered = call
            return result

        return forward

    with mock.patch.object(FunctionMeta, "__getattribute__", attribute, create=True):
        yield lambda frame: looking or (frame, frame.f_lasti) == answered


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
    names += ["a tensor hook"] * (register_hook in targets) + ["no_grad"] * (not targets.isdisjoint(MODE_CALLS[:3]))
    return list(dict.fromkeys(names))


def _unless(meant: Callable[..., bool], setup_context: Callable) -> Callable:
    @functools.wraps(setup_context)
    def setup(ctx: Any, inputs: Any, output: Any) -> Any:
        return None if meant(output) else setup_context(ctx, inputs, output)

    return setup


@contextmanager
def modes_as_calls(call: Callable[..., fx.Node], is_tracing: Callable[[], bool]) -> Iterator[None]:
    """Let modes that a model enters and leaves be calls in its graph, as in those of Dynamo and of export.

    Args:
        call: Makes a node, of a function and its arguments.
        is_tracing: Whether what runs now is traced; else modes are only what they are.
    """
    thread = threading.get_ident()

    def traced() -> bool:
        return threading.get_ident() == thread and is_tracing()

    def is_grad_enabled() -> Any:
        if not traced():
            return _is_grad_enabled()
        mode = GradMode(_is_grad_enabled())
        mode.node = call(_is_grad_enabled)
        return mode

    def set_grad_enabled(enabled: Any) -> None:
        _set_grad_enabled(int(enabled) != 0)
        if traced():
            call(_set_grad_enabled, enabled.node if isinstance(enabled, GradMode) else bool(enabled))

    def enter_inference(mode: bool) -> Any:
        return call(_enter_inference, mode) if traced() else _enter_inference(mode)

    def exit_inference(mode: Any) -> None:
        if isinstance(mode, fx.Node):
            call(_exit_inference, mode)
        else:
            _exit_inference(mode)

    def enter(self: torch.inference_mode) -> None:
        self._inference_mode_context = enter_inference(self.mode)

    def leave(self: torch.inference_mode, *error: Any) -> None:
        exit_inference(self._inference_mode_context)

    autocasts: list[fx.Node] = []

    def autocast(self: torch.autocast) -> Any:
        if traced():
            autocasts.append(call(enter_autocast, self.device, self.fast_dtype, self._enabled, self._cache_enabled))
        return _AUTOCAST[0](self)

    def autocast_no_more(self: torch.autocast, *error: Any) -> Any:
        if traced():
            call(leave_autocast, autocasts.pop())
        return _AUTOCAST[1](self, *error)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for owner, name, other in (
            (torch, "is_grad_enabled", is_grad_enabled),
            (torch._C, "_set_grad_enabled", set_grad_enabled),
            (grad_mode, "_enter_inference_mode", enter_inference),
            (grad_mode, "_exit_inference_mode", exit_inference),
            (torch.inference_mode, "__enter__", enter),
            (torch.inference_mode, "__exit__", leave),
            (torch.autocast, "__enter__", autocast),
            (torch.autocast, "__exit__", autocast_no_more),
        ):
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


class ModeCodeGen(CodeGen):
    """Writes a graph's forward so that a failure between two changes of a mode leaves that as it was."""

    def gen_fn_def(self, *args: Any, **options: Any) -> str:
        return f"@{keeping_modes.__name__}\n{super().gen_fn_def(*args, **options)}"

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [(keeping_modes.__name__, keeping_modes)]


def keeping_modes(forward: Callable) -> Callable:
    """Return a function that sets gradient mode and autocast back where it fails."""

    @functools.wraps(forward)
    def kept(*args: Any, **kwargs: Any) -> Any:
        before = _is_grad_enabled()
        try:
            return forward(*args, **kwargs)
        except BaseException as error:
            _set_grad_enabled(before)
            # What the generated code has entered and not left is held by its variables, in their order.
            if (own := error.__traceback__ and error.__traceback__.tb_next) is not None:
                for mode in reversed(own.tb_frame.f_locals.values()):
                    if isinstance(mode, torch.autocast):
                        leave_autocast(mode)
            raise

    return kept


def settle_modes(graph: fx.Graph) -> None:
    """Remove idle changes of the gradient mode and questions that nobody reads; let failures restore modes."""
    _remove_unread(graph)
    for node in graph.find_nodes(op="call_function", target=_set_grad_enabled):
        if node.next.target is _set_grad_enabled or node.args[0] is node.prev:  # changed again, or back to what was
            graph.erase_node(node)
    _remove_unread(graph)
    if any(graph.find_nodes(op="call_function", target=mode) for mode in (_set_grad_enabled, enter_autocast)):
        graph.set_codegen(ModeCodeGen())


def _remove_unread(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=_is_grad_enabled):
        if not node.users:
            graph.erase_node(node)


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
