"""Floor 2: a symbolic trace that asks the example images where plain proxies have no answer.

The graph holds for images of the example's size and for any batch size. Examples are computed without data where every
operator allows it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError

from ..batches import cycled
from ..dataless import Dataless, DatalessMode
from ..sites.ops import is_in_place
from ..state import kept_random_state
from .derivatives import check_question
from .functions import values_of
from .guards import BATCH_SIZES, SizeWatch, expect_answer, expect_size
from .lines import in_words, source_line
from .proxies import (
    FACTORIES,
    ExampleProxy,
    NumberProxy,
    Retrace,
    Sizes,
    TensorProxy,
    TraceOptions,
    replaced_builtins,
    wrapped,
)
from .tracing import ModelTracer, Traced, trace

# What may answer a question while tracing: a number or a description that both batches agree on.
_ANSWERS = (bool, int, float, complex, str, torch.Size, torch.device, torch.dtype, torch.layout, torch.memory_format)

# They turn a tensor's values into Python's; what images hold must not decide what the graph does.
_READS_VALUES = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__contains__"}

_ASK_DTYPE = {"is_floating_point", "is_complex", "element_size", "type"}

_SPLITS = {"split", "chunk", "tensor_split"}
_HOW_MANY = "the number of tensors depends on the batch size"


def trace_by_example(model: nn.Module, images: Tensor) -> Traced:
    """Return the graph of ``model`` for images of one size.

    The graph takes any batch size, and refuses images of another size.

    Args:
        images: ``[N, ...]``, not empty, on the model's device.

    Raises:
        CaptureError: Tracing stopped; names the module and the line.

    Example:
        >>> class Padding(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.relu(torch.nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x)
        >>> [node.name for node in trace_by_example(Padding(), torch.rand(2, 3, 5, 5)).graph.nodes]
        ['x', 'expect_size', 'pad', 'relu', 'output']
    """
    options = TraceOptions()
    with kept_random_state(images.device):
        first, second = (cycled(images, size) for size in BATCH_SIZES)
        if images.is_floating_point():
            # Other pixels in the second batch, so that a size which depends on values differs, too.
            second = second + torch.randn_like(second)
        while True:
            try:
                traced = trace(model, partial(ExampleTracer, batches=(first, second), options=options))
            except Retrace as other:
                options = other.options
            else:
                traced.graph._tracer_cls = ModelTracer  # unpickling a GraphModule makes one, without examples
                return traced


class ExampleTracer(ModelTracer):
    """Traces a model with proxies that know what the example batches give.

    Args:
        leaves: Module types not to trace into.
    """

    def __init__(self, leaves: frozenset[type], batches: tuple[Tensor, ...], options: TraceOptions) -> None:
        super().__init__(leaves)
        self.options = options
        self._mode = None if options.values else DatalessMode()
        self._batches = batches
        self._asked_dtype = False  # by the model, and then answered for good
        self._pure: list[fx.Node] = []  # sizes, parameters and parts of tuples: without readers they are nothing
        self._autowrap_search.append(torch)
        self._autowrap_function_ids |= {id(factory) for factory in FACTORIES}

    def trace(self, root: nn.Module | Callable, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        wrapping = mock.patch.object(_symbolic_trace, "_create_wrapped_func", wrapped)
        with replaced_builtins(self.options.namespaces), wrapping:
            graph = super().trace(root, concrete_args)
        if self._asked_dtype:
            first = next(n for n in graph.nodes if n.target is expect_size)
            first.args = (*first.args, self._batches[0].dtype)
        for node in reversed(self._pure):
            if not node.users:
                graph.erase_node(node)
        return graph

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        function, (root, images) = super().create_args_for_root(root_fn, is_module, concrete_args)
        size = tuple(self._batches[0].shape[1:])
        self.create_node("call_function", expect_size, (images.node, size), {})
        return function, [root, images]

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Dataless):
            raise TraceError("a tensor without data, kept by a module that ran on examples, would enter the graph")
        return super().create_arg(tuple(a) if isinstance(a, torch.Size | Sizes) else a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Return the answer to a question; else a new node's proxy, or a tuple, list or dict of its parts' proxies."""
        kind, target, args = self.as_graph_call(kind, target, args)
        examples, depends_on_values = self._examples(kind, target, args, kwargs)
        first, name_of_target = examples[0], _name(target)
        may_differ = _may_differ(name_of_target, values_of(ExampleProxy, (args, kwargs)), examples)
        if len({type(e) for e in examples}) > 1:
            raise TraceError(f"{target} gives {type(first).__name__} for one batch size and not for another")
        settled = not (depends_on_values and isinstance(first, int | float | torch.Size))
        if settled and isinstance(first, _ANSWERS) and all(e == first for e in examples):
            size = may_differ and type(first) in (int, torch.Size)
            if len(examples) > 1 and (size or any(type(a) is NumberProxy for a in args)):
                self.expect(self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs)), first)
            if name_of_target in _READS_VALUES:
                self.note_read(*args)
            if isinstance(first, torch.dtype) or name_of_target in _ASK_DTYPE:
                self._asked_dtype = True
            return first
        if first is None and target is getattr:
            return None
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr)
        if kind == "get_attr" or (target in (operator.getitem, getattr) and not isinstance(first, Tensor)):
            self._pure.append(node)
        several = isinstance(first, tuple | list) and len(examples) > 1 and len({len(e) for e in examples}) == 1
        if several and (may_differ or _splits_the_batch(name_of_target, args, kwargs, examples)):
            whole = ExampleProxy(node, self, examples, depends_on_values, may_differ=True)
            self.create_proxy("call_function", len, (whole,), {})  # expected: few or many images give another
        return self._present(node, examples, depends_on_values, may_differ)

    def expect(self, number: fx.Node, answer: Any) -> None:
        """Let the graph refuse batches of which ``number`` is not what answered the model."""
        self.create_node("call_function", expect_answer, (number, answer, in_words(source_line())), {})

    def note_read(self, *values: Any) -> None:
        """Remember of which parameters and buffers the values answered the model: those that ``values`` are made of."""
        waiting = [a.node for a in values if isinstance(a, ExampleProxy)]
        while waiting:
            node = waiting.pop()
            waiting += node.all_input_nodes
            if node.op == "get_attr":
                self.values_read[str(node.target)] = None

    def _present(self, node: fx.Node, examples: tuple, depends_on_values: bool, may_differ: bool) -> Any:
        """Return what the model sees of a new node: containers are real ones, of proxies."""
        first = examples[0]
        if first is None:
            return None
        if isinstance(first, Tensor):
            return TensorProxy(node, self, examples, depends_on_values, may_differ)
        if isinstance(first, int | float):
            return NumberProxy(node, self, examples, depends_on_values, may_differ)
        whole = ExampleProxy(node, self, examples, depends_on_values, may_differ)
        if type(first) is dict:
            return {key: self._part(whole, key) for key in first}
        if type(first) in (tuple, list, torch.Size):
            if len({len(e) for e in examples}) > 1:
                raise TraceError(_HOW_MANY)
            container = Sizes if type(first) is torch.Size else type(first)
            return container(self._part(whole, i) for i in range(len(first)))
        return whole

    def _part(self, whole: ExampleProxy, key: Any) -> Any:
        part = self.create_proxy("call_function", operator.getitem, (whole, key), {})
        if isinstance(part, fx.Proxy) and part.node not in self._pure[-1:]:
            self._pure.append(part.node)
        return part

    # Computing examples.

    def _examples(self, kind: str, target: Any, args: tuple, kwargs: dict) -> tuple[tuple, bool]:
        """Return what a node yields for each batch, or one value if it does not depend on the images; and whether
        its sizes depend on values."""
        if kind == "placeholder":
            with self.evaluating():
                return tuple(self._mode.without_data(b) if self._mode else b for b in self._batches), False
        if kind == "get_attr":
            with self.evaluating():
                return (operator.attrgetter(target)(self.root),), False
        proxies = values_of(ExampleProxy, (args, kwargs))
        count = max((len(p.examples) for p in proxies), default=1)
        name = _name(target)
        if count > 1 and name in _READS_VALUES:
            raise TraceError(f"{name}() asks for values that are computed from the images")
        if count > 1 and target is getattr:
            check_question(args[1])
        if is_in_place(name) and args and isinstance(args[0], ExampleProxy) and len(args[0].examples) == 1:
            # Parameters are the model's own: change a copy. From here on it depends on what it was changed by.
            args[0].examples = tuple(args[0].examples[0].clone() for _ in range(count))
        with SizeWatch() if count > 1 and self._mode is None else contextlib.nullcontext() as watch:
            examples = tuple(self._example(kind, target, args, kwargs, k, count > 1) for k in range(count))
        return examples, any(p.depends_on_values for p in proxies) or bool(watch and watch.depends_on_values)

    def _example(self, kind: str, target: Any, args: tuple, kwargs: dict, k: int, varies: bool) -> Any:
        """Return what a node yields for the k-th batch."""
        args, kwargs = map_aggregate(
            (args, kwargs), lambda a: a.examples[k % len(a.examples)] if isinstance(a, ExampleProxy) else a
        )
        if kind == "call_method":
            function = getattr(args[0], target)
            args = args[1:]
        else:
            function = self.root.get_submodule(target) if kind == "call_module" else target
        if not (varies and self._mode):
            with self.evaluating():
                return function(*args, **kwargs)
        try:
            with self.evaluating(), self._mode:
                return function(*args, **kwargs)
        except Exception as error:
            raise Retrace(replace(self.options, values=True)) from error

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run modules and functions instead of tracing them."""
        before, self._evaluating = self._evaluating, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._evaluating = before


def _may_differ(name: str, given: list[ExampleProxy], examples: tuple) -> bool:
    """Return whether sizes that the examples agree on may differ in other batches: what they are made of differed."""
    if any(proxy.may_differ for proxy in given):
        return True
    before = max((_differing(proxy.examples) for proxy in given), default=0)
    return before > 0 and isinstance(examples[0], Tensor) and (name == "squeeze" or _differing(examples) < before)


def _splits_the_batch(name: str, args: tuple, kwargs: dict, examples: tuple) -> bool:
    """Return whether a call cuts a dimension into parts that is of another size in each batch."""
    if name not in _SPLITS:
        return False
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    return len({example[0].shape[dim] for example in examples}) > 1


def _differing(examples: tuple) -> int:
    """Return how many dimensions are of another size in each batch."""
    if len(examples) == 1 or not isinstance(examples[0], Tensor):
        return 0
    return sum(len(set(sizes)) > 1 for sizes in zip(*(e.shape for e in examples), strict=False))


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")
