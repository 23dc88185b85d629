"""Floor 4: what stands around an operator in a graph and can be taken into it, or why it cannot. Changes no graph.

By data flow: frozen batch norms, LayerScales (a multiplication by one frozen number per channel), residual sums.
"""

from __future__ import annotations

import operator as python
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..capture.modes import MODE_CALLS
from ..frozen import FrozenNorm, fused_parts
from ..hooks import enter, has_hooks, has_own_forward, leave
from ..nn import MeanSparse
from ..rewrite import operand
from ..sites.aliases import Overwrites
from ..sites.axis import carried
from ..sites.ops import Operators
from ..sites.plan import Refusal
from ..sites.shapes import Flow

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SUMS = (python.add, python.iadd, torch.add, "add", "add_", "__iadd__")

_FREEZE = "model.requires_grad_(False)"


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm in the graph."""

    node: fx.Node
    frozen: FrozenNorm


@dataclass(frozen=True, slots=True)
class Scale:
    """A LayerScale in the graph: ``node`` multiplies ``x`` by ``parameter``, which ``views`` shape for it.

    Attributes:
        direct: The operator, or the sum before it, reads the product itself; otherwise calls stand between that only
            move values, and that multiplying commutes with.
    """

    node: fx.Node
    x: fx.Node
    parameter: fx.Node
    views: tuple[fx.Node, ...]
    direct: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """A value that an operator reads or a sum adds: ``x`` after its own norm and LayerScale, where it has them."""

    x: fx.Node
    input_norm: Norm | None
    scale: Scale | None


@dataclass(frozen=True, slots=True)
class Sum:
    """A residual sum: ``node`` adds ``branch`` and ``residual``."""

    node: fx.Node
    branch: Branch
    residual: fx.Node


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around one operator and can be taken into it.

    Attributes:
        branch: What the operator computes from: directly, or as an operand of the sum before it.
        total: The sum before it.
        sum_norm: A norm of that sum.
        want_sum: Others read the sum before it, too.
        epilogue: The sum after it.
        shortcut: What that one adds.
        refusals: Of what stands there, too, and is left.
    """

    branch: Branch
    total: Sum | None
    sum_norm: Norm | None
    want_sum: bool
    epilogue: fx.Node | None
    shortcut: fx.Node | None
    refusals: tuple[Refusal, ...]

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return any((self.branch.input_norm, self.branch.scale, self.total, self.epilogue))

    def __str__(self) -> str:
        """Say what is taken in, and why something is not."""
        branch = self.branch
        taken = fused_parts(branch.input_norm, branch.scale, self.total, self.sum_norm, self.epilogue, self.want_sum)
        words = dict.fromkeys((taken, *map(str, self.refusals)))
        return "; ".join(filter(None, words)) or "nothing beside it to take in"


class _Refusals(list[Refusal]):
    def keep(self, found: Any) -> Any:
        """Return what was found, or None where that is a refusal, which is noted."""
        if not isinstance(found, Refusal):
            return found
        self.append(found)
        return None


