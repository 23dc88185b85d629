"""Floor 2: the channel dimension of every tensor in a graph, by data flow. Imports `shapes` and floor 1 only.

Forward from the layers that state it, through calls that tell where it goes; where that says nothing, backward from the
next layer that expects it. What a call does is seen by running it on the meta device, where nothing is computed: of a
view, strides tell which dimension came from the channels; of a product or a sum, the sizes of the result do when there
are twice as many channels. A rule takes a `Call` and returns the dimension of the result that holds the channels, or
None for unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..dataless import storage
from .shapes import Flow, Shape

if TYPE_CHECKING:
    from .ops import Operators


@dataclass(frozen=True, slots=True)
class Call:
    """One call with all that is known of what it reads.

    Attributes:
        flow: Shapes of all nodes.
        axes: Channel dimensions known so far.
    """

    node: fx.Node
    operators: Operators
    flow: Flow
    axes: Mapping[fx.Node, int | None]

    @property
    def source(self) -> fx.Node | None:
        """The first node that it reads a tensor of."""
        return next((n for n in self.node.all_input_nodes if self.flow.is_tensor(n)), None)

    @property
    def axis(self) -> int | None:
        """The channel dimension of the first node."""
        source = self.source
        return None if source is None else self.axes.get(source)

    @property
    def shape(self) -> Shape:
        """The shape of the first node's tensor."""
        return self.flow.shape(self.source)

    @property
    def result(self) -> Shape:
        """The shape of the result, or of the first if there are several."""
        return self.flow.shape(self.node)

    @property
    def known(self) -> dict[fx.Node, int]:
        """The channel dimensions of what it reads, where they are known."""
        return {n: axis for n in self.node.all_input_nodes if (axis := self.axes.get(n)) is not None}

    def run(self, meta: Callable[[fx.Node, Shape], Tensor]) -> Tensor | None:
        """Return the first tensor that the call gives for others in the place of its own; None if it takes them not."""

        def given(node: fx.Node) -> Any:
            values = self.flow.values.get(node)
            return pytree.tree_map(lambda v: meta(node, v) if isinstance(v, Shape) else v, values)

        args, kwargs = (map_arg(a, given) for a in (self.node.args, self.node.kwargs))
        try:
            result = self.operators.call(self.node, args, kwargs)
        except Exception:  # any of torch's, about shapes that do not fit
            return None
        return next((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), None)

    def doubled(self, dims: Mapping[fx.Node, int]) -> list[int] | None:
        """Return which dimensions of the result double if those of its operands do; None if the call fails then."""

        def meta(node: fx.Node, shape: Shape) -> Tensor:
            sizes = [2 * n if dims.get(node) == d else n for d, n in enumerate(shape)]
            return torch.empty(sizes, device="meta")

        found = self.run(meta)
        return None if found is None else [d for d, n in enumerate(found.shape) if n == 2 * self.result[d]]


Rule = Callable[[Call], "int | None"]


def unknown(call: Call) -> int | None:
    """No statement about the channels."""
    return None


def same(call: Call) -> int | None:
    """Dimensions stay where they are; the channels are still the channels if their number is the same."""
    axis = call.axis
    return axis if axis is not None and call.shape[axis : axis + 1] == call.result[axis : axis + 1] else None


def unchanged(call: Call) -> int | None:
    """Code of the model's author leaves dimensions where they are if it leaves the shape."""
    return call.axis if call.shape == call.result else None


def elementwise(call: Call) -> int | None:
    """Operands that know their channels must agree, aligned at the last dimension as broadcasting does."""
    return _agreed(axis + len(call.result) - len(call.flow.shape(n)) for n, axis in call.known.items())


def joined(call: Call) -> int | None:
    """cat: all operands have the result's dimensions; a module's pre-hooks: they return what they are given."""
    return _agreed(call.known.values())


def normalized(call: Call) -> int | None:
    """A norm over the last dimension alone says that it holds the channels."""
    return len(call.result) - 1 if _over_last_alone(call) else call.axis


def _over_last_alone(call: Call) -> bool:
    given: Any = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("normalized_shape")
    if isinstance(given, fx.Node):  # F.layer_norm(x, x.shape[1:])
        given = call.flow.values[given]
    return len(getattr(call.operators.module(call.node), "normalized_shape", given)) == 1


