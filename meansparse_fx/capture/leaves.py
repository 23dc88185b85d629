"""Floor 2: which modules a trace goes into, and which it calls as they are. timm is looked up, never imported."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import fx, nn

from ..activations import match_module
from ..hooks import has_hooks_of_the_model, has_own_forward
from ..published import published_operator

# Their fused inference path shows no activation to anyone, so they are traced through or refused, never leaves.
_HIDING = (nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def timm_registry() -> ModuleType | None:
    """Return where timm lists what must not be traced into, if a model of it can be about; timm 1.0.9 has it there."""
    for name in ("timm.layers", "timm.models._features_fx"):
        if hasattr(module := sys.modules.get(name), "get_notrace_functions"):
            return module
    return None


def is_leaf(module: nn.Module, marked: frozenset[type], of_torch: bool) -> bool:
    """Return whether a trace calls a module as it is.

    Args:
        marked: Types of modules not to trace into, whosever they are.
        of_torch: torch.fx would call it as it is, as it does with torch.nn's own.
    """
    if has_hooks_of_the_model(module) and type(module) not in marked:
        return False  # feature extractors read what the hook kept, so it has to see what is traced
    held = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
    if any(isinstance(value, fx.Proxy) for value in held):
        return False  # forward gave it a weight
    if match_module(module) is not None or published_operator(module) is not None:
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return True
    whole = of_torch and not has_own_forward(module)
    return (whole or type(module) in marked or _asks_for_types(module)) and not hides_activations(module)


def hides_activations(module: nn.Module) -> bool:
    """Return whether calling a module as it is would hide an activation in it."""
    return any(match_module(m) is not None or isinstance(m, _HIDING) for m in module.modules())


def _asks_for_types(module: nn.Module) -> bool:
    """Return whether a module is of `torchvision.transforms`, of which some leave everything but tensors alone."""
    return any(kind.__module__.startswith("torchvision.transforms.") for kind in type(module).__mro__)
