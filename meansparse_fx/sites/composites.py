"""Floor 2: activations that a model writes out of several calls, found by the function they compute.

`formulas` is the table; any dialect's graph is looked through by the same code. The operator stands before the whole,
so all calls of it that read its input read the operator. What is no row of the table, but does what only activations
do, is named in the plan. Imports `ops`, `plan`, `pointwise`, `shapes` and floor 1.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..activations import ActivationCall
from ..formulas import FEATURES, POINTS, WEIGHTS, formula_of, is_affine, is_even
from .ops import CALLS, Operators, below, name_of
from .plan import Refusal, in_several_steps
from .pointwise import CASTS, Pieces
from .shapes import Flow

_FARTHEST = 12  # ancestors that a piece is tried from
_UNKNOWN = "unknown"
_WEIGHT = "part of a {}, which makes a weight of its input and no feature"
_SHARED = "others read {} inside of it, so that no operator can stand before the activation alone"
_OVERWRITTEN = "{} overwrites its input between the calls that read it"

_FEATURE_MAKERS = {"conv", "linear", "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "add"}
_LAYERS = {"conv", "linear"}
_LINEAR = {"add", "sub", "mul", "div"}
_NOT_OF_NEGATIVES = {"sqrt", "sqrt_", "rsqrt", "rsqrt_", "log", "log_", "log2", "log10"}
_OF_MEANS = {"pow", "pow_", "__pow__", "square", "exp", "log", "sqrt"}  # pooled in between: a generalised mean
_QUANTISING = {"round", "floor", "ceil", "trunc", "fix", "frac", "fake_quantize_per_tensor_affine", "floordiv", "int"}


@dataclass(frozen=True, slots=True, eq=False)
class Composite:
    """An activation of several calls, or of one that is other things as well.

    Attributes:
        source: The tensor it is applied to.
        nodes: The calls, in order; the last one makes the result.
        readers: Those that read the source.
        call: What it is.
        path: The site's name, before repeats are counted.
        refusal: Why no operator can stand before it; None if one can.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    call: ActivationCall
    path: str
    refusal: Refusal | None

    @property
    def node(self) -> fx.Node:
        """The call that makes the result."""
        return self.nodes[-1]


