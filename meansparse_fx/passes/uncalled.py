"""Floor 4: the modules that a graph does not call, though the model did: traced into, replaced or taken in.

Requires: a GraphModule. Ensures: hooks registered on them are refused, for they would never run; so are calls of those
with an activation in them, which would have no operator; and `train` says which of them stay in eval mode, as they were
traced. Changes no graph.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import StateError
from ..held_parts import HeldParts
from ..hook_refusals import allow_hooks, forbid_hooks
from ..nn import MeanSparse
from ..rewrite import PREFIX
from ..sites import Placement, SitePlan
from ..statistics import Statistics, fingerprint

_SHOWN = 3


class Added(nn.Module):
    """Holds what was added to a model, and how: here, because copies and pickles of a GraphModule keep its modules.

    Attributes:
        plan: The model's sites.
        placement: By which they were chosen, without its predicate, which need not be picklable.
        fuse: As `transform` was given it.
        statistics: That the operators were given last; they may have got others since, from a state_dict.
        choice: Of alpha, by a search: as `AlphaSearch.to_dict` returns it.
        shape: Of one of the example images, if they were floats.
        frozen: What stays as it is in eval mode, in words; `train` says so once.
        held: What has to stay as it was.
        operators: All of them.
        reloaded: A state_dict without the operators was loaded since they got their statistics.
    """

    def __init__(self, plan: SitePlan) -> None:
        super().__init__()
        self.plan = plan.without_nodes()
        self.placement = Placement()
        self.fuse = "activation"
        self.statistics: Statistics | None = None
        self.choice: dict[str, Any] | None = None
        self.shape: tuple[int, ...] | None = None
        self.frozen: tuple[str, ...] = ()
        self.held = HeldParts()
        self.operators: list[MeanSparse] = []
        self._writes = 0
        self.reloaded = False
        self._watched: tuple[tuple[nn.Module, str, Tensor], ...] = ()  # owner, its parameter's or buffer's name, value
        self.register_load_state_dict_post_hook(_note_loaded)

    def watch(self, model: nn.Module, names: Iterable[str]) -> None:
        """Let load_state_dict refuse other values of parameters and buffers whose values answered the model."""
        owners = ((model.get_submodule(name.rpartition(".")[0]), name) for name in names)
        self._watched = tuple((m, name, getattr(m, name.rpartition(".")[2]).detach().clone()) for m, name in owners)

    def check(self, model: nn.Module) -> None:
        """Raise StateError if the model that this belongs to is another than was transformed; every call of it asks."""
        self.held.check(model)
        if not torch.compiler.is_compiling() and (writes := self._count_writes()) != self._writes:
            for operator in self.operators:
                operator.check_written()
            self._writes = writes
        if self.reloaded and (measured := self.statistics) is not None:
            if torch.compiler.is_compiling() or _fingerprint(model) != measured.fingerprint:
                raise StateError(
                    "a state_dict was loaded that lacks the operators' statistics, which were measured on other "
                    "weights: calibrate the model again"
                )
            self.reloaded = False

    def _count_writes(self) -> int:
        """Return how often all operators' buffers were written to: half a microsecond an operator."""
        try:
            counts: list[Any] = [b._version for own in self.operators for b in own._buffers.values() if b is not None]
            return sum(counts)
        except RuntimeError:  # inference tensors do not count
            return -1

    def train(self, mode: bool = True) -> Added:
        """Set the mode as every module does."""
        if mode and self.frozen:
            more = f" and {len(self.frozen) - _SHOWN} more" if len(self.frozen) > _SHOWN else ""
            warnings.warn(
                f"the graph was traced in eval mode: dropout, stochastic depth and whatever else depends on train mode "
                f"stays off in {', '.join(self.frozen[:_SHOWN])}{more}. To train with it, train the base model, and "
                "transform that afterwards",
                stacklevel=3,
            )
            self.frozen = ()
        return super().train(mode)


def _fingerprint(model: nn.Module) -> str:
    # Dynamo, which gave up a call of the model, goes on to compile what that calls.
    return (torch.compiler.disable(fingerprint) if "torch._dynamo" in sys.modules else fingerprint)(model)


def _note_loaded(added: Added, keys: Any) -> None:
    # Loaded as a part of a wrapper, the model has keys behind the wrapper's.
    added.reloaded = any(PREFIX in key.split(".") for key in keys.missing_keys)
    for owner, name, value in added._watched:
        held = getattr(owner, name.rpartition(".")[2], None)
        if held is not None and not held.is_meta and not torch.equal(held.to(value), value):
            raise StateError(
                f"forward makes a number or a branch of {name}, and the graph holds for the value it had: load the "
                "weights into the base model and transform that"
            )


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
