"""Who computes the operator: what was asked for, what a tensor is fit for, and who observes the call.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from . import compiled, layout

_PLAIN = (Tensor, Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._are_functorch_transforms_active
_jit_traces = torch._C._is_tracing


def lowering() -> str:
    """Return the lowering asked for by MEANSPARSE_FX_LOWERING: ``auto`` (default), ``triton`` or ``eager``."""
    choice = os.environ.get("MEANSPARSE_FX_LOWERING", "auto")
    if choice not in ("auto", "triton", "eager"):
        raise ValueError(f"MEANSPARSE_FX_LOWERING={choice!r}: expected auto, triton or eager")
    return choice


def lowering_of(x: Tensor, channel_dim: int, weight: Tensor | None = None, choice: str | None = None) -> str:
    """Return what computes the operator by itself on x: ``triton``, ``compiled`` or ``eager``."""
    choice = choice or lowering()
    if choice == "triton" or (choice == "auto" and x.is_cuda and x.dtype in layout.DTYPES):
        return "triton"
    if choice == "auto" and x.device.type == "cpu" and compiled.takes(x, channel_dim, weight):
        return "compiled"
    return "eager"


def is_observed(x: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None) -> bool:
    """Return whether somebody observes or transforms what is done with these: a transform of torch.func, forward-mode
    differentiation, a mode, a tracer, a subclass, or a view whose memory holds other values: ``z.conj().imag``'s are
    negated. Not a profiler, which changes nothing.
    """
    return (
        type(x) not in _PLAIN
        or x.is_neg()
        or (residual is not None and (type(residual) not in _PLAIN or residual.is_neg()))
        or (shortcut is not None and (type(shortcut) not in _PLAIN or shortcut.is_neg()))
        or _dispatch_modes() > 0
        or (_function_mode() and _function_mode_observes())
        or is_followed()
    )


def is_followed() -> bool:
    """Return whether transforms of torch.func, forward-mode derivatives or torch.jit.trace follow what is computed."""
    return _transforms() or forward_ad._current_level >= 0 or _jit_traces()


def _function_mode_observes() -> bool:
    # torch.set_default_device is a mode, too.
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())
