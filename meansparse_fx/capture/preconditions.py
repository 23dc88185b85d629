"""Floor 2: whether a model is one that can be captured, before anything is tried."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch._ops import OpOverload

from ..activations import match_function
from ..copies import refuse_hooks, shadow, unwrapped
from ..errors import CaptureError, StateError
from ..hooks import refuse_global_hooks
from ..rewrite import PREFIX

_ORIGINAL = "pass the nn.Module that it was made from"
# What activations are written out of.
_PARTS = {"sigmoid", "hardsigmoid", "exp", "erf", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where"}
_QUANTISED = re.compile(r"torch\.ao\.nn\.(intrinsic\.)?quantized\.(?!dynamic)")


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers around it: DataParallel, DistributedDataParallel, torch.compile.

    Raises:
        CaptureError: It is no module, or a wrapper has hooks.
    """
    while True:
        if not isinstance(model, nn.Module):  # an ExportedProgram, a function
            raise CaptureError(f"{type(model).__name__} is no torch.nn.Module: {_ORIGINAL}")
        wrapped = unwrapped(model)
        if isinstance(wrapped, nn.DataParallel | nn.parallel.DistributedDataParallel):
            refuse_hooks(wrapped, wrapped.module)
            wrapped = wrapped.module
        if wrapped is model:
            return model
        model = wrapped


def check_model(model: nn.Module) -> None:
    """Raise StateError or CaptureError unless a model is in eval mode, whole, made of Python, and not transformed."""
    refuse_global_hooks()
    for path, module in model.named_modules():
        if PREFIX in path.split("."):
            raise StateError(
                f"{type(model).__name__} is already transformed (it has a module named {path}): "
                "restore it first, or start from the base model"
            )
        if (reason := _why_no_graph(module)) is not None:
            raise CaptureError(f"{path or 'the model'} ({type(module).__name__}) {reason}")
    refuse_train_mode(model, type(model).__name__, "first")


def refuse_train_mode(model: nn.Module, name: str, when: str) -> None:
    """Raise StateError if a part of a model is in train mode that its eval() would take out of it."""
    training = _in_train_mode(model)
    if training:
        # A model whose own eval() leaves some parts out has them so by its author's will.
        stubborn = _in_train_mode(shadow(model).eval())
        training = [path for path in training if path not in stubborn]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise StateError(f"{name} is in train mode ({training[0]}{more}): call model.eval() {when}")


def input_name(model: nn.Module) -> str:
    """Return the name of forward's tensor argument."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    first = [p.name for p in named if p.kind is not p.KEYWORD_ONLY][:1]
    required = [p.name for p in named if p.default is p.empty]
    if required not in ([], first):
        raise CaptureError(
            f"its forward needs the arguments {', '.join(required)}; sites are found in one tensor's flow"
        )
    return first[0] if first else "images"


def _in_train_mode(model: nn.Module) -> list[str]:
    return [name or "the model itself" for name, m in model.named_modules() if m.training]


def _why_no_graph(module: nn.Module) -> str | None:
    """Return why a module is nothing that torch.fx can follow or leave as it is; None if it is no such."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        hidden = next(_activations_in(module), None)
        return hidden and f"is TorchScript, which hides its activations ({hidden}): {_ORIGINAL}"
    graph = getattr(module, "graph", None)
    if isinstance(graph, fx.Graph) and any(isinstance(node.target, OpOverload) for node in graph.nodes):
        return f"is a graph of aten operators, as torch.export makes it, without the names of modules: {_ORIGINAL}"
    # Dynamic ones, whose inputs are floating point, hold a LinearPackedParams, too; models to be quantised add by one.
    if _QUANTISED.match(f"{kind.__module__}.") and kind.__name__ not in ("LinearPackedParams", "FloatFunctional"):
        return "is quantised, and the operator computes in floating point: transform the model before quantising it"
    parameters = (*module._parameters.values(), *module._buffers.values())
    if any(p is not None and nn.parameter.is_lazy(p) for p in parameters):
        return "is not initialised yet: call the model once on a batch of images, then transform it"
    return None


def _activations_in(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Yield the activations that TorchScript's code calls, what they are written out of, and fused operators."""
    for node in _nodes(module.inlined_graph):
        space, _, name = node.kind().partition("::")
        name = name.removesuffix("_")
        functions = (getattr(home, name, None) for home in (torch, nn.functional))
        known = any(f is not None and match_function(f, (None,), {}) is not None for f in functions)
        if known or name in _PARTS or space not in ("aten", "prim"):
            yield name


def _nodes(graph: torch._C.Graph | torch._C.Block) -> Iterator[torch._C.Node]:
    for node in graph.nodes():
        yield node
        for block in node.blocks():
            yield from _nodes(block)
