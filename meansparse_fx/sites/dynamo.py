"""Floor 2: the dialect that Dynamo hands to back ends, and the frame it came from.

Parameters are inputs, modules are traced into, and a call names its module by where the frame found it
(``L['self'].layer1._modules['0'].relu``). After a graph break the frame is a submodule's or a continuation's, so
the model that site names start from is looked up: the outermost module running inside torch.compile. The only
file that looks into Dynamo. Imports this folder and floor 1 only.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator

from ..activations import match_module
from .aliases import changed_inputs
from .axis import channel_axes
from .find import plan_sites
from .inlined import ModuleCall, inlined_activations
from .ops import Operators, below
from .plan import Placement, SitePlan
from .shapes import recorded

_ROUTE = "torch.compile"
_ENTRANCE = ("compile_wrapper", eval_frame.__file__)
_MODULE_CALLS = (nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__)
_TORCH = torch.__file__.removesuffix("__init__.py")  # the folder, with its separator: torchvision is another
_HEAD = re.compile(r"([LG])\['([^']+)'\]")
_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_NAMELESS = "the code after the graph break does not know which module it belongs to"

Scope = Mapping[str, Mapping[str, Any]]  # "L": the frame's locals, "G": its globals


@dataclass(frozen=True, slots=True)
class Found:
    """What the finder made of one graph.

    Attributes:
        plan: Its sites.
        overwriting: Names of those that overwrite one of the graph's inputs in place.
        output_axes: Channel dimension of each output, as far as known.
    """

    plan: SitePlan
    overwriting: frozenset[str]
    output_axes: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class DynamoGraph:
    """A graph of Dynamo's and what is known of its frame.

    Attributes:
        code: The frame's code object: it tells a recompilation from another graph of the same model.
        model: The module that site names start from; None if the frame has none.
        inputs: The placeholders that are no state of a module, with the tensors they stood for.
        state: The placeholders of parameters and buffers, with these.
        first: The model's forward, or whatever torch.compile was given, begins with this graph.
        last: The model's forward ends with this graph: no more graphs follow in this call.
        callers: Path of the module that makes each call, where one is known.
        owners: The call of an activation module that each call is inside of, for those inside of one.
        by_python: Code of the model around this frame that Python runs, and that may call activations; "" if none.
        disabled: The line that calls what torch.compiler.disable keeps out, if the graph ends there; "" if not.
    """

    graph: fx.Graph
    code: CodeType
    model: nn.Module | None
    inputs: dict[fx.Node, Tensor]
    state: dict[fx.Node, Tensor]
    first: bool
    last: bool
    callers: dict[fx.Node, str]
    owners: dict[fx.Node, ModuleCall]
    by_python: str
    disabled: str

    @classmethod
    def of(cls, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoGraph:
        """Return the graph that Dynamo is compiling at this moment, and has passed to the back end calling this."""
        graph = graph_module.graph
        frame = InstructionTranslator.current_tx().output.root_tx
        scope = {"L": frame.f_locals, "G": frame.f_globals}
        stacks = {n: stack for n in graph.nodes if (stack := n.meta.get("nn_module_stack"))}
        sources = {n: next(reversed(stack.values()))[0] for n, stack in stacks.items()}
        reason: Any = graph_module.compile_subgraph_reason
        whole = not reason.graph_break

        # The model, and the modules between it and this frame, whose forwards run around it.
        stack_above = _callers()
        running = [m for f in stack_above if isinstance(m := f.f_locals.get("self"), nn.Module)]
        along = (value for source in sources.values() for value in _objects_along(source, scope))
        model = running[-1] if running else next((v for v in along if isinstance(v, nn.Module)), None)
        names = {id(m): path for path, m in model.named_modules()} if model is not None else {}
        forward = getattr(type(model).forward, "__code__", None) if model is not None else None

        # Which module makes each call, and inside of which activation module it is.
        callers = {n: _path(source, scope, names) for n, source in sources.items()}
        owners = _owners(stacks, scope, names)
        if running and _is_traced_activation(running[0]) and (path := names.get(id(running[0]))):
            # Dynamo did not enter it, it is the frame: all of its forward, or what a graph break left of that.
            part = not whole or frame.f_code is not getattr(type(running[0]).forward, "__code__", None)
            owners = dict.fromkeys(graph.nodes, ModuleCall(path, running[0], ("", ""), part)) | owners
        if not running or any(v is running[0] for v in scope["L"].values()):
            here = names.get(id(running[0]), "") if running else ""  # of calls outside of any module Dynamo entered
            callers = {n: here for n in graph.nodes} | callers

        # What the placeholders stand for.
        placeholders = zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        tensors = {node: value for node, value in placeholders if isinstance(value, Tensor)}
        known = {id(t) for t in (*model.parameters(), *model.buffers())} if model is not None else set()
        state = {n: v for n, v in tensors.items() if id(v) in known or _belongs_to_module(n, scope)}

        _pin(dict.fromkeys(sources.values()), running[:1], scope)
        disabled = ""
        if "torch.compiler.disable" in reason.reason:
            line = reason.user_stack[-1]
            disabled = f"what torch.compiler.disable wraps in `{line.line}` ({line.filename}:{line.lineno})"
        return cls(
            graph,
            code=frame.f_code,
            model=model,
            inputs={n: v for n, v in tensors.items() if n not in state},
            state=state,
            first=not stack_above or frame.f_code is forward,
            last=whole and running[:1] in ([], [model]),
            callers=callers,
            owners=owners,
            by_python=next(_run_by_python(stack_above, names), ""),
            disabled=disabled,
        )

    def find(
        self,
        placement: Placement,
        earlier: Callable[[dict[str, int]], dict[str, int]],
        axis_of: Callable[[Tensor], int | None],
    ) -> Found:
        """Return the graph's sites.

        Args:
            earlier: Given how often this graph calls each path, returns how often graphs before it did.
            axis_of: The channel dimension of a tensor that another graph put out, if known.
        """
        composites = inlined_activations(self.graph, self.owners, self.state)
        flow = recorded(self.graph)
        operators = Operators.of(
            self.model or nn.Module(), callers=self.callers, tensors=self.state, composites=composites
        )
        given = {node: axis for node, value in self.inputs.items() if (axis := axis_of(value)) is not None}
        known = channel_axes(self.graph, operators, flow, given)
        plan = plan_sites(self.graph, operators, flow, known, self.inputs, _ROUTE, placement, earlier)
        named = {node.name for node in (*self.callers, *composites)}
        sites = (
            s if s.refusal or s.node in named else s.refused("nameless", _NAMELESS, "move the break") for s in plan
        )
        plan = SitePlan(tuple(sites), plan.route)
        outputs: Any = self.graph.output_node().args[0]
        return Found(
            plan,
            changed_inputs(self.graph, plan.active, flow, self.inputs),
            tuple(known.get(n) if isinstance(n, fx.Node) else None for n in outputs),
        )


def _pin(sources: Iterable[str], running: list[nn.Module], scope: Scope) -> None:
    """Let Dynamo compile again for other modules: it would share the code among all that are built alike.

    Their parameters are inputs, so that it may; but each has sites of its own. Recompilations for another module
    do not count towards ``recompile_limit``.
    """
    heads = {head.groups() for source in sources if (head := _HEAD.match(source))}
    heads |= {("L", name) for name, value in scope["L"].items() if any(value is m for m in running)}
    for kind, name in heads:
        # What has no attributes is a container made anew for each call; the modules in it are not known again.
        if hasattr(scope[kind].get(name), "__dict__"):
            source = LocalSource(name) if kind == "L" else GlobalSource(name)
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def model_call() -> FrameType | None:
    """Return the frame of the call of the model that is running: the outermost call of a module in torch.compile."""
    found, frame = None, inspect.currentframe()
    while frame is not None and (frame.f_code.co_name, frame.f_code.co_filename) != _ENTRANCE:
        found = frame if frame.f_code in _MODULE_CALLS else found
        frame = frame.f_back
    return found


def _run_by_python(frames: Sequence[FrameType], names: Mapping[int, str]) -> Iterator[str]:
    """Yield those of the model's frames that Dynamo left to Python, and in which activations may be called.

    It leaves a function that breaks the graph in a loop, and torch's own forwards, such as nn.Sequential's.
    """
    modules = [i for i, frame in enumerate(frames) if isinstance(frame.f_locals.get("self"), nn.Module)]
    for frame in frames[: modules[-1] + 1] if modules else ():
        code, own = frame.f_code, frame.f_locals.get("self")
        calls = code not in convert_frame.output_codes and code.co_filename != contextlib.__file__
        if code.co_filename.startswith(_TORCH):
            children = own.children() if code.co_name == "forward" and isinstance(own, nn.Module) else ()
            calls &= any(match_module(m) is not None and not _is_traced_activation(m) for m in children)
        if calls:
            name = below(names.get(id(own), ""), code.co_name)
            yield f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _callers() -> list[FrameType]:
    """Return the Python frames that lead from torch.compile to the one being compiled, innermost first."""
    frames = []
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_name, frame.f_code.co_filename) != _ENTRANCE:
        frames.append(frame)
        frame = frame.f_back
    compiling = [i for i, frame in enumerate(frames) if frame.f_code.co_filename == convert_frame.__file__]
    return frames[compiling[-1] + 1 :] if compiling else frames


def _objects_along(source: str, scope: Scope) -> Iterator[Any]:
    """Yield the objects along a source such as ``L['self'].conv.weight``, as far as they can be followed."""
    head = _HEAD.match(source)
    if head is None or head[2] not in scope[head[1]]:
        return
    value = scope[head[1]][head[2]]
    yield value
    position = head.end()
    while step := _STEP.match(source, position):
        key, index, attribute = step.groups()
        try:
            value = getattr(value, attribute) if attribute else value[key or int(index)]
        except (AttributeError, IndexError, KeyError, TypeError):
            return
        yield value
        position = step.end()


def _owners(
    stacks: Mapping[fx.Node, Mapping[str, Any]], scope: Scope, names: dict[int, str]
) -> dict[fx.Node, ModuleCall]:
    """Return the outermost call of an activation module around each call.

    Dynamo's key counts the calls of a module by the source it was found at: ``140510399079504@1``.
    """
    found: dict[str, nn.Module | None] = {}
    owners = {}
    for node, stack in stacks.items():
        for key, (source, *_) in stack.items():
            if source not in found:
                *_, module = [None, *_objects_along(source, scope)]
                found[source] = module if _is_traced_activation(module) else None
            if (module := found[source]) is not None:
                owners[node] = ModuleCall(_path(source, scope, names), module, (source, key))
                break
    return owners


def _is_traced_activation(module: Any) -> bool:
    """Return whether a module is an activation that Dynamo traces into; torch's own are functions to it."""
    foreign = isinstance(module, nn.Module) and not type(module).__module__.startswith("torch.nn.")
    return foreign and match_module(module) is not None


def _belongs_to_module(placeholder: fx.Node, scope: Scope) -> bool:
    """Return whether a tensor was found in a module or among the globals; others come from the call's arguments."""
    argument = placeholder.meta.get("grapharg")
    if argument is None:
        return False
    source = argument.source.name
    return source.startswith("G[") or any(isinstance(v, nn.Module) for v in _objects_along(source, scope))


def _path(source: str, scope: Scope, names: dict[int, str]) -> str:
    """Return the path of the module at ``source`` in the model; of one that the model lacks, the source's own words."""
    *_, found = [None, *_objects_along(source, scope)]
    if id(found) in names:
        return names[id(found)]
    steps = [next(filter(None, step)) for step in _STEP.findall(source)]
    return ".".join(s for s in steps[1:] if s != "_modules")