class CompositeFinder:
    """Finds the composites of one graph, given its channel dimensions and the nodes that are part of a gate."""

    def __init__(
        self,
        graph: fx.Graph,
        operators: Operators,
        flow: Flow,
        data: set[fx.Node],
        axes: Mapping[fx.Node, int | None],
        gates: Container[fx.Node],
    ) -> None:
        self._graph, self._operators, self._flow = graph, operators, flow
        self._data, self._axes, self._gates = data, axes, gates
        self._pieces = Pieces(graph, operators, flow, data)
        self._composites = dict(operators.composites)
        self._weights: dict[fx.Node, Refusal] = {}
        self._taken = set(operators.composites)
        self._seen: set[fx.Node] = set()

    def find(self) -> Operators:
        """Return the graph's operators, with its composites among them."""
        for node in reversed(self._pieces.parents):
            self._match(node)
        for node in reversed(self._pieces.parents):
            self._report(node)
        return replace(self._operators, composites=self._composites, weights=self._weights)

    def _match(self, node: fx.Node) -> None:
        """Take the smallest piece that ends with ``node`` and is a function of the table."""
        if node in self._taken:
            return
        if self._copies(node):  # the activation ends before: others may read it there
            return
        alone = self._single(node)
        root = node
        for _ in range(_FARTHEST):
            if (parent := self._pieces.parents.get(root)) is None:
                return
            root = parent
            piece = self._pieces.between(root, node)
            if not self._taken.isdisjoint(piece):
                return
            if (alone and len(piece) == 1) or all(self._is_linear(n) for n in piece):
                continue
            values = self._pieces.values(root, piece)
            if values is None:
                return
            other = alone or self._is_scaled(piece) or self._must_not_be_negative(node)
            if not other and (name := formula_of(values, FEATURES)):
                return self._take(root, piece, ActivationCall(name, fused=False))
            if self._pieces.is_closed(piece) and (name := formula_of(values, WEIGHTS)):
                self._taken.update(piece)
                reason = _WEIGHT.format(name)
                self._weights.update({n: Refusal(reason, n.name, kind="gate") for n in piece if self._single(n)})
                return

    def _copies(self, node: fx.Node) -> bool:
        """Return whether a call gives the values it is given: a clone, a cast, dropout."""
        parent = self._pieces.parents.get(node)
        values = None if parent is None else self._pieces.values(parent, [node])
        return values is not None and torch.equal(values, POINTS)

    def _report(self, node: fx.Node) -> None:
        """Take the largest piece that ends with ``node`` and is in no table, if it looks like an activation."""
        if not self._is_free(node) or node in self._seen:
            return
        root = node
        while self._is_free(root):
            root = self._pieces.parents[root]
        piece = self._pieces.between(root, node)
        self._seen.update(piece)  # what is part of this is no piece of its own
        known = [n for n in piece if n in self._taken or self._single(n)]
        # relu(x) + x is a residual connection around a ReLU; x * tanh(exp(x)) is one function.
        sums = any(len(self._pieces.operands[n]) > 1 and self._is_linear(n, joins=True) for n in piece)
        if known and (sums or not self._composites.keys().isdisjoint(known) or not self._pieces.is_closed(piece)):
            return
        if all(self._is_linear(n) for n in piece) or not _QUANTISING.isdisjoint(map(name_of, piece)):
            return
        values = self._pieces.values(root, piece)
        if values is None or is_affine(values) or not self._between_layers(root, node, values):
            return
        call = ActivationCall(_UNKNOWN, fused=False)
        path = self._path(node, _UNKNOWN)
        module = self._operators.modules.get(path)
        target = "the function that computes it, under torch.fx.wrap" if module is None else type(module).__name__
        refusal = Refusal(
            f"{self._operators.word(node)} is computed from {self._operators.label(root)}, element by element, by a "
            "function that is in no table",
            node.name,
            f"if it is one, make it known by meansparse_fx.register_activation({target}, ...)",
            kind="not known as an activation",
        )
        self._add(Composite(root, tuple(piece), (), call, path, refusal))

    def _take(self, root: fx.Node, piece: Sequence[fx.Node], call: ActivationCall) -> None:
        # Names of one value; several where it was overwritten in between.
        sources = {given for n in piece for given in self._given(n, root)}
        # Also those that read what an earlier step of the piece wrote there: h.clamp_(min=0), then h.clamp_(max=6).
        readers = tuple(n for n in piece if not sources.isdisjoint(n.all_input_nodes))
        memory = self._memory(root)
        written = any(self._operators.writes(n) and self._memory(n) & memory for n in piece)
        source = min(sources, key=self._pieces.order.__getitem__)
        refusal = self._overwritten(source, piece, readers) or self._shared(piece)
        if len(sources) > 1 or (written and not memory & self._memory(piece[-1])):
            refusal = refusal or in_several_steps(piece[-1])
        path = self._path(piece[-1], call.name)
        self._add(Composite(source, tuple(piece), readers, replace(call, inplace=written), path, refusal))

    def _memory(self, node: fx.Node) -> frozenset[int]:
        return self._flow.memory.get(node, frozenset())

    def _overwritten(self, source: fx.Node, piece: Sequence[fx.Node], readers: Sequence[fx.Node]) -> Refusal | None:
        """Return who changes the source between its readers: they would all read what the operator made before."""
        order = self._pieces.order
        span = range(order[readers[0]], order[readers[-1]])
        for writer in self._pieces.overwrites.writers(source):
            if writer not in piece and order[writer] in span:
                reason = _OVERWRITTEN.format(self._operators.word(writer))
                return Refusal(reason, piece[-1].name, kind="in place")
        return None

    def _shared(self, piece: Sequence[fx.Node]) -> Refusal | None:
        """Return what others read of a piece besides its result, if they do."""
        if self._pieces.is_closed(piece):
            return None
        inside = set(piece)
        shared = next(n for n in piece if not inside.issuperset(self._pieces.readers[n]))
        return Refusal(_SHARED.format(self._operators.word(shared)), piece[-1].name, kind="shared")

    def _given(self, node: fx.Node, value: fx.Node) -> list[fx.Node]:
        """Return the inputs of a call that hold ``value``."""
        names = self._pieces.renamed.get(node, {})
        constants = self._pieces.constants
        return [n for n in node.all_input_nodes if names.get(n, n) is value and n not in constants]

    def _add(self, composite: Composite) -> None:
        self._taken.update(composite.nodes)
        self._composites.update(dict.fromkeys(composite.nodes, composite))

    def _single(self, node: fx.Node) -> bool:
        """Return whether a call is an activation by itself."""
        return self._operators.activation(node) is not None

    def _is_free(self, node: fx.Node) -> bool:
        return node in self._pieces.parents and node not in self._taken and not self._single(node)

    def _is_linear(self, node: fx.Node, joins: bool = False) -> bool:
        """Return whether a call is seen to be affine in what it reads: a sum, or a multiple of one tensor."""
        if self._single(node):
            return False
        word, operands = self._operators.op(node).word, self._pieces.operands[node]
        if word in ("add", "sub") or name_of(node) in CASTS:
            return True
        if joins or len(operands) > 1 or word not in _LINEAR:
            return False
        divisor = node.args[1] if word == "div" and len(node.args) > 1 else None
        inputs = self._tensors(node)
        return divisor not in inputs and sum(isinstance(a, fx.Node) and a in inputs for a in node.args) == 1

    def _is_scaled(self, piece: Sequence[fx.Node]) -> bool:
        """Return whether a piece is one call of an activation, and scaling."""
        others = [n for n in piece if not self._is_linear(n)]
        return len(others) == 1 and self._single(others[0]) and all(len(self._pieces.operands[n]) == 1 for n in piece)

    def _must_not_be_negative(self, node: fx.Node) -> bool:
        """Return whether all that reads a value needs it not to be negative: a distance, clamped against rounding."""
        readers = self._pieces.readers[node]
        return bool(readers) and all(name_of(reader) in _NOT_OF_NEGATIVES for reader in readers)

    def _path(self, node: fx.Node, word: str) -> str:
        """Return a composite's name: the path of the module that is nothing else, or a name in its module."""
        path = self._operators.enclosing(node)
        if path not in self._mixed_modules:
            return path
        return below(path, word)

    @functools.cached_property
    def _mixed_modules(self) -> set[str]:
        """Return the paths of the modules that make calls besides those of one element-wise function."""
        mixed = {""}
        for node in self._graph.nodes:
            if node.op not in CALLS or node in self._pieces.parents or node in self._pieces.constants:
                continue
            if node in self._data and not self._operators.op(node).passes:
                path = self._operators.enclosing(node)
                while path not in mixed:
                    mixed.add(path)
                    path = path.rpartition(".")[0]
        return mixed

    # What is an activation though no table has it.

    def _between_layers(self, root: fx.Node, node: fx.Node, values: Tensor) -> bool:
        """Return whether a piece stands where activations do: between layers, on features, and is no gate."""
        if node in self._gates or self._axes.get(root) is None or len(self._flow.shape(root)) < 2:
            return False
        maker = self._operators.maker(root)
        if not (self._single(maker) or maker in self._composites or self._operators.word(maker) in _FEATURE_MAKERS):
            return False
        mean = is_even(values) or not _OF_MEANS.isdisjoint(map(name_of, self._pieces.between(root, node)))
        return node in self._before_layers and self._is_feature(node, mean)

    def _is_feature(self, node: fx.Node, mean: bool) -> bool:
        """Return whether nobody takes a piece's result for a gate, attention's logits, or part of a norm or a mean."""
        waiting, seen = [node], {node}
        while waiting:
            value = waiting.pop()
            for reader in self._pieces.readers[value]:
                op = self._operators.op(reader)
                if op.word in ("matmul", "attention"):
                    return False
                if op.word in ("mul", "div") and len(self._tensors(reader)) > 1:
                    return False
                if op.pools and (mean or self._axes.get(reader) is None):
                    return False
                if self._operators.moves_only(reader) and reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
        return True

    def _tensors(self, node: fx.Node) -> set[fx.Node]:
        """Return what a call reads that depends on the images."""
        return {n for n in node.all_input_nodes if n in self._data and n not in self._pieces.constants}

    @functools.cached_property
    def _before_layers(self) -> set[fx.Node]:
        """Return the nodes whose values some later layer reads."""
        found: set[fx.Node] = set()
        for node in reversed(self._graph.nodes):
            if any(u in found or self._operators.op(u).word in _LAYERS for u in node.users):
                found.add(node)
        return found
