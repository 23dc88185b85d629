"""Floor 2: whether a graph is the model: the same values, bit for bit, and every activation in sight.

Shown by operations where both can be recorded and are the same: then it holds for any images of the example's size, in
batches of two and three. Otherwise by numbers: on two batches both are run, on a copy. Imports torch, `recording` and
floor 1.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..activations import match_function, match_module
from ..errors import CaptureError
from ..hooks import has_hooks
from .copies import copied
from .recording import Forms, Recording, record, state_of


def shadow(model: nn.Module) -> nn.Module:
    """Return a copy that shares the model's parameters, which neither tracing nor inference changes."""
    return copied(model, {id(p): p for p in model.parameters()})


@contextmanager
def kept_parameters(model: nn.Module) -> Iterator[list[str]]:
    """Undo what a model does that assigns to ``parameter.data``; yield a list, in the end the names of those."""
    before = [(name, p, p.data) for name, p in model.named_parameters()]
    reassigned: list[str] = []
    try:
        yield reassigned
    finally:
        for name, parameter, data in before:
            if not (parameter.is_meta or parameter.data.is_set_to(data)):
                parameter.data = data
                reassigned.append(name)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Turn off torch's fused transformer layers, which show no activation and round differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(slots=True)
class Reference:
    """What a model computes on two batches of different size, and how many activations it calls.

    Recorded where it can be (see `recording`), which costs no arithmetic; the numbers themselves are computed when
    something has to be decided by them.
    """

    model: nn.Module
    batches: tuple[Tensor, ...]
    recordings: tuple[Recording, ...] = ()
    activations: int = 0
    _outputs: tuple[Any, ...] | None = None
    _changed: str = ""
    _forms: Forms = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Reference:
        """Return the reference on two batches, cycling through the rows if there are too few."""
        if len(images) == 0:
            raise CaptureError("the example images are an empty batch: pass at least one image")
        reference = cls(model, (images[:2], images[[row % len(images) for row in range(3)]]))
        try:
            reference._record()
        except Exception:  # values are asked for, an operator needs data, or the model fails: computing tells
            reference._compute()
        return reference

    def check(self, graph_module: fx.GraphModule) -> str:
        """Return by what the graph was seen to compute the same: ``operations``, or only ``numbers``.

        Raises:
            CaptureError: It computes something else, or hides an activation.
        """
        shown = count_activations(graph_module)
        if shown < self.activations:
            raise CaptureError(
                f"the model calls {self.activations} activations and the graph shows {shown}: "
                f"{self.activations - shown} are hidden in modules, functions or hooks that are not traced into"
            )
        if self.recordings and self._records_the_same(graph_module):
            return "operations"
        self._check_numbers(graph_module)
        return "numbers"

    def _record(self) -> None:
        own, state = shadow(self.model), state_of(self.model)
        mirrored = state_of(own, state)
        counter, recordings = _ActivationCounter(own), []
        for batch in self.batches:
            counter.count = 0
            with _conditions(batch), kept_parameters(own), counter:
                recordings.append(record(own, batch, mirrored, self._forms))
        self.recordings, self.activations = tuple(recordings), counter.count

    def _records_the_same(self, graph_module: fx.GraphModule) -> bool:
        with _copied_leaves(graph_module):
            state = state_of(graph_module, state_of(self.model))
            try:
                for batch, recording in zip(self.batches, self.recordings, strict=True):
                    with _conditions(batch):
                        if record(graph_module, batch, state, self._forms) != recording:
                            return False
            except Exception:  # the numbers will tell whether that is the graph's fault
                return False
        return True

    def _compute(self) -> tuple[Any, ...]:
        """Return the model's outputs, computed once."""
        if self._outputs is not None:
            return self._outputs
        own = shadow(self.model)
        counter, outputs = _ActivationCounter(own), []
        for batch in self.batches:
            counter.count = 0
            try:
                with kept_parameters(own) as reassigned, counter:
                    outputs.append(_run(own, batch))
            except Exception as error:
                raise CaptureError(
                    f"{type(own).__name__} itself fails on images of shape {list(batch.shape)}, dtype {batch.dtype}, "
                    f"device {batch.device}: {type(error).__name__}: {error}. Pass example images as the model takes "
                    "them (on the command line: --input-shape 1x28x28)"
                ) from error
        self._outputs, self.activations = tuple(outputs), counter.count
        if reassigned:
            self._changed = f". It gives {reassigned[0]} new values whenever it runs, which no graph does"
        return self._outputs

    def _check_numbers(self, graph_module: fx.GraphModule) -> None:
        buffers = [(b, b.clone()) for b in graph_module.buffers()]
        for batch, expected in zip(self.batches, self._compute(), strict=True):
            try:
                actual = _run(graph_module, batch)
            except Exception as error:
                raise CaptureError(
                    f"the captured graph fails on a batch of {len(batch)}: {type(error).__name__}: {error}"
                ) from error
            if not _same(actual, expected):
                raise CaptureError(
                    f"the captured graph computes something else than the model on a batch of {len(batch)}, "
                    f"as it does where a tensor is changed in place under two names{self._changed}"
                )
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _conditions(images: Tensor) -> Iterator[None]:
    """Run without gradients, with the same random numbers each time and none used up."""
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad(), plain_attention():
        torch.manual_seed(0)
        yield


