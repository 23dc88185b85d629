"""Floor 2: what the forward that torch.fx generates of a captured graph does besides the graph's calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.graph import CodeGen

from ..rewrite import PREFIX
from .modes import leave_autocast

_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled  # not what tracing puts there


class CapturedCodeGen(CodeGen):
    """Writes a graph's forward so that it refuses what changed beside it.

    Args:
        modes: A failure between two changes of a mode leaves that as it was.
    """

    def __init__(self, modes: bool) -> None:
        super().__init__()
        self.modes = modes

    def gen_fn_def(self, *args: Any, **options: Any) -> str:
        before = f"@{keeping_modes.__name__}\n" * self.modes
        return f"{before}{super().gen_fn_def(*args, **options)}\n    {refuse_changes.__name__}(self)"

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [(f.__name__, f) for f in (keeping_modes, refuse_changes)]


def refuse_changes(model: nn.Module) -> None:
    """Raise StateError if what a transformed model's graph does not follow has become something else."""
    if (check := getattr(model._modules.get(PREFIX), "check", None)) is not None:
        check(model)


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
