"""Floor 2: node surgery. The few moves by which passes change a graph, each leaving it consistent.

Knows nodes; nothing of sites or of statistics. Nothing here removes a node it did not replace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.module import _WrappedHook

from . import hooks

PREFIX = "meansparse"  # everything added to a model lives under this name
_UNFUSED = "unfused"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the i-th input of the operator inside a recorded call."""

    index: int


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call taken out of a graph, with slots where the operator's inputs were; enough to put it back.

    Attributes:
        op: ``call_module``, ``call_function`` or ``call_method``.
        target: Module path, function or method name.
        args, kwargs: The call's arguments.
        name: The node's name.
    """

    op: str
    target: Any
    args: tuple
    kwargs: dict
    name: str

    @classmethod
    def of(cls, node: fx.Node, inputs: list[fx.Node]) -> RecordedCall:
        """Return the record of ``node``, which reads the nodes ``inputs`` and no others."""
        slots: dict[fx.Node, Any] = {n: Slot(i) for i, n in enumerate(inputs)}
        args, kwargs = map_arg((node.args, node.kwargs), slots.__getitem__)
        return cls(node.op, node.target, args, kwargs, node.name)


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """Return the node that a call reads as its argument ``index``."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def calls_of(graph_module: fx.GraphModule, kind: type[Module]) -> list[tuple[fx.Node, Module]]:
    """Return the calls of modules of a type, in graph order, each with its module."""
    nodes = graph_module.graph.find_nodes(op="call_module")
    found = ((node, graph_module.get_submodule(str(node.target))) for node in nodes)
    return [(node, module) for node, module in found if isinstance(module, kind)]


@contextmanager
def editing(graph_module: fx.GraphModule, by: str) -> Iterator[fx.Graph]:
    """Let the pass ``by`` change a graph, then lint it and compile it; new nodes have its name as ``meta["pass"]``."""
    known = set(graph_module.graph.nodes)
    yield graph_module.graph
    for node in graph_module.graph.nodes:
        if node not in known:
            node.meta["pass"] = by
    graph_module.graph.lint()
    graph_module.recompile()


def replace_call(node: fx.Node, target: str, inputs: list[fx.Node]) -> fx.Node:
    """Replace a call by a call of module ``target`` on ``inputs``; return the new node."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_module(target, tuple(inputs))
    return _take_over(node, new)


def replay_call(node: fx.Node, call: RecordedCall) -> fx.Node:
    """Replace ``node``, whose arguments fill the slots, by the recorded call; return the new node."""
    graph, inputs = node.graph, node.args
    args, kwargs = map_aggregate((call.args, call.kwargs), lambda a: inputs[a.index] if isinstance(a, Slot) else a)
    with graph.inserting_before(node):
        new = graph.create_node(call.op, call.target, args, kwargs)
    return _take_over(node, new)


def bypass(node: fx.Node) -> None:
    """Remove ``node``, letting its readers read its first argument."""
    node.replace_all_uses_with(operand(node))
    node.graph.erase_node(node)


def insert_module_before(readers: Sequence[fx.Node], source: fx.Node, target: str) -> fx.Node:
    """Make ``readers``, in graph order, read ``target(source)`` where they read ``source``; return the new node."""
    graph = source.graph
    with graph.inserting_before(readers[0]):
        new = graph.call_module(target, (source,))
    new.meta = dict(source.meta)
    for reader in readers:
        reader.replace_input_with(source, new)
    return new


def insert_module_after(node: fx.Node, target: str) -> fx.Node:
    """Make every reader of ``node`` read ``target(node)`` instead; return the new node."""
    with node.graph.inserting_after(node):
        new = node.graph.call_module(target, (node,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def redirect_later_readers(source: fx.Node, call: fx.Node, holder: fx.Node) -> None:
    """Let every reader of ``source`` that stands after node ``call`` read ``holder`` instead.

    That is what an in-place call meant to its input's later readers.
    """
    for reader in list(source.users):
        if call < reader:
            reader.replace_input_with(source, holder)


def adopt(graph_module: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """Give ``graph_module`` every child, parameter, buffer and hook of ``root``, used by its graph or not; return it.

    A GraphModule by itself keeps only what its graph calls, plain containers in place of typed ones, and no hooks; nor
    do its copies, unless its meta says so.
    """
    graph_module._modules = dict(root._modules)
    graph_module._parameters = dict(root._parameters)
    graph_module._buffers = dict(graph_module._buffers) | dict(root._buffers)
    graph_module._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
    graph_module.__dict__.update({name: root.__dict__[name] for name in hooks.STATE})
    hooks_of_state: dict[int, Any] = graph_module._load_state_dict_pre_hooks
    for number, hook in hooks_of_state.items():
        if hook.with_module:  # it knows the module by a weak reference
            hooks_of_state[number] = _WrappedHook(hook.hook, graph_module)
    graph_module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {name: graph_module.__dict__[name] for name in hooks.STATE}
    return graph_module


def keep_unfused(graph_module: fx.GraphModule) -> None:
    """Remember the graph as it is now as the one that `sharing_copy` starts from.

    With the added modules, which both copies and pickles of a GraphModule keep; of its own attributes neither keeps
    all. In a tuple, so that it is no child; and over a container of its own, or it would hold itself.
    """
    added = graph_module.get_submodule(PREFIX)
    unfused = sharing_copy(graph_module)
    unfused._modules[PREFIX] = container = nn.Module()
    container._modules = dict(added._modules)
    setattr(added, _UNFUSED, (unfused,))


def sharing_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with a graph of its own over the same submodules, parameters and buffers.

    Of a fused one, the graph is that before fusion.
    """
    (source,) = getattr(graph_module._modules.get(PREFIX), _UNFUSED, (graph_module,))
    return _copy(graph_module, source.graph)


def edited_copy(graph_module: fx.GraphModule, by: str, edit: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
    """Return a GraphModule over the same parts, its graph edited; of a fused one, that before fusion is edited, too."""
    clone = _copy(graph_module, graph_module.graph)
    with editing(clone, by):
        edit(clone)
    if hasattr(added := clone._modules.get(PREFIX), _UNFUSED):
        clone._modules[PREFIX] = own = copy.copy(added)
        setattr(own, _UNFUSED, tuple(edited_copy(unfused, by, edit) for unfused in getattr(added, _UNFUSED)))
    return clone


def _copy(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    clone = fx.GraphModule(graph_module, copy.deepcopy(graph), graph_module._get_name())
    clone.meta = dict(graph_module.meta)
    clone.training = graph_module.training
    return adopt(clone, graph_module)


def _take_over(old: fx.Node, new: fx.Node) -> fx.Node:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new
