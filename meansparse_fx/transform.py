"""Floor 5: the verbs that make and unmake a transformed model. Each reads as its description."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from .batches import examples
from .capture import capture
from .errors import SiteError, StateError, StatisticsError
from .operators import added, added_if_any, operators, set_alpha, set_backward, set_statistics
from .passes import fuse as fuse_all
from .passes import held_parts, refuse_hooks, restore, sparsify
from .published import split_checkpoint
from .rewrite import PREFIX
from .settings import Settings, save
from .sites import Placement, SitePlan, find_sites, placement_of
from .statistics import Statistics

__all__ = ["inspect", "load", "load_published", "restore", "save", "transform"]

FUSIONS = ("activation", "all")
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back inference mode, whose tensors could never meet autograd, and the search for cyclic garbage.

    There is next to none, and looking for it takes a fifth of the time. One thread at a time, or what stands in for
    torch's functions while a model is traced stayed in their places.
    """
    with _ONE_AT_A_TIME:
        before = gc.isenabled()
        gc.disable()
        try:
            with torch.inference_mode(False):
                yield
        finally:
            if before:
                gc.enable()


@_undisturbed()
def inspect(model: nn.Module, images: Tensor | None = None, placement: Placement | str | None = None) -> SitePlan:
    """Return every candidate site of a model: whether it would be rewritten, and why not.

    Args:
        model: In eval mode; not changed. Of a transformed model the plan it was made by is returned.
        images: ``[N, ...]``, a few example inputs; values do not matter, shape and device do.
        placement: Which sites to take, or the name of one of `PLACEMENTS`; by default every activation.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> [(s.name, s.activation.name, s.channels) for s in msfx.inspect(net, torch.rand(2, 1, 8, 8))]
        [('1', 'gelu', 4)]
    """
    if (own := added_if_any(model)) is not None:
        return own.plan
    images = examples(images, model)
    captured = capture(model, images)
    return find_sites(captured.graph_module, captured.route, images, placement_of(placement))


@_undisturbed()
def transform(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    placement: Placement | str | None = None,
    statistics: Statistics | str | Path | None = None,
    alpha: float | None = None,
    backward: str | None = None,
    fuse: str = "activation",
    settings: str | Path | None = None,
) -> fx.GraphModule:
    """Return a copy of ``model`` with a MeanSparse operator at every site (paper, section 3.3).

    The copy's state_dict has the model's keys, and the operators' under ``meansparse.``. At alpha = 0 it
    computes what the model computes. Operators that a published checkpoint brings along become ours, with their
    statistics, alpha and strict comparison; nothing else is inserted, and the copy computes what the model computes.
    Hooks run as on the model, also while it is captured. The graph is traced in eval mode, and ``.train()`` says what
    stays so. Plain attributes that forward read are constants of it, and a call refuses others.

    Args:
        model: A trained network in eval mode; not changed.
        images: ``[N, ...]``, a few example inputs on the model's device.
        placement: Which sites to take, or the name of one of `PLACEMENTS`; by default every activation.
        statistics: Of an earlier `calibrate`, or the path of their file; without them calibrate the result.
        alpha: Half width of the band in standard deviations; needs statistics unless 0. By default 0, or the published
            operators' own.
        backward: ``exact``, which is the default, ``identity`` or ``smooth``; see `set_backward`.
        fuse: ``activation`` makes one call of operator and activation, at alpha = 0 equal to the model's to rounding
            (under MEANSPARSE_FX_LOWERING=eager bit for bit). ``all`` is faster: frozen batch norms, LayerScales and
            the residual sum before an operator and the sum after it become part of it, equal to rounding. Norms and
            LayerScales then get no gradients, so those whose parameters want some are left:
            model.requires_grad_(False) first.
        settings: File that `save` wrote: it brings placement, statistics, alpha and all the rest. ``alpha`` and
            ``backward`` still count where given.

    Raises:
        StateError: The model is in train mode or already transformed, alpha lacks statistics, no such fusion, or the
            settings are another model's.
        ArtifactError: A file is truncated or of another kind.
        CaptureError: The model cannot be captured as a graph.
        SiteError: No site found, or one that cannot be rewritten safely.
        StatisticsError: The statistics do not fit.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> images = torch.rand(8, 1, 8, 8)
        >>> sparse = msfx.transform(net, images)
        >>> stats = msfx.calibrate(sparse, [images], progress=False)
        >>> msfx.set_alpha(sparse, 0.2)
        >>> bool((sparse(images) == net(images)).all())
        False
    """
    if fuse not in FUSIONS:
        raise StateError(f"fuse must be one of {', '.join(FUSIONS)}, got {fuse!r}")
    images = examples(images, model)
    kept = None
    if settings is not None:
        if (placement, statistics) != (None, None):
            raise StateError("settings bring placement and statistics along: leave out placement= and statistics=")
        kept = Settings.load(settings)
        placement, fuse = kept.placement, kept.fuse
    captured = capture(model, images)
    placement = placement_of(placement)
    plan = find_sites(captured.graph_module, captured.route, images, placement)
    if not plan.active:
        reasons = "; ".join(f"{s.name}: {s.skipped}" for s in list(plan)[:3])
        raise SiteError(f"none of the {len(plan)} candidate sites can be rewritten ({reasons}); see inspect()")
    sparse = captured.graph_module
    sparsify(sparse, plan)
    if fuse == "all":
        assert images is not None  # find_sites has need of them, too
        plan = plan.with_fusion(fuse_all(sparse, images))
    own = added(sparse)
    refuse_hooks(sparse)
    own.held = held_parts(sparse, captured.attributes_read)
    own.operators = list(operators(sparse).values())
    own.plan = sparse.meta["plan"] = plan.without_nodes()
    own.placement, own.fuse, own.frozen = placement, fuse, captured.frozen
    own.shape = tuple(images.shape[1:]) if images is not None and images.is_floating_point() else None
    own.watch(sparse, captured.values_read)
    if kept is not None:
        kept.put_into(sparse)
    own.placement = replace(placement, predicate=None)
    if backward is not None:
        set_backward(sparse, backward)
    if statistics is not None:
        set_statistics(sparse, statistics)
    if alpha is not None:
        set_alpha(sparse, alpha)
    return sparse


