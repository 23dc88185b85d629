"""Floor 1: modules that refuse hooks, calls and what is put in their place, because a graph does not call them.

Or each of these would change nothing, silently.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .errors import StateError
from .hooks import FORWARD, RUNNING


class NoHooks(OrderedDict):
    """In the place of a module's hooks: refuses them, because a graph does not call the module, and calls of it."""

    reason: str
    call: str | None = None

    def __setitem__(self, number: int, hook: Callable) -> None:
        raise StateError(self.reason)

    def __bool__(self) -> bool:
        """Return False, as every call asks whether there are hooks, or refuse the call."""
        if self.call is not None:
            raise StateError(self.call)
        return False


def forbid_hooks(module: nn.Module, reason: str, call: str | None = None) -> None:
    """Refuse hooks from now on, with a reason, and another module in its place; calls too if there is a reason."""
    for kind in RUNNING:
        own = module.__dict__[kind] = NoHooks()
        own.reason = reason
        # Of the four that a call asks for; torch.jit.trace asks for the backward hooks of every module.
        own.call = call if kind == "_forward_pre_hooks" else None


def callable_copy(module: nn.Module) -> nn.Module:
    """Return a copy that takes hooks and calls, sharing parameters and buffers."""
    own = copy.copy(module)
    allow_hooks(own)
    return own


def _refuse_change(parent: nn.Module, name: str, value: nn.Module | nn.Parameter | None) -> None:
    if torch.compiler.is_compiling():  # Dynamo, which cannot follow what is asked here, makes a module
        return
    if isinstance(value, nn.Parameter):  # a second name: pruning computes the first from it, in a hook
        second = any(p is value and n != name for n, p in parent._parameters.items())
        held, change = parent if second else None, "prune it"
    else:
        held, change = parent._modules.get(name), "put another module there"
    hooks = None if held is None or held is value else held.__dict__.get(FORWARD[0])
    if isinstance(hooks, NoHooks):
        raise StateError(f"{hooks.reason.partition(':')[0]}: {change} in the base, and transform that")


# Or they would change nothing, silently.
torch_module.register_module_module_registration_hook(_refuse_change)
torch_module.register_module_parameter_registration_hook(_refuse_change)


def allow_hooks(module: nn.Module) -> None:
    """Take hooks again."""
    for kind in RUNNING:
        if isinstance(module.__dict__[kind], NoHooks):
            module.__dict__[kind] = OrderedDict()