class Finder:
    """Recognises norms, LayerScales and sums, and refuses those that cannot be moved."""

    def __init__(self, graph_module: fx.GraphModule, flow: Flow) -> None:
        self._graph_module = graph_module
        self._operators = Operators.of(graph_module)
        self._flow = flow
        self._overwrites = Overwrites(graph_module.graph, self._operators, flow)
        nodes = graph_module.graph.nodes
        # How often a mode was set before each call.
        self._modes = dict(zip(nodes, accumulate(n.target in MODE_CALLS for n in nodes), strict=True))
        self._changed, self._read_again = self._overwrites.changed, self._overwrites.read_again

    def around(self, node: fx.Node, operator: MeanSparse) -> Surroundings:
        """Return what stands around the operator that ``node`` calls."""
        source, refusals = operand(node), _Refusals()
        sum_norm = refusals.keep(self._norm(source, operator))
        total = self._sum(operand(sum_norm.node) if sum_norm else source, operator, refusals)
        sum_norm = sum_norm if total else None
        branch = total.branch if total else self._branch(source, operator, refusals)
        reader = sum_norm.node if sum_norm else node
        want_sum = total is not None and any(user is not reader for user in total.node.users)
        epilogue = refusals.keep(self._epilogue(node, branch, want_sum))
        end, shortcut = epilogue or (None, None)
        moved = [part.node for part in (branch.input_norm, branch.scale, total, sum_norm) if part]
        if any(self._modes[n] != self._modes[node] for n in (*moved, end or node)):
            other_mode = Refusal("gradients are turned on or off between it and what stands around it", node.name)
            return Surroundings(Branch(source, None, None), None, None, False, None, None, (other_mode,))
        return Surroundings(branch, total, sum_norm, want_sum, end, shortcut, tuple(refusals))

    def _branch(self, value: fx.Node, operator: MeanSparse, refusals: _Refusals) -> Branch:
        """Return where a value comes from."""
        scale = refusals.keep(self._scale(value, operator))
        if scale is not None and not scale.direct:
            return Branch(value, None, scale)
        x = value if scale is None else scale.x
        norm = refusals.keep(self._norm(x, operator))
        return Branch(operand(norm.node) if norm else x, norm, scale)

    def _norm(self, node: fx.Node, operator: MeanSparse) -> Norm | Refusal | None:
        """Return the frozen norm that ``node`` calls for a single reader; why it cannot be taken; or None."""
        if self._is_hooked(node):
            return Refusal("a module beside it has hooks", node.name)
        found = self._module_norm(node) or self._function_norm(node)
        if found is None or operator.channel_dim != 1 or len(node.users) != 1:
            return None
        module = found.module
        if module.running_mean is None:
            return Refusal("the norm has no running statistics", node.name)
        if any(p is not None and p.requires_grad for p in (module.weight, module.bias)):
            return Refusal("the norm's parameters want gradients", node.name, _FREEZE)
        return None if self._changed(operand(node)) else Norm(node, found)

    def _scale(self, value: fx.Node, operator: MeanSparse) -> Scale | Refusal | None:
        """Return the LayerScale that ``value`` comes from; why it cannot be taken; or None."""
        node, path = value, list[fx.Node]()
        while (moved := self._moved(node)) is not None:
            path.append(node)
            node = moved
        if self._operators.op(node).word != "mul" or node.kwargs or len(node.args) != 2:
            return None
        for x, factor in (node.args, node.args[::-1]):
            parameter, views = self._parameter(factor)
            if parameter is not None and isinstance(x, fx.Node) and self._flow.shape(x) == self._flow.shape(node):
                break
        else:
            return None
        if any(len(n.users) != 1 for n in (node, *path)):
            return Refusal("others read the LayerScale's result, too", node.name)
        held = self._operators.tensor(parameter)
        if held is not None and held.requires_grad:
            return Refusal("the LayerScale's parameter wants gradients", node.name, _FREEZE)
        around = (node, *path, parameter, *views)
        if self._changed(x, node) or any(map(self._changed, around)) or self._read_again(node):
            return Refusal("a value around the LayerScale is overwritten", node.name)
        shape = self._flow.shape(views[0] if views else parameter)
        dims = [d - len(shape) for d, size in enumerate(shape) if size > 1]
        axis = dims[0] + len(self._flow.shape(node)) if len(dims) == 1 else None
        for moved in reversed(path):
            axis = carried(moved, self._operators, self._flow, {operand(moved): axis})
        if axis != operator.channel_dim:
            return Refusal("what it is multiplied by is not one number for each of its channels", node.name)
        return Scale(node, x, parameter, views, not path)

    def _moved(self, node: fx.Node) -> fx.Node | None:
        """Return what a call moves, if that is all it does and it takes it without a keyword."""
        source = node.args[0] if node.args else None
        return source if isinstance(source, fx.Node) and self._operators.moves_only(node) else None

    def _parameter(self, node: Any) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
        """Return the node that reads the parameter which ``node`` is, if it is one, and what shapes it.

        The operator gets the parameter without what shapes it, which is the same where all lies along one dimension.
        """
        views = []
        while isinstance(node, fx.Node) and (moved := self._moved(node)) is not None:
            views.append(node)
            node = moved
        found = isinstance(node, fx.Node) and node.op == "get_attr" and self._flow.is_tensor(node)
        if not found or sum(size > 1 for size in self._flow.shape(node)) > 1:
            return None, ()
        return node, tuple(views)

    def _sum(self, node: fx.Node, operator: MeanSparse, refusals: _Refusals) -> Sum | None:
        """Return the residual sum that ``node`` is, if it can be taken."""
        operands = self._operands(node)
        if operands is None or self._read_again(node) or any(self._changed(n, node) for n in (node, *operands)):
            return None
        for x, residual in (operands, operands[::-1]):
            branch = self._branch(x, operator, refusals)
            if branch.input_norm or branch.scale:
                return Sum(node, branch, residual)
        return Sum(node, Branch(operands[0], None, None), operands[1])

    def _epilogue(self, node: fx.Node, branch: Branch, want_sum: bool) -> tuple[fx.Node, fx.Node] | Refusal | None:
        """Return the sum of the operator's result and of another value, and that; why it cannot be taken; or None."""
        total = next(iter(node.users), None)
        if total is None:
            return None
        if self._is_hooked(total):
            return Refusal("a module beside it has hooks", total.name)
        if len(node.users) != 1 or total.target not in _SUMS:
            return None
        operands = self._operands(total)
        if operands is None:
            unlike = Refusal("the sum after it is not of two tensors of its shape", total.name)
            return unlike if len(total.all_input_nodes) == 2 else None
        shortcut = operands[1] if operands[0] is node else operands[0]
        if want_sum:  # which is needed before the shortcut may be there
            return Refusal("others read the sum before it, so the one after it stays", total.name)
        # The call moves to where the sum is.
        product = branch.scale.node if branch.scale else None
        if self._changed(branch.x, product) or self._changed(shortcut, total) or self._read_again(total):
            return Refusal("what the sum after it reads is overwritten", total.name)
        return total, shortcut

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the two values of one shape that ``node`` adds, if that is what it does."""
        if node.target not in _SUMS or node.kwargs or len(node.args) != 2:
            return None
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        return (first, second) if len({self._flow.shape(n) for n in (node, first, second)}) == 1 else None

    def _is_hooked(self, node: fx.Node) -> bool:
        """Return whether a node calls hooks: an activation's or a norm's, or those that stand in the graph."""
        module = self._operators.module(node)
        if module is None:
            return node.target in (enter, leave)
        return has_hooks(module) and (type(module) in _NORMS or self._operators.activation(node) is not None)

    def record(self, new: fx.Node, old: fx.Node) -> None:
        """Note that a new node yields what an old one did."""
        self._flow.values[new] = self._flow.values[old]
        self._modes[new] = self._modes[old]
        self._overwrites.record(new, old)

    # The two forms of a batch norm.

    def _module_norm(self, node: fx.Node) -> FrozenNorm | None:
        module = self._operators.module(node)
        if not isinstance(module, _NORMS) or type(module) not in _NORMS or len(node.args) != 1:
            return None
        return None if module.training or has_own_forward(module) else FrozenNorm(module)

    def _function_norm(self, node: fx.Node) -> FrozenNorm | None:
        """Of F.batch_norm with all that it reads from one module, as classes that extend torch's norms call it."""
        if node.target is not F.batch_norm:
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        state = [given.get(name) for name in names[1:5]]
        if given.get("training", False) is not False:
            return None
        paths = [str(n.target).rpartition(".") for n in state if isinstance(n, fx.Node) and n.op == "get_attr"]
        owners = {owner for owner, _, _ in paths}
        if len(owners) != 1 or tuple(name for _, _, name in paths) != names[1:5]:
            return None
        return FrozenNorm(self._graph_module.get_submodule(owners.pop()), given.get("eps", 1e-5))
