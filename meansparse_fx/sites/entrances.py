"""Floor 2: activation modules that were traced into, as one call again.

Where Dynamo leaves only the sigmoid and the product of a Swish, a call that returns its argument marks the place where
the module's input enters. That call then is the activation, under the module's name, and what the module does inside
is none. Imports torch, `ops`, `plan`, `rewrite` and floor 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from ..activations import ActivationCall, match_function, match_module
from ..rewrite import bypass
from .ops import CALLS
from .plan import Refusal, in_several_steps

_BROKEN = "this graph has only a part of what the activation does"
_SEVERAL = "{} tensors enter the activation, and which of them it is applied to is not known"


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of an activation module.

    Attributes:
        key: What tells this call from others of the same module.
        broken: The graph has not all that the call does.
    """

    path: str
    module: nn.Module
    key: tuple[str, str]
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Entrances:
    """Where the inputs of activation modules enter them.

    Attributes:
        known: The activation of each mark, and None for each call inside.
        paths: The path of each mark.
        refused: By name of a mark that stands there for the plan alone: why the activation cannot be rewritten.
    """

    known: dict[fx.Node, ActivationCall | None] = field(default_factory=dict)
    paths: dict[fx.Node, str] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)


def entrance(x: Tensor) -> Tensor:
    """Return x."""
    return x


def mark_entrances(graph: fx.Graph, owners: Mapping[fx.Node, ModuleCall], state: set[fx.Node]) -> Entrances:
    """Mark where the inputs of activation modules enter them.

    Modules that are one function which is an activation by itself are left as they are. What is computed from
    parameters alone, or cannot be one call again, gets a mark that nothing reads.

    Args:
        owners: By node, the outermost call of an activation module that it belongs to.
        state: Placeholders of parameters and buffers.
    """
    calls: dict[ModuleCall, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in owners and node.op in CALLS:
            calls.setdefault(owners[node], []).append(node)
    found = Entrances()
    for owner, nodes in calls.items():
        call = match_module(owner.module)
        inside = set(nodes)
        entering = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
        # Constants are attributes; sizes, which may vary, are no tensors.
        sources = [n for n in entering if n not in state and n.op != "get_attr" and _is_tensor(n)]
        if call is None or _is_one_function(nodes, call, sources):
            continue
        source = next((n for n in (*sources, *entering, *nodes) if _is_tensor(n)), None)
        reader = next((n for n in nodes if source in n.all_input_nodes), None)
        if source is None or reader is None:
            continue  # reads no tensor at all
        with graph.inserting_before(reader):
            mark = graph.call_function(entrance, (source,))
        mark.meta = dict(source.meta)
        if (refusal := _refusal(owner, call, sources, mark)) is not None:
            found.refused[mark.name] = refusal
        elif sources:
            source.replace_all_uses_with(mark, delete_user_cb=inside.__contains__)
        found.known.update(dict.fromkeys(nodes))
        found.known[mark] = replace(call, constants=(), inplace=False, weight=None, fused=False)
        found.paths[mark] = owner.path
    return found


def remove_entrances(graph: fx.Graph) -> None:
    """Remove the marks; what stands before them stays."""
    for mark in graph.find_nodes(op="call_function", target=entrance):
        bypass(mark)


def _refusal(owner: ModuleCall, call: ActivationCall, sources: list[fx.Node], mark: fx.Node) -> Refusal | None:
    """Return why a call cannot be rewritten; None if it can."""
    if owner.broken:
        return Refusal(_BROKEN, mark.name, "move the break out of its forward", kind="graph break")
    if len(sources) > 1:
        return Refusal(_SEVERAL.format(len(sources)), mark.name, kind="several inputs")
    return in_several_steps(mark) if call.inplace else None


def _is_one_function(nodes: list[fx.Node], call: ActivationCall, sources: list[fx.Node]) -> bool:
    """Return whether a function that is an activation by itself is a module's all, or in place all that reads x."""
    if call.inplace:
        readers = [node for node in nodes if any(n in sources for n in node.all_input_nodes)]
        functions = [n for n in nodes if match_function(n.target, (), {}) is not None]
        return len(readers) == 1 and readers == functions
    if len(nodes) > 1:
        return False
    found = match_function(nodes[0].target, (), {})
    return found is not None and (found.name == call.name or call.name.startswith(found.name))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)
