"""Floor 1: which calls are activations, and what each means to the kernels.

One table a dialect: module types, functions and tensor methods. Another activation is one line in each
that applies. Imports kernels only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .kernels.reference import ACTIVATIONS


@dataclass(frozen=True, slots=True)
class ActivationCall:
    """An activation as one call makes it.

    Attributes:
        name: Row of the kernels' table, or the custom activation's own name when it has no row.
        constants: Scalar arguments in the row's order.
        inplace: The original call overwrites its input.
        weight: The learned slope, if any: the name of the module's parameter, or the function's argument (a node).
        fused: The kernels compute it; otherwise the bare operator runs before the original call.
    """

    name: str
    constants: tuple[float, ...] = ()
    inplace: bool = False
    weight: Any = None
    fused: bool = True


def _gelu_name(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


# Module type -> (name, constants) read off the instance. Exact types: a subclass may compute something else.
_MODULES: dict[type[nn.Module], Callable[[nn.Module], tuple[str, tuple[float, ...]]]] = {
    nn.ReLU: lambda m: ("relu", ()),
    nn.ReLU6: lambda m: ("relu6", ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", (m.negative_slope,)),
    nn.PReLU: lambda m: ("prelu", ()),
    nn.ELU: lambda m: ("elu", (m.alpha,)),
    nn.GELU: lambda m: (_gelu_name(m.approximate), ()),
    nn.SiLU: lambda m: ("silu", ()),
    nn.Hardswish: lambda m: ("hardswish", ()),
    nn.Mish: lambda m: ("mish", ()),
    nn.Softplus: lambda m: ("softplus", (float(m.beta), float(m.threshold))),
}

# The same by qualified name, for libraries that may not be installed.
_MODULES_BY_NAME: dict[str, Callable[[nn.Module], tuple[str, tuple[float, ...]]]] = {
    "timm.layers.activations.Swish": lambda m: ("silu", ()),
    "timm.layers.activations.Mish": lambda m: ("mish", ()),
    "timm.layers.activations.HardSwish": lambda m: ("hardswish", ()),
    "timm.layers.activations.PReLU": lambda m: ("prelu", ()),
    "timm.layers.activations.GELU": lambda m: ("gelu", ()),
    "timm.layers.activations.GELUTanh": lambda m: ("gelu_tanh", ()),
}

# Function -> (name, names of its scalar arguments in signature order after the input).
_FUNCTIONS: dict[Callable, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    F.relu_: ("relu", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu6: ("relu6", ("inplace",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.prelu: ("prelu", ("weight",)),
    torch.prelu: ("prelu", ("weight",)),
    F.elu: ("elu", ("alpha", "inplace")),
    F.elu_: ("elu", ("alpha",)),
    F.gelu: ("gelu", ("approximate",)),
    F.silu: ("silu", ("inplace",)),
    F.hardswish: ("hardswish", ("inplace",)),
    F.mish: ("mish", ("inplace",)),
    F.softplus: ("softplus", ("beta", "threshold")),
}

_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    "prelu": ("prelu", ("weight",)),
}


def match_module(module: nn.Module) -> ActivationCall | None:
    """Return the activation that calling ``module`` makes, or None."""
    cls = type(module)
    reader = _MODULES.get(cls) or _MODULES_BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    if reader is None:
        return None
    name, constants = reader(module)
    inplace = bool(getattr(module, "inplace", False))
    return ActivationCall(name, constants, inplace, weight="weight" if name == "prelu" else None)


def match_function(target: Callable | str, args: tuple, kwargs: dict) -> ActivationCall | None:
    """Return the activation that calling a function, or a tensor method by its name, makes, or None.

    Args:
        args: Positional arguments, the input first; may hold graph nodes.
    """
    row = (_METHODS if isinstance(target, str) else _FUNCTIONS).get(target)
    if row is None:
        return None
    name, parameters = row
    given = dict(zip(parameters, args[1:], strict=False)) | kwargs
    if name == "gelu":
        name = _gelu_name(given.get("approximate", "none"))
    spelled = target if isinstance(target, str) else getattr(target, "__name__", "")
    inplace = bool(given.get("inplace", False)) or spelled.endswith("_")
    constants = tuple(float(given.get(k, default)) for k, default in ACTIVATIONS[name].constants)
    return ActivationCall(name, constants, inplace, weight=given.get("weight"))
