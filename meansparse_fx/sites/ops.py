"""Floor 2: what each node of a graph is. Imports `op_table` and floor 1 only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ..activations import ActivationCall, match_function, match_module
from ..hooks import has_hooks, has_own_forward
from ..published import PublishedOperator, published_operator
from .op_table import (
    BY_RUNNING,
    ELEMENTWISE,
    FUNCTIONS,
    LIBRARY_FUNCTIONS,
    METHODS,
    MODULES,
    PUBLISHED,
    UNKNOWN,
    Op,
    unlisted,
)

if TYPE_CHECKING:
    from .composites import Composite
    from .plan import Refusal

CALLS = ("call_function", "call_method", "call_module")

# Without underscores, for Python's functions and for a tensor's methods.
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"}


@dataclass(frozen=True, slots=True)
class Operators:
    """Looks up what the nodes of one graph are.

    Attributes:
        modules: The graph's modules by every path they have.
        paths: The first path of each module, by its id: the one that names sites.
        callers: Path of the module whose forward makes a call, by node, where the nodes do not tell themselves.
        tensors: What parameters and buffers hold, by the placeholder that stands for one.
        composites: By call, the activation written out of several calls, or by one that is several things, which it
            is a part of.
        weights: Why a call makes a weight and no feature, by the activation call that is part of it.
    """

    modules: dict[str, nn.Module]
    paths: dict[int, str]
    callers: dict[fx.Node, str] = field(default_factory=dict)
    tensors: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    composites: Mapping[fx.Node, Composite] = field(default_factory=dict)
    weights: Mapping[fx.Node, Refusal] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module, **known: Any) -> Operators:
        """Return the look-up for a graph over the modules of ``root``; ``known`` are other attributes."""
        modules = dict(root.named_modules(remove_duplicate=False))
        paths = {id(m): path for path, m in root.named_modules()}
        for module in modules.values():
            # A published checkpoint made its place a sequence of two: what was there before goes by the old name.
            if type(module) is nn.Sequential and len(module) == 2:
                added = [child for child in module if published_operator(child) is not None]
                paths |= {id(child): paths[id(module)] for child in module if len(added) == 1 and child is not added[0]}
        return cls(modules, paths, **known)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def op(self, node: fx.Node) -> Op:
        """Return what is known of a node."""
        if node in self.composites or (node.target != "apply" and self.activation(node) is not None):
            return ELEMENTWISE
        if node.op in ("call_function", "call_method"):
            names: Mapping[Any, Op] = METHODS if node.op == "call_method" else FUNCTIONS
            row = names.get(node.target) or LIBRARY_FUNCTIONS.get(_qualified(node))
            return row or unlisted(node.target)
        module = self.module(node)
        if module is not None and has_own_forward(module):
            return UNKNOWN
        row = next((MODULES[base] for base in type(module).__mro__ if base in MODULES), None)
        if row is not None or self.published(node) is not None:
            return row or PUBLISHED
        return BY_RUNNING if type(module).__module__.startswith("torch.nn.") else UNKNOWN

    def published(self, node: fx.Node) -> PublishedOperator | None:
        """Return the published operator a node calls, if it calls one."""
        module = self.module(node)
        return None if module is None else published_operator(module)

    def moves_only(self, node: fx.Node) -> bool:
        """Return whether a node changes no values, only where they are, and leaves each channel whole."""
        op = self.op(node)
        return op.word in ("reshape", "permute") or (op.passes and op is not PUBLISHED)

    def activation(self, node: fx.Node) -> ActivationCall | None:
        """Return the activation a node calls, or the last call of which it is, if there is one."""
        if node in self.composites:
            return self.composites[node].call if node is self.composites[node].node else None
        module = self.module(node)
        if module is not None:
            call = match_module(module)
            # Its hooks run in its own call, behind the bare operator.
            return replace(call, fused=False) if call and has_hooks(module) else call
        if node.op not in ("call_function", "call_method"):
            return None
        if "refusal" in node.meta:  # a torch.autograd.Function that calls activations
            return ActivationCall(str(node.args[0]).strip("_"), fused=False)
        try:
            return match_function(node.target, node.args, node.kwargs)
        except TypeError:
            # A constant that the graph computes: the bare operator goes before the call, which keeps its arguments.
            call = match_function(node.target, (), {})
            inplace = any(a is True for a in (*node.args, node.kwargs.get("inplace")))
            return call and replace(call, constants=(), inplace=call.inplace or inplace, fused=False)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return what a node's call gives for other arguments, past a module's hooks."""
        if (module := self.module(node)) is not None:
            return type(module).forward(module, *args, **kwargs)
        target: Any = node.target
        return target(*args, **kwargs) if callable(target) else getattr(args[0], target)(*args[1:], **kwargs)

    def writes(self, node: fx.Node) -> bool:
        """Return whether a call writes into its first argument, as far as its name and its arguments tell."""
        idle = self.op(node).passes  # in eval mode: dropout writes nothing then
        activation, module = self.activation(node), self.module(node)
        if module is not None:
            asked = getattr(module, "inplace", False) if activation is None else activation.inplace
            return bool(asked) and (module.training or not idle)
        given = dict(zip(_parameters(node.target), node.args, strict=False)) | node.kwargs
        if activation is not None and activation.inplace:
            return True
        if given.get("inplace") and not (idle and given.get("training") is False):
            return True
        return is_in_place(name_of(node))

    def source(self, node: fx.Node) -> Any:
        """Return the tensor that an activation's node reads, or what it is the last call of."""
        if node in self.composites:
            return self.composites[node].source
        if node.target == "apply":  # of a torch.autograd.Function
            return node.args[1]
        return node.args[0] if node.args else node.kwargs["input"]

    def readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the calls of an activation that read its source: several where it is a composite."""
        composite = self.composites.get(node)
        return (node,) if composite is None else composite.readers

    def refusal(self, node: fx.Node) -> Refusal | None:
        """Return why no operator can stand before an activation, by what it is."""
        composite = self.composites.get(node)
        of_calls = self.weights.get(node) if composite is None else composite.refusal
        return node.meta.get("refusal", of_calls)

    def reader(self, node: fx.Node) -> fx.Node | None:
        """Return the only call that reads a node, those of one composite taken for one; None if there are several."""
        parts = [(user, self.composites.get(user)) for user in node.users]
        readers = {c.node if c is not None and c.source is node else user for user, c in parts}
        return readers.pop() if len(readers) == 1 else None

    def tensor(self, node: fx.Node) -> Tensor | None:
        """Return the parameter or the buffer that a node reads."""
        if node.op != "get_attr":
            return self.tensors.get(node)
        path, _, name = str(node.target).rpartition(".")
        owner = self.modules.get(path) or node.graph.owning_module
        tensor = getattr(owner, name, None)
        return tensor if isinstance(tensor, Tensor) else None

    def is_weight(self, node: fx.Node) -> bool:
        """Return whether a node is a parameter, or made of one alone."""
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return isinstance(self.tensor(node), nn.Parameter)

    def maker(self, node: fx.Node) -> fx.Node:
        """Return what makes a node's value, looking through what changes nothing in eval mode."""
        while self.op(node).passes:
            node = node.all_input_nodes[0]
        return node

    def word(self, node: fx.Node) -> str:
        """Return what the plan calls a node."""
        activation = self.activation(node)
        if activation is not None:
            return activation.name
        if node.op == "placeholder":
            return "input"
        module = self.module(node)
        own = type(module).__name__.lower() if module is not None else name_of(node)
        return self.op(node).word or own

    def enclosing(self, node: fx.Node) -> str:
        """Return the path of the module whose forward makes this call; a module's own path if it is one."""
        module = self.module(node)
        if module is not None:
            return self.paths[id(module)]
        if node in self.callers:
            return self.callers[node]
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        return self.paths.get(id(self.modules.get(path)), path)

    def label(self, node: fx.Node) -> str:
        """Return a name for a node that its author recognises: `layer1.0.conv1`, `layer1.0.add`."""
        if (composite := self.composites.get(node)) is not None and composite.node is node:
            return composite.path
        path = self.enclosing(node)
        # Where modules are traced into, the call inside an activation module goes by the module's name.
        if node.op == "call_module" or (path in self.modules and match_module(self.modules[path]) is not None):
            return path
        return below(path, self.word(node))


def below(path: str, name: str) -> str:
    """Return the path of what is called ``name`` in the module at ``path``, which is empty for the model itself."""
    return f"{path}.{name}" if path else name


def name_of(node: fx.Node) -> str:
    """Return the bare name of the function or the method that a node calls; empty for a module, whatever its path."""
    return "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))


def is_in_place(name: str) -> bool:
    """Return whether a function or a method, by its name, writes into its first argument."""
    return name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _qualified(node: fx.Node) -> str:
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"


@functools.cache
def _parameters(target: Callable | str) -> tuple[str, ...]:
    """Return the names of a Python function's arguments; what is written in C works in place by its name alone."""
    code = getattr(target, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]
