"""Floor 2: what each node of a graph yields for the example images: shapes, and which tensors share memory.

Imports torch and floor 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..batches import cycled
from ..copies import copied_leaves
from ..dataless import DatalessMode, storage
from ..errors import CaptureError, SiteError, first_line
from ..hooks import entering
from ..state import kept_buffers, kept_random_state

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

    def add(self, node: fx.Node, result: Any) -> list[Tensor]:
        """Note what a node yields; return the tensors of it that lie in some memory."""
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.layout is torch.strided]
        self.memory[node] = frozenset(map(storage, tensors))
        self.values[node] = pytree.tree_map(_plain, result)
        return tensors

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
    """Return the flow of ``images`` through a graph, computed only where some operator needs values.

    Of one image it is that of two of it, for sizes tell more then: a position embedding [1, C, H, W] is no residual,
    the first dimension of [N * C, H, W] does not hold the channels.
    """
    flow = _run(graph_module, images)  # also of one image, which the graph may refuse
    return _run(graph_module, cycled(images, 2)) if len(images) == 1 else flow


def _run(graph_module: fx.GraphModule, images: Tensor) -> Flow:
    recorder = _Recorder(graph_module)
    with kept_buffers(graph_module):
        try:
            with DatalessMode() as mode:
                return recorder.record(mode.without_data(images))
        except Exception:
            # Some operator needs values. The model has run on these images before: run it.
            try:
                with kept_random_state(images.device):
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
        flow.add(node, node.meta.get("example_value"))
    return flow


def _plain(value: Any) -> Any:
    """Return a tensor's shape, and numbers without symbols: comparing symbols would add guards to the graph."""
    if isinstance(value, Tensor):
        return Shape(map(_plain, value.shape))
    if isinstance(value, torch.SymInt):
        return _UNKNOWN_SIZE if value.node.hint is None else int(value.node.hint)
    return value


class _Recorder(fx.Interpreter):
    module: fx.GraphModule

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self._flow = Flow()
        self._alive: list[Any] = []  # a key is an address: it must not be used again while others may compare

    def record(self, images: Tensor) -> Flow:
        with copied_leaves(self.module), torch.no_grad():  # what modules keep would be tensors without data
            self.run(entering(self.module, images))
        return self._flow

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._alive += self._flow.add(n, result)
        return result
