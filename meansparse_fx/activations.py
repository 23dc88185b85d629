"""Floor 1: which calls are activations, and what each means to the kernels.

Tables of module types, functions and tensor methods; `register_activation` adds to them. Another activation is one line
in each that applies. Imports kernels and errors only.

What counts: elementwise non-linearities that a layer's output passes through (the paper: "before each activation").
What does not, because it makes a weight or a probability of its input and not a feature: Sigmoid, Hardsigmoid and
LogSigmoid, the softmax family, GLU, attention.

Fused is only what a row of the kernels has the bits of, so that a model at alpha = 0 equals its base exactly.
RobustBench's Swish, x * sigmoid(x), differs from torch's SiLU in the last bit, and has a row of its own; timm's Mish
has none, and keeps its code behind the bare operator, as does what models write out of other calls (`formulas`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from .arguments import items
from .errors import SiteError
from .hooks import has_own_forward
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


_Reader = Callable[[Any], ActivationCall | None]  # of a module; its attributes are known to the table alone


# Functions whose arguments decide which row they are.
_NAMES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gelu": lambda given: "gelu_tanh" if given.get("approximate") == "tanh" else "gelu",
    "hardtanh": lambda given: "relu6" if (given.get("min_val"), given.get("max_val")) == (0, 6) else "hardtanh",
    "threshold": lambda given: "relu" if (given.get("threshold"), given.get("value")) == (0, 0) else "threshold",
}


def _call(name: str, given: Mapping[str, Any], weight: Any, fused: bool = True) -> ActivationCall:
    """Return the activation that a function's arguments, or a module's attributes, make."""
    name = _NAMES[name](given) if name in _NAMES else name
    row, inplace = ACTIVATIONS.get(name) if fused else None, bool(given.get("inplace", False))
    if row is None:
        return ActivationCall(name, inplace=inplace, fused=False)
    constants = tuple(float(given.get(k, default)) for k, default in row.constants)
    return ActivationCall(name, constants, inplace, weight if row.weight_backward else None)


def _row(name: str, fused: bool = True) -> _Reader:
    """Return a reader of modules that are a row of the kernels, or keep their own code behind the bare operator."""
    return lambda module: _call(name, vars(module), "weight", fused)


def _squared(name: str) -> _Reader:
    # Working in place they leave relu(x) in their input and return something else: the ReLU inside is the site then.
    return lambda module: None if module.relu.inplace else ActivationCall(name, fused=False)


# Functions of timm's that take `inplace` and ignore it.
_NEVER_IN_PLACE = {"gelu", "gelu_tanh", "quick_gelu", "mish", "swish_me", "mish_me", "hard_swish_me", "hard_mish_me"}


def _gamma(module: Any) -> ActivationCall:
    # An activation, then its result times a constant, in place.
    function = getattr(module.act_fn, "__name__", "activation")
    ignored = function in _NEVER_IN_PLACE and module.act_fn.__module__.startswith("timm.")
    return ActivationCall(f"gamma_{function}", inplace=bool(module.inplace) and not ignored, fused=False)


# Module type -> reader of an instance. Exact types: a subclass may compute something else.
_MODULES: dict[type[nn.Module], _Reader] = {
    nn.ReLU: _row("relu"),
    nn.ReLU6: _row("relu6"),
    nn.LeakyReLU: _row("leaky_relu"),
    nn.PReLU: _row("prelu"),
    nn.ELU: _row("elu"),
    nn.GELU: _row("gelu"),
    nn.SiLU: _row("silu"),
    nn.Hardswish: _row("hardswish"),
    nn.Mish: _row("mish"),
    nn.Softplus: _row("softplus"),
    nn.Hardtanh: _row("hardtanh"),
    nn.Threshold: _row("threshold"),
    **{cls: _row(cls.__name__.lower()) for cls in (nn.CELU, nn.SELU, nn.RReLU, nn.Tanh, nn.Softsign)},
    **{cls: _row(cls.__name__.lower()) for cls in (nn.Tanhshrink, nn.Softshrink, nn.Hardshrink)},
}

_TIMM, _ROBUSTBENCH = "timm.layers.activations", "robustbench.model_zoo.architectures"

# The same by qualified name, for libraries that may not be installed.
_MODULES_BY_NAME: dict[str, _Reader] = {
    f"{_TIMM}.PReLU": _row("prelu"),
    f"{_TIMM}.GELU": _row("gelu"),
    f"{_TIMM}.GELUTanh": _row("gelu_tanh"),
    f"{_TIMM}.Tanh": _row("tanh", fused=False),
    f"{_TIMM}.QuickGELU": _row("quick_gelu", fused=False),
    f"{_TIMM}.Swish": _row("swish"),
    f"{_TIMM}.Mish": _row("mish", fused=False),
    f"{_TIMM}.HardSwish": _row("hardswish", fused=False),
    f"{_TIMM}.HardMish": _row("hard_mish", fused=False),
    f"{_TIMM}_me.SwishMe": _row("swish", fused=False),
    f"{_TIMM}_me.MishMe": _row("mish", fused=False),
    f"{_TIMM}_me.HardSwishMe": _row("hardswish", fused=False),
    f"{_TIMM}_me.HardMishMe": _row("hard_mish", fused=False),
    "timm.models.metaformer.SquaredReLU": _squared("squared_relu"),
    "timm.models.metaformer.StarReLU": _squared("star_relu"),
    "timm.models.nfnet.GammaAct": _gamma,
    **{f"{_ROBUSTBENCH}.{file}.Swish": _row("swish") for file in ("dm_wide_resnet", "dm_rn")},
    **{f"{_ROBUSTBENCH}.Meansparse_wrn_{size}_16.Swish": _row("swish") for size in (70, 94)},
    # Both its slope and its shift are learned; the kernels' row would freeze the shift at the value of the moment.
    f"{_ROBUSTBENCH}.paf_wide_resnet.PSSiLU": _row("pssilu", fused=False),
}

# Name, names of the scalar arguments in signature order after the input, functions. Those with an underscore take no
# ``inplace``, and so nothing in its place.
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("relu", "inplace", F.relu, F.relu_, torch.relu, torch.relu_),
    ("relu6", "inplace", F.relu6),
    ("leaky_relu", "negative_slope inplace", F.leaky_relu, F.leaky_relu_),
    ("prelu", "weight", F.prelu, torch.prelu),
    ("elu", "alpha inplace", F.elu, F.elu_),
    ("gelu", "approximate", F.gelu),
    ("silu", "inplace", F.silu),
    ("hardswish", "inplace", F.hardswish),
    ("mish", "inplace", F.mish),
    ("softplus", "beta threshold", F.softplus),
    ("hardtanh", "min_val max_val inplace", F.hardtanh, F.hardtanh_),  # torch.nn.ReLU6 calls it
    ("celu", "alpha inplace", F.celu, torch.celu, torch.celu_),
    ("selu", "inplace", F.selu, torch.selu, torch.selu_),
    ("rrelu", "lower upper training inplace", F.rrelu),
    ("rrelu", "lower upper training", torch.rrelu, torch.rrelu_),  # then a generator
    ("tanh", "", F.tanh, torch.tanh, torch.tanh_),
    ("softsign", "", F.softsign),
    ("tanhshrink", "", F.tanhshrink),
    ("softshrink", "lambd", F.softshrink),
    ("hardshrink", "lambd", F.hardshrink),
    ("threshold", "threshold value inplace", F.threshold, torch.threshold, torch.threshold_),
)
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    function: (name, tuple(parameters.split())) for name, parameters, *functions in _ROWS for function in functions
}

_METHODS = {f.__name__: row for f, row in _FUNCTIONS.items() if hasattr(torch.Tensor, f.__name__)}

_CALLABLES = (str, FunctionType, BuiltinFunctionType, OpOverload, OpOverloadPacket, torch.jit.ScriptFunction)
_REGISTERED_MODULES: dict[type[nn.Module], _Reader] = {}
_REGISTERED_CALLS: dict[Callable | str, ActivationCall] = {}


def register_activation(
    target: type[nn.Module] | Callable | str,
    name: str,
    *,
    constants: tuple[float, ...] | Callable[[nn.Module], tuple[float, ...]] = (),
    weight: str | None = None,
    fused: bool = False,
) -> None:
    """Make ``target`` an activation: each of its calls is a site from now on, and is not traced into.

    By default the operator goes before the call, which keeps its own code: right for every activation. It takes
    precedence over what this package knows of ``target``; instances of subclasses are not meant.

    Args:
        target: A module class; a function, torch's or your own, or an operator of a `torch.library`; or the name of a
            tensor's method. torch.compile looks into your own functions: there make it a module.
        name: What plans call it; where ``fused``, the row of the kernels that computes it
            (`meansparse_fx.kernels.reference.ACTIVATIONS`).
        constants: The row's scalar arguments, or a function that reads them off an instance of the class.
        weight: Name of the module's parameter that is the row's learned slope.
        fused: Let the kernels compute it, in one launch with the operator. At alpha = 0 the model then equals its base
            as closely as the row equals ``target``.

    Raises:
        SiteError: ``target`` is nothing that can be called in a graph, or the row is not as described.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> class MySwish(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.sigmoid(x)
        >>> msfx.register_activation(MySwish, "swish", fused=True)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), MySwish()).eval()
        >>> [(s.name, s.activation.name, s.activation.fused) for s in msfx.inspect(net, torch.rand(2, 1, 8, 8))]
        [('1', 'swish', True)]
    """
    constants = constants if callable(constants) else items(constants)
    if fused:
        _check_row(name, None if callable(constants) else constants, weight)
    if isinstance(target, type) and issubclass(target, nn.Module):

        def read(module: nn.Module) -> ActivationCall:
            values = constants(module) if callable(constants) else constants
            inplace = bool(getattr(module, "inplace", False))
            return ActivationCall(name, tuple(map(float, values)), inplace, weight, fused)

        _REGISTERED_MODULES[target] = read
    elif isinstance(target, type | nn.Module) or not (callable(target) or isinstance(target, str)):
        raise SiteError(f"activation {name!r}: {target!r} is no module class, function or name of a method")
    elif isinstance(target, MethodDescriptorType):
        raise SiteError(f"activation {name!r}: a tensor's method is known by its name: {target.__name__!r}")
    elif not isinstance(target, _CALLABLES) or getattr(target, "__name__", "") == "<lambda>":
        raise SiteError(f"activation {name!r}: no graph can name {target!r}; write it with def, or as a module class")
    elif callable(constants) or weight is not None:
        raise SiteError(f"activation {name!r}: only a module class has a weight, or constants to read off")
    else:
        _REGISTERED_CALLS[target] = ActivationCall(name, tuple(map(float, constants)), fused=fused)


def registered_functions() -> list[Callable]:
    """Return the functions that `register_activation` was given."""
    return [target for target in _REGISTERED_CALLS if not isinstance(target, str)]


def _check_row(name: str, constants: tuple[float, ...] | None, weight: str | None) -> None:
    row = ACTIVATIONS.get(name)
    if row is None:
        raise SiteError(f"the kernels have no activation {name!r}; they have {', '.join(ACTIVATIONS)}. Drop fused=True")
    if constants is not None and len(constants) != len(row.constants):
        wanted = ", ".join(c for c, _ in row.constants) or "none"
        raise SiteError(f"activation {name!r}: {len(constants)} constants given, the kernels' row takes {wanted}")
    if (row.weight_backward is None) != (weight is None):
        has = "has no" if row.weight_backward is None else "has a"
        raise SiteError(f"activation {name!r}: the kernels' row {has} learned slope; weight is {weight!r}")


def match_module(module: nn.Module) -> ActivationCall | None:
    """Return the activation that calling ``module`` makes, or None: of one with a forward of its own, too."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    reader = _REGISTERED_MODULES.get(cls) or _MODULES.get(cls) or _MODULES_BY_NAME.get(name)
    return None if reader is None or has_own_forward(module) else reader(module)


def match_function(target: Callable | str, args: tuple, kwargs: dict) -> ActivationCall | None:
    """Return the activation that calling a function, or a tensor method by its name, makes, or None.

    Args:
        args: Positional arguments, the input first; may hold graph nodes.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if (registered := _REGISTERED_CALLS.get(target)) is not None:
        return replace(registered, inplace=bool(kwargs.get("inplace", False)) or name.endswith("_"))
    if isinstance(target, OpOverload | OpOverloadPacket):  # torch.ops.aten.relu, whose arguments may be others
        space, name = str(target).split(".")[:2]
        function = getattr(F, name.removesuffix("_"), None) if space == "aten" else None
        row = None if function is None else _FUNCTIONS.get(function)
        return row and ActivationCall(row[0], inplace=name.endswith("_"), fused=False)
    row = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    if row is None:
        return None
    given = dict(zip(row[1], args[1:], strict=False)) | kwargs
    if name.endswith("_"):
        given["inplace"] = True
    return _call(row[0], given, given.get("weight"))
