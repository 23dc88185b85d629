"""Floor 2: activation modules that Dynamo inlined: each call of one is an activation of several calls.

It leaves the sigmoid and the product of a Swish, and the module still tells what they are together. Imports torch,
`composites`, `ops`, `plan` and floor 1.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from ..activations import ActivationCall, match_function, match_module
from .composites import Composite
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


def inlined_activations(
    graph: fx.Graph, owners: Mapping[fx.Node, ModuleCall], state: Container[fx.Node]
) -> dict[fx.Node, Composite]:
    """Return the activations by the nodes that they are made of.

    Modules that are one function which is an activation by itself are none of them.

    Args:
        owners: By node, the outermost call of an activation module that it belongs to.
        state: Placeholders of parameters and buffers.
    """
    calls: dict[ModuleCall, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in owners and node.op in CALLS:
            calls.setdefault(owners[node], []).append(node)
    found: dict[fx.Node, Composite] = {}
    for owner, nodes in calls.items():
        call = match_module(owner.module)
        entering = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes and _is_tensor(n))
        # Constants are attributes; sizes, which may vary, are no tensors.
        sources = [n for n in entering if n not in state and n.op != "get_attr"]
        if call is None or not entering or _is_one_function(nodes, call, sources):
            continue
        source = (sources or list(entering))[0]
        while not _is_tensor(nodes[-1]):
            nodes.pop()
        readers = tuple(n for n in nodes if source in n.all_input_nodes)
        refusal = in_several_steps(nodes[-1]) if call.inplace else None
        if owner.broken:
            refusal = Refusal(_BROKEN, nodes[-1].name, "move the break out of its forward", kind="graph break")
        elif len(sources) > 1:
            refusal = Refusal(_SEVERAL.format(len(sources)), nodes[-1].name, kind="several inputs")
        call = replace(call, constants=(), inplace=False, weight=None, fused=False)
        found |= dict.fromkeys(nodes, Composite(source, tuple(nodes), readers, call, owner.path, refusal))
    return found


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
