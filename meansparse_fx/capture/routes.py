"""Floor 2: from a model to a `torch.fx` graph that computes the same thing, with every activation in sight.

Routes are tried in the order of `ROUTES`; the first one whose graph passes the checks wins. Another dialect is one more
row there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..copies import copied
from ..errors import CaptureError
from ..hooks import drop_own_hooks
from ..rewrite import adopt
from . import randomness
from .examples import trace_by_example
from .functions import without_compilers
from .preconditions import check_model, without_wrappers
from .tracing import Traced, trace
from .verify import Reference

_WAY_OUT = (
    'use torch.compile(model, backend="meansparse"), which follows Python control flow, '
    "or pass a simpler model: the part of it that is one plain function of one tensor"
)


@dataclass(frozen=True, slots=True)
class Capture:
    """A captured model.

    Attributes:
        graph_module: The graph, on a copy of the model's modules, parameters and buffers.
        route: How it was captured, in words.
        checked: By what it was seen to compute what the model computes: its ``operations``, which holds for any images
            of the example's size, or its ``numbers`` on the example images; empty if unchecked.
        frozen: The modules that asked for their mode while they were traced, with their types: they stay in eval mode.
        values_read: Names of the parameters and buffers whose values answered the model while it was traced.
        attributes_read: By path of a module, the plain attributes that were read, and their values.
    """

    graph_module: fx.GraphModule
    route: str
    checked: str = ""
    frozen: tuple[str, ...] = ()
    values_read: tuple[str, ...] = ()
    attributes_read: dict[str, dict[str, Any]] = field(default_factory=dict)


@without_compilers()
def capture(model: nn.Module, images: Tensor | None = None) -> Capture:
    """Return the graph of ``model``, which itself is left unchanged.

    The graph keeps every key of the model's state_dict, and the types of its modules. With ``images`` it is
    accepted only if it is seen to compute what the model computes at two batch sizes, by its operator calls or else
    by its numbers, and shows as many activations as the model calls. What the model asks of shapes is answered from the
    images if it must be: then the route says so, and the graph takes images of that size only, any number of them.

    Args:
        images: ``[N, ...]`` on the model's device; None leaves the graph unchecked.

    Raises:
        StateError: The model is in train mode or already transformed, or hooks are registered for all modules.
        CaptureError: The model is TorchScript, made by torch.export, quantised or not initialised yet; no route gives
            a faithful graph; names the line where tracing stopped.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(inplace=True)).eval()
        >>> captured = capture(net, torch.rand(2, 1, 8, 8))
        >>> captured.route, [node.name for node in captured.graph_module.graph.nodes]
        ('symbolic trace', ['input_1', '_0', '_1', 'output'])
    """
    model = without_wrappers(model)
    check_model(model)
    with randomness.undone_draws():
        return _capture(model, images)


def _capture(model: nn.Module, images: Tensor | None) -> Capture:
    reference = None if images is None else Reference.of(model, images)
    failures: list[CaptureError] = []
    for route in ROUTES:
        if route.needs_images and images is None:
            continue
        try:
            traced = route.trace(model, images)
            graph_module = _assemble(model, traced)
            checked = "" if reference is None else _check(reference, graph_module, traced)
            name = route.name if checked else f"{route.name}, unverified"
            return Capture(graph_module, name, checked, _frozen(traced), traced.values_read, traced.attributes_read)
        except CaptureError as failure:
            failures.append(failure)
    # Each route answers more than the one before it: where the last one stops is what the model has to change.
    hint = "" if images is not None else "pass example images, which answer what it asks about shapes; "
    raise CaptureError(
        f"cannot capture {type(model).__name__}: {failures[-1]}. To go on, {hint}{_WAY_OUT}."
    ) from failures[-1]


def _check(reference: Reference, graph_module: fx.GraphModule, traced: Traced) -> str:
    try:
        return reference.check(graph_module)
    except CaptureError as failure:
        raise CaptureError("; ".join((str(failure), *traced.opaque))) from failure


def _frozen(traced: Traced) -> tuple[str, ...]:
    """Return the modules that were traced into and read their mode, but for dropouts that drop nothing."""
    modules = {path: traced.root.get_submodule(path) for path in traced.traced_into}
    asking = {path: type(module).__name__ for path, module in modules.items() if _asks_for_mode(module)}
    return tuple(f"{path} ({name})" if path else name for path, name in asking.items())


def _asks_for_mode(module: nn.Module) -> bool:
    classes = [vars(c) for c in type(module).__mro__ if c is not nn.Module]
    waiting, seen = ["forward"], set()
    asked = False
    while waiting and not asked:
        name = waiting.pop()
        codes = [own[name].__code__ for own in classes if isinstance(own.get(name), FunctionType)]
        asked = any("training" in code.co_names for code in codes)
        seen.add(name)
        waiting += [n for code in codes for n in code.co_names if n not in seen]
    rates = [v for name, v in vars(module).items() if "drop" in name and isinstance(v, int | float)]
    rates += [child.p for child in module.children() if isinstance(child, _DropoutNd)]
    return asked and (any(rates) or not rates)


# Routes.


class Route(NamedTuple):
    """A way from a model to a graph: its name in plans, and what traces a model, given example images."""

    name: str
    trace: Callable[[nn.Module, Any], Traced]
    needs_images: bool = False


# The first makes graphs for any image size. The second takes over where it fails, for it holds for one size only.
ROUTES = (
    Route("symbolic trace", lambda model, _: trace(model)),
    Route("symbolic trace at the example's image size", trace_by_example, needs_images=True),
)


# Assembling.


def _assemble(model: nn.Module, traced: Traced) -> fx.GraphModule:
    """Return the graph on a fresh copy of the whole model: all modules, parameters and buffers, used or not."""
    reserved = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))
    taken = reserved & {*model._modules, *model._parameters, *model._buffers}
    if taken:
        raise CaptureError(f"its attribute {min(taken)!r} has a name that fx.GraphModule needs: rename it")
    root = copied(model)
    graph = traced.graph
    for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        _own_constant(root, traced.root, target)
    for path in traced.traced_into:
        drop_own_hooks(own := root.get_submodule(path))
        for name, value in vars(traced.root.get_submodule(path)).items():
            if isinstance(value, fx.Proxy):  # forward keeps it there, and a graph does not
                vars(own).pop(name, None)
    graph_module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    adopt(graph_module, root)
    graph.lint()
    return graph_module


def _own_constant(root: nn.Module, traced: nn.Module, target: str) -> None:
    """Make a plain attribute that the graph reads part of ``root``: tensors as buffers that state_dict leaves out."""
    path, _, name = target.rpartition(".")
    owner = root.get_submodule(path)
    if name in owner._parameters or name in owner._buffers or name in owner._modules:
        return
    value = owner.__dict__.pop(name) if name in owner.__dict__ else getattr(traced.get_submodule(path), name)
    if isinstance(value, Tensor):
        # As a buffer it follows .to(device); what tracing computed from parameters is a constant from here on.
        owner.register_buffer(name, value.detach(), persistent=False)
    else:
        setattr(owner, name, value)
