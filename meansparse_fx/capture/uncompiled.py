"""Floor 2: functions that torch.compile or TorchScript have compiled, as the Python they were made from.

torch.fx cannot look into the one, and crashes in the other. Imports torch and floor 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CaptureError

_ScriptFunction = torch.jit.ScriptFunction
_CALL = _ScriptFunction.__call__


@contextmanager
def as_python() -> Iterator[None]:
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
