"""Floor 4: the modules that a graph does not call, though the model did: traced into, replaced or taken in.

Requires: a GraphModule. Ensures: hooks registered on them are refused, for they would never run, and so are calls of
those with an activation in them, which would have no operator; what cannot refuse to be changed is noted as it is now.
Changes no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..held_parts import HeldParts
from ..hook_refusals import allow_hooks, forbid_hooks
from ..nn import MeanSparse
from ..rewrite import PREFIX


@dataclass(frozen=True, slots=True)
class _Parts:
    """The modules of a transformed model.

    Attributes:
        paths: All of them, each by its first path.
        running: Those that the graph calls, or that are in these.
        operators: By path.
        activations: Those that an operator replaced, and its path.
    """

    paths: dict[nn.Module, str]
    running: set[nn.Module]
    operators: dict[str, MeanSparse]
    activations: dict[nn.Module, str]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> _Parts:
        called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")} | {PREFIX}
        read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        inside: set[str] = set()
        running: set[nn.Module] = {graph_module}
        paths: dict[nn.Module, str] = {}
        for path, module in graph_module.named_modules(remove_duplicate=False):
            paths.setdefault(module, path)
            if path in called or path.rpartition(".")[0] in inside:
                inside.add(path)
            if path in inside or path in read:
                running.add(module)
        operators = {path: m for path, m in graph_module.named_modules() if isinstance(m, MeanSparse)}
        replaced = {o.replaced: path for path, o in operators.items() if o.replaced is not None}
        activations = {graph_module.get_submodule(path): own for path, own in replaced.items()}
        return cls(paths, running, operators, activations)


def refuse_hooks(graph_module: fx.GraphModule) -> None:
    """Let the modules that the graph does not call refuse hooks, and calls past operators; the others take them."""
    parts = _Parts.of(graph_module)
    norms = {norm.module: path for path, operator in parts.operators.items() for norm in operator.prologue.taken}
    taken = norms | parts.activations
    names = [operator.name.split(".") for operator in parts.operators.values()]
    around = {".".join(steps[:depth]) for steps in names for depth in range(1, len(steps))}
    for module, path in parts.paths.items():
        call = None
        if module not in parts.running and (module in parts.activations or path in around):
            call = (
                f"{path}, called by itself, computes without the operators of its activations: call the transformed "
                f"model (torchvision's create_feature_extractor returns what is in its middle), or {path} of the base"
            )
        if module in taken:
            own = taken[module]
            forbid_hooks(
                module,
                f"{path} is a part of the operator {own}, which is called in its place: register the hook on {own}, or "
                f"on {path} of the base before transforming it",
                call,
            )
        elif module not in parts.running:
            forbid_hooks(
                module,
                f"the graph makes the calls that {path} makes and does not call {path}: register the hook on a module "
                "in it, or on the base before transforming it",
                call,
            )
        else:
            allow_hooks(module)


def held_parts(graph_module: fx.GraphModule, read: Mapping[str, Mapping[str, Any]]) -> HeldParts:
    """Return what cannot refuse to be changed: plain attributes, and which modules the graph does not call.

    Args:
        read: By path of a module, its plain attributes that are constants of the graph.
    """
    parts, held = _Parts.of(graph_module), HeldParts()
    for path, values in read.items():
        module = graph_module.get_submodule(path)
        read_here = {n: vars(module).get(n, value) for n, value in values.items()}
        if not path:  # the graph's own attributes are others, and what is held is pickled
            read_here = {n: v for n, v in read_here.items() if not (hasattr(module, n) or callable(v))}
        held.hold(path, module if path else None, read_here)
    for module, path in parts.paths.items():
        if module not in parts.running:
            parent, _, name = path.rpartition(".")
            held.hold(parent, graph_module.get_submodule(parent) if parent else None, {name: module}, children=True)
        if module in parts.activations:
            own = {n: v for n, v in vars(module).items() if n[0] != "_" and n not in ("training", "inplace")}
            held.hold(path, module, {"forward": None, **own})
    return held
