"""Floor 3: the operator, the module that the passes put into graphs.

Knows one site; nothing of graphs. What it holds, and how that is changed, is in `operator_state`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .activations import ActivationCall
from .errors import StateError, check_dims
from .frozen import WANT_GRADIENTS, Norms, Prologue
from .kernels.lowering import is_followed
from .kernels.operator import Operator
from .kernels.records import Options, Vectors
from .operator_state import OperatorState
from .rewrite import RecordedCall

_NO_NORMS = Prologue().norms("")


class MeanSparse(OperatorState):
    """The operator at one site, with the site's activation fused after it (paper, section 3.2).

    Values within ``alpha * std`` of the channel's centre become the centre, then the activation is applied.
    At alpha = 0 it is the activation alone.

    Args:
        name: The site's name, for messages.
        channels: Number of channels C.
        channel_dim: Dimension of the input that holds them, not negative.
        activation: The activation to fuse; None for the bare operator.
        dims: How many dimensions the input has; any number if None.

    Attributes:
        replaces: The call this operator took the place of, activation included; None for a bare operator.
        prologue: What a fused call takes in besides its tensors; see `passes.fuse`.
    """

    _bound: dict[tuple, tuple[Operator, Tensor | None]]  # by what their vectors are

    def __init__(
        self, name: str, channels: int, channel_dim: int, activation: ActivationCall | None = None,
        dims: int | None = None,
    ):  # fmt: skip
        super().__init__(name, channels)
        self.channel_dim, self.dims = channel_dim, dims
        self.activation = activation
        self.replaces: RecordedCall | None = None
        self.prologue = Prologue()

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        fused: bool = False,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return act(s(u)) + shortcut, and v if the prologue wants it; u = sum_norm(v).

        Args:
            x: ``[..., C, ...]``.
            weight: The activation's learned slope, if it has one.
            fused: Take in what stands around the operator: v = input_norm(x) * layer_scale + residual. Otherwise v and
                u are x, and there is nothing else.
            residual, shortcut: Of x's shape.
            layer_scale: C numbers, whatever their shape.
        """
        if isinstance(x, fx.Proxy):  # to whoever traces a transformed model the operator is one call
            given = x, weight, fused, residual, layer_scale, shortcut
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), given, {})
        check_dims(self.name, x, self.dims)
        return self._operator(weight, fused, layer_scale)(x, residual, shortcut)

    def _operator(self, weight: Tensor | None, fused: bool, layer_scale: Tensor | None) -> Operator:
        """Return the operator with all of its vectors and options, made again only where one is another."""
        centre: Any = self._buffers["centre"]  # faster than attributes, which torch looks up by hand
        threshold: Any = self._buffers["threshold"]
        norms = _NO_NORMS
        if fused:
            norms = self.prologue.norms(self.name)
            if layer_scale is not None and layer_scale.requires_grad and torch.is_grad_enabled():
                raise StateError(f"{self.name}: the numbers of the LayerScale fused into it {WANT_GRADIENTS}")
        if torch.compiler.is_compiling():
            if not torch.compiler._is_exporting_flag:  # compiled programs see whoever writes to what these follow from
                centre, threshold = self._derived()
            return self._bind(Vectors(centre, threshold, weight), norms, layer_scale, fused, "composition")
        if fused and is_followed():  # vectors are others at each call, and may have no memory
            return self._bind(Vectors(centre, threshold, weight), norms, layer_scale, fused)
        key: tuple = id(centre), id(threshold), id(weight)
        if fused:
            # ``norm.half()`` puts others into the same tensors.
            kinds = [t if t is None else (id(t), t.dtype, t.stride()) for t in norms.input + norms.sum]
            place = 0 if layer_scale is None else layer_scale.data_ptr()
            key = (*key, *kinds, norms.input_eps, norms.sum_eps, id(layer_scale), place)
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) > 16:  # of tensors that are gone
                self._bound.clear()
            operator = self._bind(Vectors(centre, threshold, weight), norms, layer_scale, fused)
            # A tensor that is gone would leave its id to another: this one is kept here, the others in the operator.
            found = self._bound[key] = operator, layer_scale
        return found[0]

    def _bind(
        self, band: Vectors, norms: Norms, layer_scale: Tensor | None, fused: bool, choice: str | None = None
    ) -> Operator:
        """Return the operator of these vectors and the present options; ``choice`` is of the lowering."""
        flat = None if layer_scale is None else layer_scale.detach().flatten()
        vectors = Vectors(*band[:3], *norms.input, flat, *norms.sum)
        name, constants = (self.activation.name, self.activation.constants) if self.activation else ("identity", ())
        backward: str = self.backward
        steepness: Any = self.backward_steepness
        if choice == "composition" and not torch.compiler._is_exporting_flag:
            # Programs without a gradient are one, whatever the backward, and those of the smooth one are one, too.
            backward, steepness = (backward, self.gate_steepness) if torch.is_grad_enabled() else ("exact", 10.0)
        options = Options(
            self.channel_dim, name, tuple(map(float, constants)), self.variant, backward, float(self.steepness),
            steepness, fused and self.prologue.want_sum, norms.input_eps, norms.sum_eps,
        )  # fmt: skip
        return Operator(vectors, options, choice)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_bound"] = {}  # operators bound before have the former options

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}}

    def __prepare_scriptable__(self) -> MeanSparse:
        raise StateError(
            "torch.jit.script cannot compile an operator: use torch.jit.trace(model, images), or meansparse_fx.export"
        )

    @property
    def replaced(self) -> str | None:
        """Path of the module that was called in this operator's place, if one was."""
        return self.replaces.target if self.replaces is not None and self.replaces.op == "call_module" else None

    def extra_repr(self) -> str:
        fused = self.activation.name if self.activation else "identity"
        return (
            f"{self.channels} channels @ dim {self.channel_dim}, activation={fused}, "
            f"variant={self.variant}, centre={self.centre_mode}, backward={self.backward}"
        )