def _run(model: nn.Module, images: Tensor) -> Any:
    with _conditions(images):
        return model(images.clone())


@contextmanager
def _copied_leaves(graph_module: fx.GraphModule) -> Iterator[None]:
    """Put copies in the place of modules that the graph calls and that may keep what they are given.

    Those of libraries, and those with hooks.
    """
    replaced = []
    for target in dict.fromkeys(node.target for node in graph_module.graph.find_nodes(op="call_module")):
        path, _, name = target.rpartition(".")
        owner = graph_module.get_submodule(path)
        module = owner._modules[name]
        if has_hooks(module) or not type(module).__module__.startswith("torch.nn."):
            replaced.append((owner, name, module))
    try:
        for owner, name, module in replaced:
            owner._modules[name] = shadow(module)
        yield
    finally:
        for owner, name, module in replaced:
            owner._modules[name] = module


def _same(actual: Any, expected: Any) -> bool:
    """Return whether two outputs agree bit for bit; NaN equals NaN."""
    if dataclasses.is_dataclass(expected):
        actual, expected = (vars(v) if hasattr(v, "__dict__") else v for v in (actual, expected))
    actual, actual_spec = pytree.tree_flatten(actual)
    expected, expected_spec = pytree.tree_flatten(expected)
    if actual_spec != expected_spec:
        return False
    for a, b in zip(actual, expected, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if a != b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return False
    return True


def count_activations(graph_module: fx.GraphModule) -> int:
    """Return how many calls of known activations the graph makes."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    nodes = graph_module.graph.nodes
    functions = sum(_is_activation(n.target) for n in nodes if n.op in ("call_function", "call_method"))
    return functions + sum(match_module(modules[n.target]) is not None for n in nodes if n.op == "call_module")


def _is_activation(target: Callable | str) -> bool:
    return match_function(target, (), {}) is not None  # whatever its arguments


class _ActivationCounter(TorchFunctionMode):
    """Counts the activations that a model calls: its activation modules, and outside of them the functions.

    Inside ``__torch_function__`` the mode is off, so a function that calls another counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = 0
        self._depth = 0
        for module in model.modules():
            if match_module(module) is not None:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, prepend=True)  # its own hooks call what they call

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.count += self._depth == 0
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        target = func.__name__ if isinstance(func, types.MethodDescriptorType) else func
        if self._depth == 0 and _is_activation(target):
            self.count += 1
        return func(*args, **kwargs)
