"""Floor 2: from a model to a `torch.fx` graph that computes the same thing, with every activation in sight.

Routes are tried in the order of `ROUTES`; the first one whose graph passes the checks wins. Another dialect
is one more row there. Imports torch, `tracing`, `examples`, `verify`, `rewrite` and floor 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..errors import CaptureError, StateError
from ..rewrite import PREFIX, adopt
from .copies import copied
from .examples import trace_by_example
from .tracing import ModelTracer, Traced, trace
from .verify import Reference, shadow

# Class name -> attribute that holds the model. By name, because looking up OptimizedModule imports the compiler.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}

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
    """

    graph_module: fx.GraphModule
    route: str
    checked: str = ""


def capture(model: nn.Module, images: Tensor | None = None) -> Capture:
    """Return the graph of ``model``, which itself is left unchanged.

    The graph keeps every key of the model's state_dict, and the types of its modules. With ``images`` it is
    accepted only if it is seen to compute what the model computes at two batch sizes, by its operator calls or else
    by its numbers, and shows as many activations as the model calls. What the model asks of shapes is answered from the
    images if it must be: then the route says so, and the graph takes images of that size only, any number of them.

    Args:
        images: ``[N, ...]`` on the model's device; None leaves the graph unchecked.

    Raises:
        StateError: The model is in train mode or already transformed.
        CaptureError: No route gives a faithful graph; names the line where tracing stopped.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(inplace=True)).eval()
        >>> captured = capture(net, torch.rand(2, 1, 8, 8))
        >>> captured.route, [node.name for node in captured.graph_module.graph.nodes]
        ('symbolic trace', ['input_1', '_0', '_1', 'output'])
    """
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    _check_state(model)
    reference = None if images is None else Reference.of(model, images)
    failures: list[CaptureError] = []
    for route in ROUTES:
        if route.needs_images and images is None:
            continue
        try:
            traced = route.trace(model, images)
            graph_module = _assemble(model, traced)
            if reference is None:
                return Capture(graph_module, f"{route.name}, unverified")
            return Capture(graph_module, route.name, _check(reference, graph_module, traced))
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


def _check_state(model: nn.Module) -> None:
    training = _in_train_mode(model)
    if training:
        # A model whose own eval() leaves some parts out has them so by its author's will.
        stubborn = _in_train_mode(shadow(model).eval())
        training = [name for name in training if name not in stubborn]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise StateError(f"{type(model).__name__} is in train mode ({training[0]}{more}): call model.eval() first")
    for name, _ in model.named_modules():
        if PREFIX in name.split("."):
            raise StateError(
                f"{type(model).__name__} is already transformed (it has a module named {name}): "
                "restore it first, or start from the base model"
            )


def _in_train_mode(model: nn.Module) -> list[str]:
    return [name or "the model itself" for name, m in model.named_modules() if m.training]


# Routes.


@dataclass(frozen=True, slots=True)
class Route:
    """A way from a model to a graph.

    Attributes:
        name: What the plan calls it.
        trace: Returns the graph of a model, given example images.
        needs_images: Whether it asks example images.
    """

    name: str
    trace: Callable[[nn.Module, Any], Traced]
    needs_images: bool = False


# The first two make graphs for any image size. The third takes over where both fail, for it holds for one size only.
ROUTES = (
    Route("symbolic trace", lambda model, _: trace(model)),
    Route(
        "symbolic trace with buffers as constants",
        lambda model, _: trace(model, lambda leaves: ModelTracer(leaves, trace_buffers=False)),
    ),
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
