"""Floor 5: the verb `cost`, and its result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from ..batches import cycled, examples
from ..copies import copied
from ..frozen import fused_parts
from ..kernels.records import Options, Vectors
from ..nn import MeanSparse
from ..rewrite import calls_of
from ..sites import Placement
from ..tables import Tabled, new_table
from ..transform import inspect as run_inspect
from ..transform import transform
from .forms import FORMS, Form, Region
from .tally import Tally, kept_bytes


@dataclass(frozen=True, slots=True)
class Moves:
    """Calls of operators and the bytes they move; sums with ``+``."""

    calls: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    def __add__(self, other: Moves) -> Moves:
        return Moves(self.calls + other.calls, self.read + other.read, self.written + other.written)


@dataclass(frozen=True, slots=True)
class FormCost:
    """One form of the operator; sums with ``+``.

    Attributes:
        forward, backward: What each direction moves; backward is that of the images' gradient.
        kept: Bytes kept for backward.
    """

    forward: Moves = Moves()
    backward: Moves = Moves()
    kept: int = 0

    @property
    def both(self) -> Moves:
        """Both directions together."""
        return self.forward + self.backward

    def __add__(self, other: FormCost) -> FormCost:
        return FormCost(self.forward + other.forward, self.backward + other.backward, self.kept + other.kept)


@dataclass(frozen=True, slots=True)
class SiteCost:
    """One site.

    Attributes:
        before: What the fused form takes in besides the activation, as the plan says it; empty if nothing.
        forms: By form, in the order of `FORMS`.
    """

    name: str
    before: str
    forms: dict[str, FormCost]


@dataclass(frozen=True, slots=True, repr=False)
class Cost(Tabled):
    """What a model's sites must move; iterable over `SiteCost`, and printing it gives the table.

    Attributes:
        sites: In graph order.
        images: How many the bytes are of.
        dtype: Of the tensors.
    """

    sites: tuple[SiteCost, ...]
    images: int
    dtype: torch.dtype

    def __iter__(self) -> Iterator[SiteCost]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def total(self) -> dict[str, FormCost]:
        """The sum over all sites, by form."""
        return {form: reduce(FormCost.__add__, (site.forms[form] for site in self.sites)) for form in FORMS}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and words, for JSON."""
        sites = [asdict(site) for site in self.sites]
        total = {form: asdict(found) for form, found in self.total.items()}
        return {"images": self.images, "dtype": _word(self.dtype), "sites": sites, "total": total}

    def table(self) -> Table:
        """Return a rich table: MiB moved in both directions and the calls that move them, a row a site; then sums."""
        caption = f"MiB read and written in forward and backward (calls); {self.images} images, {_word(self.dtype)}"
        forms = (re.sub("(?<=[-,]) ?", "\n", form) for form in FORMS)
        table = new_table("site", "before it", *forms, left=("before it",), caption=caption)
        for site in self.sites:
            table.add_row(site.name, site.before, *(_cell(found.both) for found in site.forms.values()))
        table.add_section()
        total = self.total
        for words, moves in (("forward", "forward"), ("backward", "backward"), ("both", "both")):
            table.add_row("all sites", words, *(_cell(getattr(found, moves)) for found in total.values()))
        table.add_row("", "kept for backward", *(f"{found.kept / 2**20:.2f}" for found in total.values()))
        base = total["base"].both.bytes
        if base:
            table.add_row("", "moved, over base", *(f"{found.both.bytes / base:.2f}" for found in total.values()))
        return table