def load(path: str | Path, model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the transformed model that `save` wrote, equal to it bit for bit in values and gradients.

    Args:
        path: The file.
        model: The network that was transformed, with its weights, in eval mode; not changed.
        images: ``[N, ...]``, a few example inputs on the model's device.

    Raises:
        StateError: It is another model; the first differing site is named.
        ArtifactError: The file is truncated or of another kind.

    Example:
        >>> import tempfile, torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> images = torch.rand(8, 1, 8, 8)
        >>> sparse = msfx.transform(net, images)
        >>> stats = msfx.calibrate(sparse, [images], progress=False)
        >>> msfx.set_alpha(sparse, 0.2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     msfx.save(sparse, f"{folder}/net.msfx.safetensors")
        ...     again = msfx.load(f"{folder}/net.msfx.safetensors", net, images)
        >>> msfx.get_alpha(again), bool((again(images) == sparse(images)).all())
        (0.2, True)
    """
    return transform(model, images, settings=path)


def load_published(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a published MeanSparse checkpoint into a transformed base model: weights, statistics and alpha.

    Args:
        model: The base architecture, transformed with the checkpoint's placement (``robustbench:wrn`` and the like).
        state_dict: Of RobustBench's ``Meansparse_*`` architecture.

    Raises:
        StatisticsError: Its operators are not the model's sites, or its weights not the model's; nothing was changed.
    """
    weights, published = split_checkpoint(state_dict)
    found = operators(model)
    if differing := sorted(published.keys() ^ found.keys()):
        raise StatisticsError(
            f"the checkpoint has operators at {len(published)} sites and the model at {len(found)}; {differing[0]} "
            "is in one of them only: transform the base with the checkpoint's placement"
        )
    shapes = {key: value.shape for key, value in weights.items()}
    expected = {key: value.shape for key, value in model.state_dict().items() if key.split(".")[0] != PREFIX}
    if shapes != expected:
        differing = sorted(key for key in shapes.keys() | expected if shapes.get(key) != expected.get(key))
        raise StatisticsError(
            f"the checkpoint's weights are not this model's: {len(differing)} differ, {differing[0]} first"
        )
    for name, operator in found.items():
        if len(published[name].mean) != operator.channels:
            raise StatisticsError(
                f"{name}: the checkpoint has {len(published[name].mean)} channels, the model {operator.channels}"
            )
    model.load_state_dict(weights, strict=False)
    for name, operator in found.items():
        operator.take_over(published[name])
    if (own := added_if_any(model)) is not None:
        own.statistics, own.reloaded = None, False  # they were of other weights