def regrouped(call: Call) -> int | None:
    """view, flatten, squeeze, ...: row-major order stays; channels survive as exactly one dimension or not at all."""
    if call.axis is None or call.shape == call.result:
        return call.axis
    size, before = call.shape[call.axis], math.prod(call.shape[: call.axis])
    fits = [d for d, n in enumerate(call.result) if n == size and math.prod(call.result[:d]) == before]
    return fits[0] if len(fits) == 1 else None


def by_running(call: Call) -> int | None:
    """Any other operator of torch's is run: where a view has the channels' stride, or what doubles with them.

    Where these are summed over with a weight, its other dimension makes new ones.
    """
    source, axis, shape = call.source, call.axis, call.shape
    if source is not None and axis is not None:
        if not isinstance(call.flow.values[source], Shape):
            return axis  # of several results, the one taken
        own = torch.empty_strided(shape, [int(d == axis) for d in range(len(shape))], device="meta")
        view = call.run(lambda node, shape: own if node is source else torch.empty(shape, device="meta"))
        if view is not None and storage(view) == storage(own):
            along = [d for d, stride in enumerate(view.stride()) if stride]
            # A new dimension of size 1 may have a stride, too.
            along = along if len(along) == 1 else [d for d in along if view.shape[d] > 1]
            return along[0] if len(along) == 1 else None
    dims = call.doubled(call.known) if call.known else None
    if dims is None:
        return _agreed(_made_by_weights(call))
    sizes = {call.flow.shape(n)[dim] for n, dim in call.known.items()}
    return dims[0] if len(dims) == 1 and sizes == {call.result[dims[0]]} else None


def _made_by_weights(call: Call) -> Iterable[int]:
    """Yield the dimensions of the result that are one of a weight's whose others are all summed over."""
    weights = {n: len(call.flow.shape(n)) for n in call.node.all_input_nodes if call.operators.is_weight(n)}
    biases = {n: 0 for n, rank in weights.items() if rank == 1}
    others = [(n, d) for n in call.node.all_input_nodes if n not in weights for d in range(len(call.flow.shape(n)))]
    for weight, rank in weights.items():
        for free in range(rank if rank > 1 else 0):
            dims = call.doubled(biases | {weight: free})
            summed = [d for d in range(rank) if any(call.doubled({weight: d, n: i}) == [] for n, i in others)]
            if dims is not None and len(dims) == 1 and len(summed) == rank - 1:
                yield dims[0]


def _agreed(axes: Iterable[int]) -> int | None:
    """Return the one value, or None if there are several or none."""
    known = set(axes)
    return known.pop() if len(known) == 1 else None


# Operators whose result has the same dimensions in the same order.
_KEEPING = (same, elementwise, joined, normalized)


def channel_axes(
    graph: fx.Graph, operators: Operators, flow: Flow, given: Mapping[fx.Node, int] | None = None
) -> dict[fx.Node, int | None]:
    """Return the channel dimension by node, as far as the layers before it tell; None is unknown.

    Args:
        given: The channel dimension of inputs, where it is known.
    """
    axes: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        if not flow.is_tensor(node) or node.op in ("placeholder", "get_attr", "output"):
            axes[node] = given.get(node) if given else None
            continue
        axes[node] = carried(node, operators, flow, axes)
    return axes


def carried(node: fx.Node, operators: Operators, flow: Flow, axes: Mapping[fx.Node, int | None]) -> int | None:
    """Return the channel dimension of a node's result, from those of what it reads; None is unknown."""
    op, rank = operators.op(node), len(flow.shape(node))
    if op.channels is not None and op.carry is by_running:
        axis: int | None = op.channels + (rank if op.channels < 0 else 0)
    else:
        axis = op.carry(Call(node, operators, flow, axes))
    return axis if axis is not None and 0 <= axis < rank else None


def expected_axes(graph: fx.Graph, operators: Operators, flow: Flow) -> dict[fx.Node, int | None]:
    """Return the channel dimension by node, as far as the layers that read it agree; None is unknown."""
    expected: dict[fx.Node, int | None] = {}
    for node in reversed(graph.nodes):
        shape = flow.shape(node)
        wishes: set[int | None] = set()
        for reader in node.users if shape else ():
            op = operators.op(reader)
            dim = op.channels
            if op.carry is normalized and not _over_last_alone(Call(reader, operators, flow, {})):
                dim = None
            if dim is not None and node is (reader.args[0] if reader.args else reader.kwargs.get("input")):
                wishes.add(dim % len(shape))
            elif op.carry in _KEEPING and len(flow.shape(reader)) == len(shape):
                wishes.add(expected[reader])
        wishes.discard(None)
        expected[node] = wishes.pop() if len(wishes) == 1 else None
    return expected
