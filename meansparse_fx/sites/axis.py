"""Floor 2: where the channels go. One small function for each way an operator moves its dimensions.

A rule takes a `Call` and returns the dimension of the result that holds the channels, or None for unknown.
Nothing is guessed from sizes: they serve only to tell how a reshape groups its dimensions.
Imports torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .shapes import Flow, Shape


@dataclass(frozen=True, slots=True)
class Call:
    """One node with all that is known of its arguments.

    Attributes:
        module: The module it calls, if it calls one.
        args, kwargs: Its arguments, nodes replaced by their shapes and numbers.
        flow: Shapes of all nodes.
        axes: Channel dimensions known so far.
    """

    node: fx.Node
    module: nn.Module | None
    args: tuple
    kwargs: dict
    flow: Flow
    axes: Mapping[fx.Node, int | None]

    @property
    def source(self) -> Any:
        """The first argument: the tensor, or for cat and stack the list of them."""
        return self.node.args[0] if self.node.args else self.node.kwargs.get("input")

    @property
    def axis(self) -> int | None:
        """The channel dimension of the first argument."""
        return self.axes.get(self.source) if isinstance(self.source, fx.Node) else None

    @property
    def shape(self) -> Shape:
        """The shape of the first argument."""
        return self.flow.shape(self.source)

    @property
    def result(self) -> Shape:
        """The shape of the result, or of the first if there are several."""
        return self.flow.shape(self.node)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name; a module's is its attribute."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Rule = Callable[[Call], "int | None"]


def unknown(call: Call) -> int | None:
    """No statement about the channels."""
    return None


def same(call: Call) -> int | None:
    """Dimensions stay where they are."""
    return call.axis


def second(call: Call) -> int | None:
    """Channels are dimension 1, as batch, instance and group norms have it."""
    return 1


def last(call: Call) -> int | None:
    """Channels are the last dimension of the result."""
    return len(call.result) - 1


def before_spatial(dims: int) -> Rule:
    """Channels stand right before ``dims`` spatial dimensions."""
    return lambda call: len(call.result) - 1 - dims


def layer_norm(call: Call) -> int | None:
    """A norm over the last dimension alone says that it holds the channels."""
    normalized = call.argument(1, "normalized_shape", ())
    return last(call) if len(normalized) == 1 else call.axis


def elementwise(call: Call) -> int | None:
    """Operands that know their channels must agree, aligned at the last dimension as broadcasting does."""
    known = {n: axis for n in _nodes(call.node.args) if (axis := call.axes.get(n)) is not None}
    return _agreed(axis + len(call.result) - len(call.flow.shape(n)) for n, axis in known.items())


def applied(call: Call) -> int | None:
    """A `torch.autograd.Function` that gives a tensor of its first one's shape leaves dimensions where they are."""
    first = next(iter(call.node.args[1:]), None)
    if not isinstance(first, fx.Node) or call.flow.shape(first) != call.result:
        return None
    return call.axes.get(first)


def joined(call: Call) -> int | None:
    """cat: all operands have the result's dimensions; a module's pre-hooks: they return what they are given."""
    return _agreed(call.axes.get(n) for n in _nodes(call.source))


def stacked(call: Call) -> int | None:
    """stack: a new dimension moves those behind it."""
    axis = joined(call)
    dim = _positive(call.argument(1, "dim", 0), len(call.result))
    return None if axis is None else axis + (dim <= axis)


def permuted(call: Call) -> int | None:
    dims = call.argument(1, "dims")
    dims = call.args[1:] if isinstance(dims, int) else dims
    order = [_positive(d, len(call.shape)) for d in dims]
    return order.index(call.axis) if call.axis in order else None


def transposed(call: Call) -> int | None:
    a, b = (_positive(call.argument(i, f"dim{i - 1}"), len(call.shape)) for i in (1, 2))
    return b if call.axis == a else a if call.axis == b else call.axis


def moved(call: Call) -> int | None:
    if call.axis is None:
        return None
    source, destination = (_tuple(call.argument(i, name)) for i, name in ((1, "source"), (2, "destination")))
    moves = {
        _positive(d, len(call.shape)): _positive(s, len(call.shape)) for s, d in zip(source, destination, strict=True)
    }
    rest = iter(d for d in range(len(call.shape)) if d not in moves.values())
    return [moves[d] if d in moves else next(rest) for d in range(len(call.shape))].index(call.axis)