def _cell(moves: Moves) -> str:
    return f"{moves.bytes / 2**20:.2f} ({moves.calls})"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cost(model: nn.Module, images: Tensor, placement: Placement | str | None = None) -> Cost:
    """Return the bytes that each form of the operator must move at each site, and the calls that move them.

    Nothing is timed. At each site five forms are laid side by side: the base's own calls, the published operator, the
    same without its branch, ours (``fuse="activation"``), and ours fused (``fuse="all"``). All of them are the same
    stretch of the graph: the frozen norm, LayerScale, residual sums and the norm of a sum, where the fused form takes
    them in, and the activation. They are counted by these rules, and so depend on shapes alone:

    - Every call of an operator reads each of its inputs once and writes each of its results once. Views and
      allocations are no calls.
    - Only tensors of the site's size count. Numbers, and vectors of one value a channel, are left out.
    - Backward is that of the images' gradient: parameters want none. A frozen norm's backward does not read its input.
      Where others read the sum, too, adding up its two gradients is part of the stretch.
    - An activation that the operator cannot take in is the same in every form and is left out.
    - Kept for backward is what the stretch keeps, each tensor once, and its result, which the next layer keeps as its
      input. Two sites that keep the same tensor both count it: a residual is often another site's result.
    - Ours is one call, as the Triton kernels are, and the loops compiled for large CPU tensors. Small CPU tensors take
      several.

    A cache makes real traffic less, and never more, than these counts where tensors are small.

    Args:
        model: In eval mode, not transformed; not changed.
        images: ``[N, ...]``, example inputs; the bytes are those of N images, two at least.
        placement: Which sites to take, as for `transform`.

    Raises:
        StateError, CaptureError, SiteError: As `transform` does.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> found = msfx.cost(net, torch.rand(2, 1, 10, 10))  # the site has 2 * 4 * 8 * 8 values of 4 bytes
        >>> [(form, c.forward.calls, c.forward.bytes // 2048) for form, c in found.total.items()]
        [('base', 2, 4), ('published', 10, 11), ('branch-free', 6, 11), ('ours', 2, 4), ('ours, fused', 1, 2)]
    """
    frozen = copied(model).requires_grad_(False)
    images = examples(images, model)
    images = cycled(images, max(2, len(images)))
    sparse = transform(frozen, images, placement=placement, fuse="all")
    shapes = {site.name: site.shape for site in run_inspect(sparse)}
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, images.dtype)
    sites = []
    for node, operator in calls_of(sparse, MeanSparse):
        region = _region(node, operator, shapes[operator.name], dtype)
        v = region.vectors
        before = fused_parts(
            v.has_input_norm, v.layer_scale is not None, region.residual, v.has_sum_norm,
            region.shortcut, region.options.want_sum,
        )  # fmt: skip
        sites.append(SiteCost(operator.name, before, {name: _counted(form, region) for name, form in FORMS.items()}))
    return Cost(tuple(sites), len(images), dtype)


def _region(node: fx.Node, operator: MeanSparse, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
    prologue, activation = operator.prologue, operator.activation
    vector = torch.empty(shape[operator.channel_dim], device="meta")

    def if_there(part: object) -> Tensor | None:
        return vector if part else None

    weight = if_there(activation and activation.weight is not None)
    input_norm, sum_norm = if_there(prologue.input_norm), if_there(prologue.sum_norm)
    layer_scale = if_there("layer_scale" in node.kwargs)
    vectors = Vectors(vector, vector, weight, *[input_norm] * 4, layer_scale, *[sum_norm] * 4)
    name, constants = (activation.name, activation.constants) if activation else ("identity", ())
    options = Options(operator.channel_dim, name, constants, want_sum=prologue.want_sum)
    residual, shortcut = "residual" in node.kwargs, "shortcut" in node.kwargs
    return Region(shape, dtype, vectors, options, residual, shortcut, activation is not None and activation.inplace)


def _counted(form: Form, region: Region) -> FormCost:
    """Return the cost of one form, by running it on tensors without data."""
    values = torch.Size(region.shape).numel()
    inputs = region.inputs()
    with Tally(values) as forward:
        results = form(region, inputs)
    gradients = [torch.empty_like(result) for result in results]
    with Tally(values) as backward:
        torch.autograd.grad(results, inputs, gradients)
    # The square stands for the layer that reads y: like a convolution, it keeps its input.
    kept = kept_bytes(lambda: form(region, inputs)[0].square(), smallest=values)
    there, back = (Moves(t.calls, t.read, t.written) for t in (forward, backward))
    return FormCost(there, back, kept)
