"""Floor 2: from a model to a `torch.fx` graph that computes the same thing, with every activation in sight.

Routes are tried in the order of `ROUTES`; the first one whose graph passes the checks wins. Another dialect
is one more row there. Imports torch and floor 1; timm is only looked up, never imported.
"""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .activations import match_module
from .errors import CaptureError, StateError
from .rewrite import PREFIX, adopt
from .verify import Reference, plain_attention, shadow

_TORCH = str(Path(torch.__file__).parent)
_FX = str(Path(fx.__file__).parent)
_CALL = nn.Module.__call__  # taken before a tracer patches it
_MAX_RETRIES = 16

# Class name -> attribute that holds the model. By name, because looking up OptimizedModule imports the compiler.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}

# Their fused inference path shows no activation to anyone, so they are traced through or refused, never leaves.
_HIDING = (nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

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
    """

    graph_module: fx.GraphModule
    route: str


def capture(model: nn.Module, images: Tensor | None = None) -> Capture:
    """Return the graph of ``model``, which itself is left unchanged.

    The graph keeps every key of the model's state_dict, and the types of its modules. With ``images`` it is
    accepted only if it reproduces the model's output exactly at two batch sizes and shows as many
    activations as the model was seen to call.

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
    for route, trace in ROUTES:
        try:
            graph_module = _assemble(model, *trace(model))
            if reference is None:
                return Capture(graph_module, f"{route}, unverified")
            reference.check(graph_module)
            return Capture(graph_module, route)
        except CaptureError as failure:
            failures.append(failure)
    # Routes that stop at the same place have one message between them.
    reasons = "; ".join(dict.fromkeys(map(str, failures)))
    raise CaptureError(f"cannot capture {type(model).__name__}: {reasons}. To go on, {_WAY_OUT}.") from failures[-1]


def _check_state(model: nn.Module) -> None:
    training = [name or "the model itself" for name, m in model.named_modules() if m.training]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise StateError(f"{type(model).__name__} is in train mode ({training[0]}{more}): call model.eval() first")
    for name, _ in model.named_modules():
        if PREFIX in name.split("."):
            raise StateError(
                f"{type(model).__name__} is already transformed (it has a module named {name}): "
                "restore it first, or start from the base model"
            )


# Tracing.


class ModelTracer(fx.Tracer):
    """Traces a model as a function of one tensor, into every module that might hide an activation.

    Args:
        leaves: Module types not to trace into, besides torch.nn's own and those timm marks.
        trace_buffers: Buffers are read by the graph, as parameters are. Otherwise what the model computes from
            buffers alone is computed once, while tracing.
    """

    def __init__(self, leaves: frozenset[type] = frozenset(), trace_buffers: bool = True) -> None:
        timm = sys.modules.get("timm.layers")
        functions = tuple(timm.get_notrace_functions()) if timm else ()
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves | frozenset(timm.get_notrace_modules() if timm else ())
        self._trace_buffers = trace_buffers
        self._state_names: dict[int, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if match_module(m) is not None:
            return True
        if type(m) in self._leaves or super().is_leaf_module(m, module_qualified_name):
            return not _hides_activations(m)
        return False

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Return a call with one placeholder: optional arguments keep their defaults and the root's hooks run."""
        state: dict[str, Tensor] = dict(self.root.named_parameters())
        if self._trace_buffers:
            state |= dict(self.root.named_buffers())
        self._state_names = {id(tensor): name for name, tensor in state.items()}
        images = self.create_proxy("placeholder", _input_name(self.root), (), {})
        return (lambda root, x: _CALL(root, x)), [self.root, images]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # fx's own searches all parameters at each access: quadratic in the size of the model.
        name = self._state_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def innermost(self) -> str:
        """Return the path of the module being traced; after a failure, of the one that failed. Empty is the root."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""


def _hides_activations(module: nn.Module) -> bool:
    return any(match_module(m) is not None or isinstance(m, _HIDING) for m in module.modules())


def _input_name(model: nn.Module) -> str:
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


def _trace(model: nn.Module, trace_buffers: bool) -> tuple[fx.Graph, nn.Module]:
    """Return the graph and the throwaway copy it was traced on.

    What cannot be traced into becomes a leaf, innermost module first, as long as no activation vanishes in it.
    """
    leaves: frozenset[type] = frozenset()
    while True:
        # Tracing runs the model's Python, which may store proxies in the modules, and leave them there if it fails.
        root = shadow(model)
        tracer = ModelTracer(leaves, trace_buffers)
        try:
            with plain_attention():
                return tracer.trace(root), root
        except CaptureError:
            raise
        except Exception as error:
            path = tracer.innermost()
            culprit = root.get_submodule(path)
            known = type(culprit) in leaves or len(leaves) >= _MAX_RETRIES
            if not path or known or _hides_activations(culprit):
                raise CaptureError(_where_tracing_stopped(error, path, culprit)) from error
            leaves |= {type(culprit)}


def _where_tracing_stopped(error: Exception, path: str, module: nn.Module) -> str:
    everything = list(traceback.extract_tb(error.__traceback__))
    frames = [f for f in everything if f.filename != __file__ and not f.filename.startswith(_FX)] or everything
    # The last line of the user's or of a library's own; torch's only if there is none.
    frame = ([f for f in frames if not f.filename.startswith(_TORCH)] or frames)[-1]
    where = f"{path} ({type(module).__name__})" if path else type(module).__name__
    reason = str(error).strip().split("\n")[0]
    return (
        f"symbolic trace stopped in {where} at {frame.filename}:{frame.lineno}, `{frame.line}`: "
        f"{type(error).__name__}: {reason}"
    )


ROUTES: tuple[tuple[str, Callable[[nn.Module], tuple[fx.Graph, nn.Module]]], ...] = (
    ("symbolic trace", lambda model: _trace(model, trace_buffers=True)),
    ("symbolic trace with buffers as constants", lambda model: _trace(model, trace_buffers=False)),
)


# Assembling.


def _assemble(model: nn.Module, graph: fx.Graph, traced: nn.Module) -> fx.GraphModule:
    """Return ``graph`` on a fresh copy of the whole model: all modules, parameters and buffers, used or not."""
    reserved = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))
    taken = reserved & {*model._modules, *model._parameters, *model._buffers}
    if taken:
        raise CaptureError(f"its attribute {min(taken)!r} has a name that fx.GraphModule needs: rename it")
    try:
        root = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})") from error
    for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        _own_constant(root, traced, target)
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
