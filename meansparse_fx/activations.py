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


def _fused(name: str, *constants: str, weight: str | None = None) -> _Reader:
    """Return a reader of modules that are a row of the kernels; ``constants`` are their attributes, in its order."""

    def read(module: nn.Module) -> ActivationCall:
        values = tuple(float(getattr(module, c)) for c in constants)
        return ActivationCall(name, values, bool(getattr(module, "inplace", False)), weight)

    return read


def _bare(name: str) -> _Reader:
    """Return a reader of modules that keep their own code, behind the bare operator."""
    return lambda module: ActivationCall(name, inplace=bool(getattr(module, "inplace", False)), fused=False)


# Functions whose arguments decide which row they are.
_NAMES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gelu": lambda given: "gelu_tanh" if given.get("approximate") == "tanh" else "gelu",
    "hardtanh": lambda given: "relu6" if (given.get("min_val"), given.get("max_val")) == (0, 6) else "hardtanh",
    "threshold": lambda given: "relu" if (given.get("threshold"), given.get("value")) == (0, 0) else "threshold",
}


def _named(name: str) -> _Reader:
    """Return a reader of modules whose attributes decide which row they are, as a function's arguments do."""

    def read(module: nn.Module) -> ActivationCall:
        own = _NAMES[name](vars(module))
        return ActivationCall(own, inplace=bool(getattr(module, "inplace", False)), fused=own in ACTIVATIONS)

    return read


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
    nn.ReLU: _fused("relu"),
    nn.ReLU6: _fused("relu6"),
    nn.LeakyReLU: _fused("leaky_relu", "negative_slope"),
    nn.PReLU: _fused("prelu", weight="weight"),
    nn.ELU: _fused("elu", "alpha"),
    nn.GELU: _named("gelu"),
    nn.SiLU: _fused("silu"),
    nn.Hardswish: _fused("hardswish"),
    nn.Mish: _fused("mish"),
    nn.Softplus: _fused("softplus", "beta", "threshold"),
    nn.Hardtanh: _named("hardtanh"),
    nn.Threshold: _named("threshold"),
    **{cls: _bare(cls.__name__.lower()) for cls in (nn.CELU, nn.SELU, nn.RReLU, nn.Tanh, nn.Softsign)},
    **{cls: _bare(cls.__name__.lower()) for cls in (nn.Tanhshrink, nn.Softshrink, nn.Hardshrink)},
}

_TIMM, _ROBUSTBENCH = "timm.layers.activations", "robustbench.model_zoo.architectures"

# The same by qualified name, for libraries that may not be installed.
_MODULES_BY_NAME: dict[str, _Reader] = {
    f"{_TIMM}.PReLU": _fused("prelu", weight="weight"),
    f"{_TIMM}.GELU": _fused("gelu"),
    f"{_TIMM}.GELUTanh": _fused("gelu_tanh"),
    f"{_TIMM}.Tanh": _bare("tanh"),
    f"{_TIMM}.QuickGELU": _bare("quick_gelu"),
    f"{_TIMM}.Swish": _fused("swish"),
    f"{_TIMM}.Mish": _bare("mish"),
    f"{_TIMM}.HardSwish": _bare("hardswish"),
    f"{_TIMM}.HardMish": _bare("hard_mish"),
    f"{_TIMM}_me.SwishMe": _bare("swish"),
    f"{_TIMM}_me.MishMe": _bare("mish"),
    f"{_TIMM}_me.HardSwishMe": _bare("hardswish"),
    f"{_TIMM}_me.HardMishMe": _bare("hard_mish"),
    "timm.models.metaformer.SquaredReLU": _squared("squared_relu"),
    "timm.models.metaformer.StarReLU": _squared("star_relu"),
    "timm.models.nfnet.GammaAct": _gamma,
    **{f"{_ROBUSTBENCH}.{file}.Swish": _fused("swish") for file in ("dm_wide_resnet", "dm_rn")},
    **{f"{_ROBUSTBENCH}.Meansparse_wrn_{size}_16.Swish": _fused("swish") for size in (70, 94)},
    # Both its slope and its shift are learned; the kernels' row would freeze the shift at the value of the moment.
    f"{_ROBUSTBENCH}.paf_wide_resnet.PSSiLU": _bare("pssilu"),
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

_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("relu", "relu_"), ("relu", ())),
    "prelu": ("prelu", ("weight",)),
    **dict.fromkeys(("tanh", "tanh_"), ("tanh", ())),
    "hardshrink": ("hardshrink", ("lambd",)),
}

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
    spelled = target if isinstance(target, str) else getattr(target, "__name__", "")
    if (registered := _REGISTERED_CALLS.get(target)) is not None:
        return replace(registered, inplace=bool(kwargs.get("inplace", False)) or spelled.endswith("_"))
    if isinstance(target, OpOverload | OpOverloadPacket):  # torch.ops.aten.relu, whose arguments may be others
        space, spelled = str(target).split(".")[:2]
        function = getattr(F, spelled.removesuffix("_"), None) if space == "aten" else None
        row = None if function is None else _FUNCTIONS.get(function)
        return row and ActivationCall(row[0], inplace=spelled.endswith("_"), fused=False)
    row = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    if row is None:
        return None
    name, parameters = row
    given = dict(zip(parameters, args[1:], strict=False)) | kwargs
    if name in _NAMES:
        name = _NAMES[name](given)
    inplace = bool(given.get("inplace", False)) or spelled.endswith("_")
    if name not in ACTIVATIONS:
        return ActivationCall(name, inplace=inplace, fused=False)
    constants = tuple(float(given.get(k, default)) for k, default in ACTIVATIONS[name].constants)
    return ActivationCall(name, constants, inplace, weight=given.get("weight"))
