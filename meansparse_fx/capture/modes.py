"""Floor 2: modes of torch: those that a model enters and leaves, as calls in its graph, and one that hides calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.autograd import grad_mode
from torch.fx.proxy import TraceError

_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
_enter_inference, _exit_inference = grad_mode._enter_inference_mode, grad_mode._exit_inference_mode
_AUTOCAST = torch.autocast.__enter__, torch.autocast.__exit__


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


GRAD_MODE_CALLS = (_set_grad_enabled, _enter_inference, _exit_inference)
# No operator may be moved over them.
MODE_CALLS = (*GRAD_MODE_CALLS, enter_autocast, leave_autocast)


class GradMode(int):
    """Whether gradients are on, for a traced model to keep and to set again; the graph asks that when it runs."""

    node: fx.Node

    def __bool__(self) -> bool:
        raise TraceError("a branch asks whether gradients are wanted, which one graph cannot answer for all")


@contextmanager
def modes_as_calls(call: Callable[..., fx.Node], is_tracing: Callable[[], bool]) -> Iterator[None]:
    """Let modes that a model enters and leaves be calls in its graph, as in those of Dynamo and of export.

    Args:
        call: Makes a node, of a function and its arguments.
        is_tracing: Whether what runs now is traced; else modes are only what they are.
    """
    torch.overrides.get_overridable_functions()  # kept for ever once torch asks for it: not with what stands in here
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


def tidy_modes(graph: fx.Graph) -> bool:
    """Remove idle changes of the gradient mode and questions that nobody reads; return whether changes are left."""
    _remove_unread(graph)
    for node in graph.find_nodes(op="call_function", target=_set_grad_enabled):
        if node.next.target is _set_grad_enabled or node.args[0] is node.prev:  # changed again, or back to what was
            graph.erase_node(node)
    _remove_unread(graph)
    return any(graph.find_nodes(op="call_function", target=mode) for mode in (_set_grad_enabled, enter_autocast))


def _remove_unread(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=_is_grad_enabled):
        if not node.users:
            graph.erase_node(node)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Turn off torch's fused transformer layers, which show no activation and round differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
