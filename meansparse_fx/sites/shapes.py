"""Floor 2: what each node of a graph yields for the example images: shapes, and which tensors share memory.

Imports torch and floor 1.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ..activations import match_module
from ..errors import CaptureError, SiteError, first_line
from ..hooks import entering, has_hooks, has_own_forward, may_keep
from ..published import published_operator
from ..state import kept_buffers

# They keep their input's shape; so do published operators, which look at values. Asking for a fake batch norm took 8 ms
# of Python (torch 2.15, one core), which was three quarters of the time in a network of conv, norm and activation; a
# convolution took as long as eight other operators.
_NORMS: set[Any] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm}
_NORMS |= {F.batch_norm, F.group_norm, F.layer_norm}

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv}

_UNKNOWN_SIZE = 8191  # stands for a size that depends on values; a prime, so that no other sizes multiply to it


class Shape(tuple):
    """The shape of a tensor, which a node that yields one has in its place. What ``x.shape`` yields is a torch.Size."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What running a graph once showed of its nodes.

    Attributes:
        values: By node: the result with a `Shape` in place of each tensor. Numbers stay numbers.
        memory: By node: keys of the storages the result lives in.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    memory: dict[fx.Node, frozenset[int]] = field(default_factory=dict)

    def shape(self, node: Any) -> Shape:
        """Return the shape of a node's tensor; of its first tensor if it yields several; empty if it yields none."""
        return next(self._shapes(node), Shape())

    def is_tensor(self, node: Any) -> bool:
        """Return whether a node yields a tensor, or several."""
        return any(True for _ in self._shapes(node))

    def _shapes(self, node: Any) -> Iterator[Shape]:
        leaves = pytree.tree_leaves(self.values.get(node)) if isinstance(node, fx.Node) else []
        return (leaf for leaf in leaves if isinstance(leaf, Shape))


def propagate(graph_module: fx.GraphModule, images: Tensor) -> Flow:
    """Return the flow of ``images`` through a graph, without computing where every operator has a fake."""
    recorder = _Recorder(graph_module)
    with kept_buffers(graph_module):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                return recorder.record(fake.from_tensor(images))
        except Exception:
            # Some operator has no fake or looks at values. The model has run on these images before: run it.
            try:
                with torch.random.fork_rng([images.device] if images.is_cuda else []):
                    return _Recorder(graph_module).record(images.clone())
            except CaptureError:  # the graph takes no batch of this size
                raise
            except Exception as error:
                raise SiteError(
                    f"the model fails under torch.no_grad(): {first_line(error)}. What wants gradients in "
                    "forward goes under torch.enable_grad()"
                ) from error


def recorded(graph: fx.Graph) -> Flow:
    """Return the flow that Dynamo saw while it traced a graph; sizes that may vary are those of its example."""
    flow = Flow()
    for node in graph.nodes:
        result = node.meta.get("example_value")
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.layout is torch.strided]
        flow.memory[node] = frozenset(t.untyped_storage()._cdata for t in tensors)
        flow.values[node] = pytree.tree_map(_plain, result)
    return flow


def _plain(value: Any) -> Any:
    """Return a tensor's shape, and numbers without symbols: comparing symbols would add guards to the graph."""
    if isinstance(value, Tensor):
        return Shape(map(_plain, value.shape))
    if isinstance(value, torch.SymInt):
        return _UNKNOWN_SIZE if value.node.hint is None else int(value.node.hint)
    return value


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self._flow = Flow()
        self._alive: list[Any] = []  # a key is an address: it must not be used again while others may compare
        # A library's module may keep what it computes, as hooks may, and would keep a fake tensor: run a copy.
        self._copies = {
            target: copy.deepcopy(module, {id(p): p for p in module.parameters()})
            for target in {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
            if may_keep(module := graph_module.get_submodule(target))
        }

    def record(self, images: Tensor) -> Flow:
        with torch.no_grad():
            self.run(entering(self.module, images))
        return self._flow

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
        self._alive += storages
        self._flow.memory[n] = frozenset(s._cdata for s in storages)
        self._flow.values[n] = pytree.tree_map(lambda v: Shape(v.shape) if isinstance(v, Tensor) else v, result)
        return result

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        module = self._copies.get(target) or self.fetch_attr(target)
        result = cheap_fake(module, args)
        return module(*args, **kwargs) if result is None else result

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        result = cheap_fake(target, args)
        return target(*args, **kwargs) if result is None else result


def cheap_fake(target: Any, args: tuple) -> Tensor | None:
    """Return the fake result of calling a module or a function, where it is known without asking torch; else None."""
    if (x := _plain_input(target, args)) is None:
        return None
    if type(target) is nn.Conv2d:
        return _convolved(target, x)
    return torch.empty_like(x) if keeps_shape(target) else None


def like_input(function: Any, args: tuple) -> bool:
    """Return whether a result is known to be like the first argument, which then serves as its example."""
    if (x := _plain_input(function, args)) is None:
        return False
    if isinstance(function, nn.Module) and match_module(function) is not None:
        return True
    if function in _ARITHMETIC and len(args) == 2:
        layouts = {(t.dtype, t.shape, t.stride()) for t in args if isinstance(t, Tensor)}
        alike = isinstance(args[1], Tensor) or type(args[1]) in (int, float)
        return x.is_floating_point() and alike and len(layouts) == 1
    return keeps_shape(function)


def _plain_input(target: Any, args: tuple) -> FakeTensor | None:
    """Return the first argument of a call, if nothing but the target's own code and that tell what comes out.

    Of what is not contiguous, torch decides from case to case how a result is laid out.
    """
    x = args[0] if args else None
    if not isinstance(x, FakeTensor) or not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
        return None
    if isinstance(target, nn.Module) and (has_hooks(target) or has_own_forward(target)):
        return None
    return x


def keeps_shape(target: Any) -> bool:
    """Return whether the result of a module or a function is known to be like its first argument."""
    if isinstance(target, nn.Module):
        return type(target) in _NORMS or published_operator(target) is not None
    return target in _NORMS


def _convolved(conv: nn.Conv2d, x: FakeTensor) -> Tensor | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.dim() != 4 or not conv.weight.is_contiguous():
        return None
    rows = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    sizes = [(n + 2 * pad - gap * (kernel - 1) - 1) // stride + 1 for n, kernel, stride, pad, gap in rows]
    return x.new_empty(x.shape[0], conv.out_channels, *sizes)
