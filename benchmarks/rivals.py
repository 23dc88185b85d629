"""The operator as others write it, for benchmarks to stand beside ours."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from meansparse_fx.cost.forms import branch_free, published
from meansparse_fx.kernels.reference import ACTIVATIONS
from meansparse_fx.nn import MeanSparse


class PublishedForm(nn.Module):
    """The operator as published checkpoints have it: a Python branch on a tensor, std from the variance each time."""

    def __init__(self, centre: Tensor, std: Tensor, alpha: float, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.register_buffer("running_mean", centre.clone())
        self.register_buffer("running_var", std.square())
        # Published: `<`. The next float, of the type they compute in, makes that the others' closed interval.
        above = torch.nextafter(std.new_tensor(alpha), std.new_tensor(1.0))
        self.register_buffer("threshold", above.to(centre.device))

    def forward(self, x: Tensor) -> Tensor:
        return published(x, self.running_mean, self.running_var, self.threshold, self.channel_dim)


class BranchFreeForm(nn.Module):
    """The same without the branch, its band computed once: what a careful reader of the paper would write."""

    def __init__(self, centre: Tensor, std: Tensor, alpha: float, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.register_buffer("centre", centre.clone())
        self.register_buffer("band", alpha * std)

    def forward(self, x: Tensor) -> Tensor:
        return branch_free(x, self.centre, self.band, self.channel_dim)


class Activated(nn.Module):
    """A form of the operator, then the site's activation, in place where the model has it in place."""

    def __init__(self, form: nn.Module, operator: MeanSparse) -> None:
        super().__init__()
        self.form = form
        call = operator.activation
        row = ACTIVATIONS[call.name if call else "identity"]
        self.act = row.overwrite if call and call.inplace and row.overwrite else row.forward
        self.constants = call.constants if call else ()

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.act(self.form(x), weight, *self.constants)


def with_form(sparse: fx.GraphModule, form: type[PublishedForm] | type[BranchFreeForm]) -> nn.Module:
    """Return a copy of a transformed model that has ``form`` and a plain activation at each site instead.

    The form's buffers take the model's dtype, as ``model.bfloat16()`` makes them.
    """
    rival = copy.deepcopy(sparse)
    dtype = next((p.dtype for p in sparse.parameters() if p.is_floating_point()), None)
    for path, operator in list(rival.named_modules()):
        if isinstance(operator, MeanSparse):
            inner = form(operator.mean, operator.std, float(operator.alpha), operator.channel_dim)
            parent, _, name = path.rpartition(".")
            setattr(rival.get_submodule(parent), name, Activated(inner.to(dtype=dtype), operator))
    return rival
