"""Floor 2: activation modules that were traced into, as one call again.

Where Dynamo leaves only the sigmoid and the product of a Swish, a call that returns its argument marks the place where
the module's input enters. That call then is the activation, under the module's name, and what the module does inside
is none. Imports torch, `rewrite` and floor 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby

from torch import Tensor, fx, nn

from ..activations import ActivationCall, match_function, match_module
from ..rewrite import bypass

_CALLS = ("call_function", "call_method", "call_module")


def entrance(x: Tensor) -> Tensor:
    """Return x."""
    return x


def mark_entrances(
    graph: fx.Graph, owners: Mapping[fx.Node, tuple[str, nn.Module]], state: set[fx.Node]
) -> tuple[dict[fx.Node, ActivationCall | None], dict[fx.Node, str]]:
    """Mark where the inputs of activation modules enter them.

    Modules that are one function which is an activation by itself are left as they are, and so are those that overwrite
    their input.

    Args:
        owners: By node, the outermost activation module whose forward makes this call, and its path.
        state: Placeholders of parameters and buffers.

    Returns:
        The activation of each mark, and None for each call inside; the path of each mark.
    """
    known: dict[fx.Node, ActivationCall | None] = {}
    paths: dict[fx.Node, str] = {}
    calls = [node for node in graph.nodes if node.op in _CALLS]
    for owner, inside in groupby(calls, lambda node: owners.get(node)):
        nodes = list(inside)
        call = None if owner is None else match_module(owner[1])
        if call is None or call.inplace or _is_one_function(nodes, call):
            continue
        entering = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in state)
        # The bodies of an autograd.Function are attributes.
        (source, *others) = [n for n in entering if n not in nodes and n.op != "get_attr"] or [None]
        if source is None or others:
            continue  # computed from parameters alone, or a part of it after a graph break
        with graph.inserting_before(nodes[0]):
            mark = graph.call_function(entrance, (source,))
        mark.meta = dict(source.meta)
        source.replace_all_uses_with(mark, delete_user_cb=lambda user, nodes=nodes: user in nodes)
        known |= dict.fromkeys(nodes) | {mark: replace(call, constants=(), weight=None, fused=False)}
        paths[mark] = owner[0]
    return known, paths


def remove_entrances(graph: fx.Graph) -> None:
    """Remove the marks; what stands before them stays."""
    for mark in graph.find_nodes(op="call_function", target=entrance):
        bypass(mark)


def _is_one_function(nodes: list[fx.Node], call: ActivationCall) -> bool:
    if len(nodes) > 1 or nodes[0].op == "call_module":
        return False
    found = match_function(nodes[0].target, (), {})
    return found is not None and (found.name == call.name or call.name.startswith(found.name))