def regrouped(call: Call) -> int | None:
    """view, flatten, squeeze, ...: row-major order stays; channels survive as exactly one dimension or not at all."""
    if call.axis is None or call.shape == call.result:
        return call.axis
    size, before = call.shape[call.axis], math.prod(call.shape[: call.axis])
    fits = [d for d, n in enumerate(call.result) if n == size and math.prod(call.result[:d]) == before]
    return fits[0] if len(fits) == 1 else None


def stretched(call: Call) -> int | None:
    """expand, repeat: new dimensions come first, and repeated channels are others."""
    if call.axis is None:
        return None
    axis = call.axis + len(call.result) - len(call.shape)
    return axis if call.result[axis] == call.shape[call.axis] else None


def reduced(call: Call) -> int | None:
    """mean, sum, ...: unknown where the channels themselves are summed over."""
    rank = len(call.shape)
    # norm has its order before the dimensions.
    position = 2 if call.node.target in ("norm", torch.norm) else 1
    dims = call.argument(position, "dim")
    if isinstance(dims, Shape):
        return elementwise(call)  # max(x, y)
    gone = set(range(rank)) if dims is None else {_positive(d, rank) for d in _tuple(dims) if not isinstance(d, bool)}
    if call.axis is None or call.axis in gone:
        return None
    return call.axis if len(call.result) == rank else call.axis - sum(d < call.axis for d in gone)


def dropped(default: int | None = None) -> Rule:
    """select, unbind: one dimension goes."""

    def rule(call: Call) -> int | None:
        dim = _positive(call.argument(1, "dim", default), len(call.shape))
        return None if call.axis in (None, dim) else call.axis - (dim < call.axis)

    return rule


def trailing(dims: int) -> Rule:
    """Pools, padding and resizing work on the last ``dims`` dimensions and leave those before them."""
    return lambda call: call.axis if call.axis is not None and call.axis < len(call.shape) - dims else None


def resized(call: Call) -> int | None:
    """Dimensions stay; the channels are still the channels if their number is the same."""
    axis = call.axis
    return axis if axis is not None and call.shape[axis] == call.result[axis] else None


def indexed(call: Call) -> int | None:
    """x[...]; of several results, the one taken."""
    index = call.args[1]
    if not isinstance(call.flow.values.get(call.source), Shape) or call.axis is None:
        return call.axis
    if isinstance(index, Shape):
        return None  # a tensor
    index = list(index) if isinstance(index, tuple) else [index]
    taken = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    where = index.index(Ellipsis)
    index[where : where + 1] = [slice(None)] * (len(call.shape) - taken)
    if not all(i is None or isinstance(i, int | slice) for i in index):
        return None  # a tensor or a list among them: dimensions may move
    dims: list[int | None] = []  # of the result: which dimension of the input each is
    source = 0
    for i in index:
        if not isinstance(i, int):
            dims.append(None if i is None else source)
        source += i is not None
    return dims.index(call.axis) if call.axis in dims else None


def left(call: Call) -> int | None:
    """What a module's hooks return: the same where a tensor's shape is."""
    return call.axis if call.shape == call.result else None


def product(call: Call) -> int | None:
    """Matrix products keep the left operand's rows and the right operand's columns."""
    rank = len(call.result)

    def kept(operand: Any, from_end: int) -> int | None:
        stays = call.axes.get(operand) == len(call.flow.shape(operand)) - from_end
        return rank - from_end if stays else None

    left, right = call.node.args[-2:]
    return _agreed((kept(left, 2), kept(right, 1)))


def attended(call: Call) -> int | None:
    """Attention returns mixtures of the values' rows."""
    value: Any = call.node.args[2] if len(call.node.args) > 2 else call.node.kwargs.get("value")
    return last(call) if call.axes.get(value) == len(call.result) - 1 else None


def attribute(call: Call) -> int | None:
    """x.T and x.mT; other attributes are no tensors or do not move."""
    if call.axis is None or call.args[1] not in ("T", "mT"):
        return call.axis
    rank = len(call.shape)
    return 2 * rank - 3 - call.axis if call.axis >= rank - 2 else call.axis


def _nodes(arguments: Any) -> list[fx.Node]:
    return [a for a in pytree.tree_leaves(arguments) if isinstance(a, fx.Node)]


def _tuple(value: Any) -> Sequence[Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _agreed(axes: Any) -> int | None:
    """Return the one value among those that are not None, or None if there is no such."""
    known = {a for a in axes if a is not None}
    return known.pop() if len(known) == 1 else None
