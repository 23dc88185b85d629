"""Floor 2: symbolic traces of a model, as a function of one tensor.

What cannot be traced into becomes a leaf, unless an activation would vanish in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from ..activations import registered_functions
from ..copies import shadow
from ..errors import CaptureError
from ..held_parts import attributes_noted
from ..hooks import enter, has_foreign_hooks, hint_of_hooks, leave, only_own_hooks, parts_like
from ..outputs import flatten, parts
from ..state import kept_parameters, state_of, write_buffers_back
from .codegen import CapturedCodeGen
from .derivatives import ModelProxy, applied_by, check_hook, register_hook, without_checkpoints
from .functions import as_single_calls, expanded_by_tuples
from .leaves import hides_activations, is_leaf, timm_registry
from .lines import where_tracing_stopped
from .modes import modes_as_calls, plain_attention, tidy_modes
from .preconditions import input_name
from .proxies import Retrace

_CALL = nn.Module.__call__  # taken before a tracer patches it
_MAX_LEAVES = 16
_CONTAINERS = {tuple, list, dict, torch.Size}
# Where functions come from that fx records without being told.
_SEEN_BY_FX = {"torch", "_operator", "math", "None"}
_CURE = "return tensors in tuples, lists, dicts, OrderedDicts, named tuples or dataclasses"


@dataclass(frozen=True, slots=True)
class Traced:
    """What tracing a model gave.

    Attributes:
        root: The throwaway copy of the model it was traced on.
        opaque: Why tracing stopped in modules that became leaves: activations in their functions are hidden.
        traced_into: Paths of the modules that were traced into, the root's first: empty.
        values_read: Names of the parameters and buffers whose values answered the model.
        attributes_read: By path of a module, the plain attributes that were read, and their values.
    """

    graph: fx.Graph
    root: nn.Module
    opaque: tuple[str, ...] = ()
    traced_into: tuple[str, ...] = ()
    values_read: tuple[str, ...] = ()
    attributes_read: dict[str, dict[str, Any]] = field(default_factory=dict)


class ModelTracer(fx.Tracer):
    """Traces a model as a function of one tensor, into every module that might hide an activation.

    What decides a derivative is in the graph: `torch.autograd.Function` as one call, gradient modes, tensor hooks;
    and so is autocast.

    Args:
        leaves: Module types not to trace into, besides torch.nn's own and those timm marks.
    """

    def __init__(self, leaves: frozenset[type] = frozenset()) -> None:
        registry = timm_registry()
        super().__init__(autowrap_functions=tuple(registry.get_notrace_functions()) if registry else ())
        self._leaves = leaves | frozenset(registry.get_notrace_modules() if registry else ())
        self._state_names: dict[int, str] = {}
        self.traced_into: dict[str, None] = {"": None}
        self.values_read: dict[str, None] = {}
        self.attributes_read: dict[str, dict[str, Any]] = {}
        self._attributes: dict[int, fx.Proxy] = {}  # what the graph calls and no graph can write down, by id
        self._thread = threading.get_ident()  # others go on running models
        self._evaluating = False  # what runs now is no part of the graph
        self.classes_are_read: Callable[[FrameType], bool] = lambda caller: False  # see `applied_by`

    def trace(self, root: nn.Module | Callable, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with (
            applied_by(self._apply, lambda value: isinstance(value, fx.Proxy)) as self.classes_are_read,
            modes_as_calls(self._call, lambda: not self._evaluating),
            without_checkpoints(),
            expanded_by_tuples(),
            attributes_noted(self._note_read),
            as_single_calls(registered_functions(), partial(self.create_proxy, "call_function")),
        ):
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if isinstance(node.type, str):  # an annotation never evaluated: torch before 2.14 cannot pickle it
                node.type = None
        graph.set_codegen(CapturedCodeGen(tidy_modes(graph)))
        write_buffers_back(graph, self.root, set(self._state_names.values()))
        return graph

    def _note_read(self, module: nn.Module, name: str, value: Any) -> None:
        path = self.submodule_paths.get(module) if self.submodule_paths else None
        in_graph = isinstance(value, nn.Module | torch.Tensor | fx.Proxy)
        if path is not None and not self._evaluating and not in_graph:
            self.attributes_read.setdefault(path, {})[name] = value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ModelProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **options: Any) -> Any:
        return super().create_proxy(*self.as_graph_call(kind, target, args), kwargs, *rest, **options)

    def as_graph_call(self, kind: str, target: Any, args: tuple) -> tuple[str, Any, tuple]:
        """Return a call as a graph can hold it: of a tensor hook the hook is read from the model."""
        if target != "register_hook" and target is not register_hook:
            return kind, target, args
        tensor, hook = args
        if not isinstance(hook, fx.Proxy):
            check_hook(hook)
            hook = self._attribute(hook)
        return "call_function", register_hook, (tensor, hook)

    def _apply(self, function: type, run: Callable, args: tuple, kwargs: dict) -> Any:
        return self.create_proxy("call_method", "apply", (self._attribute(function), *args), kwargs)

    def _call(self, function: Callable, *args: Any) -> fx.Node:
        return self.create_node("call_function", function, args, {})

    def _attribute(self, value: Any) -> fx.Proxy:
        """Return a proxy of what has no spelling in a graph; it becomes an attribute of the model."""
        if id(value) not in self._attributes:
            known = (name for name, other in vars(self.root).items() if other is value)
            name = next(known, "_" + getattr(value, "__name__", "hook").strip("<>"))
            while getattr(self.root, name, value) is not value:
                name += "_"
            setattr(self.root, name, value)
            self._attributes[id(value)] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[id(value)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, self._leaves, super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        # A module that the model holds in a list, or shares through its class, has no path: it is traced into.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.submodule_paths.get(m) if self.submodule_paths else self.path_of_module(m)
        if path is None:
            if has_foreign_hooks(m):
                raise CaptureError(f"{type(m).__name__}, held in a list or by a class, has hooks: register it, or them")
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.traced_into[path] = None
        if not has_foreign_hooks(m):
            return super().call_module(m, forward, args, kwargs)
        # Its hooks run when the graph does: they are called, and the forward between them is traced.
        entered = self.create_proxy("call_function", enter, ((args, kwargs), m), {})
        given = tuple(parts_like(entered[i], of) for i, of in enumerate((args, kwargs)))
        with only_own_hooks(m):
            result = super().call_module(m, forward, *given)
        left = self.create_proxy("call_function", leave, (result, m, given, entered[2]), {})
        return parts_like(left, result)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        known = target is getattr or str(getattr(target, "__module__", None)).partition(".")[0] in _SEEN_BY_FX
        if kind == "call_function" and not known:
            node.meta["is_wrapped"] = True  # or unpickling, which traces the generated code, would run it
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, np.generic):  # a size that numpy computed
            a = a.item()
        # torch.fx knows plain containers and named tuples.
        known = isinstance(a, fx.Proxy) or type(a) in _CONTAINERS or hasattr(a, "_fields")
        held = None if known else parts(a)
        if held is None:
            try:
                return super().create_arg(a)
            except NotImplementedError as error:
                raise TraceError(f"a graph takes and returns no {type(a).__name__}; {_CURE}") from error
        # It would put a plain dict in the place of other mappings. A dataclass is made of its fields.
        args, kwargs = ((), held) if is_dataclass(a) else ((held,), {})
        try:
            same = flatten(type(a)(*args, **kwargs))[1] == flatten(a)[1]
        except Exception:
            same = False
        if not same:
            raise TraceError(f"a {type(a).__name__} cannot be made of what it holds; {_CURE}")
        return self.create_node("call_function", type(a), self.create_arg(args), self.create_arg(kwargs))

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Return a call with one placeholder: optional arguments keep their defaults and the root's hooks run."""
        self._state_names = {id(tensor): name for name, tensor in state_of(self.root).items()}
        images = self.create_proxy("placeholder", input_name(self.root), (), {})

        def call(root: nn.Module, x: Any) -> Any:
            with only_own_hooks(root):  # the others are those of the GraphModule
                return _CALL(root, x)

        return call, [self.root, images]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # fx's own searches all parameters at each access: quadratic in the size of the model.
        name = self._state_names.get(id(attr_val)) if threading.get_ident() == self._thread else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def innermost(self) -> str:
        """Return the path of the module being traced; after a failure, of the one that failed. Empty is the root."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""


def trace(model: nn.Module, make_tracer: Callable[[frozenset[type]], ModelTracer] = ModelTracer) -> Traced:
    """Return the graph of ``model``.

    What cannot be traced into becomes a leaf, innermost module first, as long as no activation vanishes in it.

    Args:
        make_tracer: Returns a new tracer, given the module types it must not trace into.

    Raises:
        CaptureError: Tracing stopped; names the module and the line.
    """
    leaves: dict[type, str] = {}
    while True:
        # Tracing runs the model's Python, which may store proxies in the modules, and leave them there if it fails.
        root = shadow(model)
        tracer = make_tracer(frozenset(leaves))
        try:
            with plain_attention(), kept_parameters(root):
                graph = tracer.trace(root)
            return Traced(
                graph,
                root,
                opaque=tuple(leaves.values()),
                traced_into=tuple(tracer.traced_into),
                values_read=tuple(tracer.values_read),
                attributes_read=tracer.attributes_read,
            )
        except (CaptureError, Retrace):
            raise
        except Exception as error:
            path = tracer.innermost()
            culprit = root.get_submodule(path)
            where = where_tracing_stopped(error, path, culprit) + hint_of_hooks(root)
            known = type(culprit) in leaves or len(leaves) >= _MAX_LEAVES
            if not path or known or hides_activations(culprit):
                raise CaptureError(where) from error
            leaves[type(culprit)] = where
