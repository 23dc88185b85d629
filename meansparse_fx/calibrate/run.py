"""Floor 5: the verb. One pass of the instrumented graph over the data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx

from ..arguments import autocast_dtype, number
from ..batches import explaining_misfit
from ..capture.modes import GRAD_MODE_CALLS
from ..errors import CalibrationError, DataError, WriteError
from ..kernels import ops
from ..operators import added, answers, operators, require_transformed, set_statistics
from ..passes import observe
from ..progress import bar, say_resumed
from ..seen import least_marks
from ..shards import Ranks
from ..statistics import ChannelHistogram, Statistics, fingerprint, graph_fingerprint
from .checkpoint import Checkpoint, PassState
from .convergence import MIN_GROUPS, Precision, precision
from .source import Source
from .totals import Totals, gather_totals, merge_all

LOOK_SECONDS = 10.0  # between two looks for NaN, each of which waits for a GPU


def calibrate(
    sparse: fx.GraphModule,
    loader: Iterable[Any],
    *,
    progress: bool = True,
    metadata: dict[str, str] | None = None,
    tolerance: float | None = None,
    histograms: bool = False,
    amp: torch.dtype | str | None = None,
    channels_last: bool = False,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
    group: Any = None,
    timeout: float = 600.0,
) -> Statistics:
    """Return the exact mean and deviation of every site's channels over the data, and set them in ``sparse``.

    The instrumented graph makes the base model's own calls, so alpha plays no part. A second calibration
    replaces the first; alpha keeps its value. How the data is cut into batches and shards changes the result by
    float64 rounding alone.

    Args:
        sparse: A transformed model in eval mode.
        loader: Yields batches of images ``[N, ...]``, alone, first in a tuple or list, or by name in a dictionary
            (labels are ignored); or a Dataset or tensor of images. docs/data.md lists what is understood.
        progress: Show a progress bar.
        metadata: Facts to keep with the statistics, such as what the data was.
        tolerance: Stop when the standard errors of every channel's mean and deviation are estimated below this
            share of the deviation (0.01: one per cent); the images must come in shuffled order.
        histograms: Count each channel's values in bins too, for `figures` and `show`.
        amp: Run the model under autocast to bfloat16 or float16 (torch's dtype, or its name); moments are measured in
            float32 or better all the same.
        channels_last: Give images to the model in that layout, which its convolutions then keep.
        checkpoint: File to write now and then; if it exists, go on from it. It stays: remove it when the result
            is saved. The loader must yield the same images in the same order each time.
        every: Seconds between two checkpoints.
        group: Of torch.distributed, such as ``torch.distributed.group.WORLD``: every process of it calls this with
            its own part of the data (``sampler=range(rank, len(data), world)``; DistributedSampler has some images
            twice), and all get the statistics of the whole.
        timeout: Seconds without a sign of life after which a process of the group counts as dead.

    Raises:
        StateError: The model is not transformed, or in train mode.
        CalibrationError: The loader is empty, its images cannot be used (DataError), a site saw NaN or inf, the
            checkpoint is of another calibration, or another process failed.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> images = torch.rand(64, 1, 8, 8)
        >>> sparse = msfx.transform(net, images[:2])
        >>> stats = msfx.calibrate(sparse, images.split(10), progress=False)
        >>> stats.images, stats["1"].count, stats["1"].std.shape
        (64, 2304, torch.Size([4]))
    """
    require_transformed(sparse, "calibrate")
    tolerance = None if tolerance is None else number(tolerance, "tolerance")
    every, timeout, amp = number(every, "every"), number(timeout, "timeout"), autocast_dtype(amp)
    if not isinstance(metadata, Mapping | None):
        raise CalibrationError(f"metadata must be a mapping of facts by name, got {metadata!r}")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise CalibrationError(f"tolerance must be positive, such as 0.01 for one per cent, got {tolerance}")
    # Under inference mode a model that wants gradients in forward has none.
    own_modes = any(node.target in GRAD_MODE_CALLS for node in sparse.graph.nodes)
    with Ranks(group, timeout) as ranks, torch.no_grad() if own_modes else torch.inference_mode():
        if ranks.world > 1 and checkpoint is not None and (tolerance is not None or histograms):
            raise CalibrationError("with several processes a checkpoint goes with neither tolerance nor histograms")
        one_pass = _Pass(sparse, Source(loader, sparse), ranks, tolerance, histograms, amp, channels_last)
        if checkpoint is not None:
            one_pass.keep(checkpoint, every)
        with bar(progress and ranks.rank == 0) as display:
            one_pass.run(display)
        statistics = one_pass.result({str(name): str(fact) for name, fact in (metadata or {}).items()})
    set_statistics(sparse, statistics, check_weights=False)
    found = added(sparse).statistics
    assert found is not None  # set_statistics saw to it
    return found


class _Pass:
    """One process's pass over its batches, and what it exchanges with the others."""

    def __init__(
        self,
        sparse: fx.GraphModule,
        source: Source,
        ranks: Ranks,
        tolerance: float | None,
        histograms: bool,
        amp: torch.dtype | None,
        channels_last: bool,
    ) -> None:
        self._sparse, self._plan = sparse, added(sparse).plan
        self._device = next(iter(operators(sparse).values())).get_buffer("mean").device
        lowering = ops.lowering()
        # One read of each tensor for the moments and the activation, where one kernel does both.
        fused = lowering == "triton" or (lowering == "auto" and self._device.type == "cuda")
        self._observed, observers = observe(sparse, fused)
        self._names, self._observers = list(observers), list(observers.values())
        self._source, self._ranks = source, ranks
        self._tolerance, self._histograms, self._amp, self._channels_last = tolerance, histograms, amp, channels_last
        self._weights, self._graph = fingerprint(sparse), graph_fingerprint(self._observed)
        self._state = PassState(self._observers, self._device, grouped=tolerance is not None)
        self._precision: Precision | None = None
        self._shape: list[int] = []
        self._checkpoint: Checkpoint | None = None
        if len({*ranks.gather((self._weights, self._graph), "start")}) > 1:
            raise CalibrationError("the processes have different models: load the same weights in each")

    def keep(self, path: str | Path, every: float) -> None:
        """Write checkpoints from now on; go on from the one there is."""
        self._source.require_repeatable()
        identity = {
            "model (weights)": self._weights,
            "model (graph)": self._graph,
            "number of batches": self._source.batches,
            "number of images": self._source.images,
            "tolerance": self._tolerance,
            "choice of histograms": self._histograms,
            "precision or layout": [str(self._amp), self._channels_last],
        }
        with torch.inference_mode(False):
            function = answers(self._sparse, added(self._sparse).shape)
        self._checkpoint = Checkpoint(path, every, identity, function, self._ranks.rank, self._ranks.world)
        self._checkpoint.resume(self._state)
        self._look_at_precision()

    def run(self, display: Progress) -> None:
        """Measure batch after batch, to the end or to the precision asked for."""
        state, kept = self._state, self._checkpoint
        # Where they stop together, all must look at the precision equally often, whatever their shards.
        shared_end = 0
        if self._tolerance is not None and self._ranks.world > 1:
            if self._source.batches is None:
                raise CalibrationError("several processes with a tolerance need loaders that know their length")
            shared_end = max(self._ranks.gather(self._source.batches, "batches"))
        if state.batches:
            say_resumed(display, "batch", state.batches + 1, self._source.batches)
        task = display.add_task("calibrate", total=self._source.images, completed=state.images, note="")
        began = looked = time.monotonic()
        already, latest = state.images, None
        for index, images in self._source.read(state.batches):
            self._shape = list(images.shape[1:])
            if kept is not None:
                kept.compare(index, images)
            if index < state.batches or self._settled:
                continue
            batch, latest = self._measure(images), images
            rate = (state.images - already) / max(time.monotonic() - began, 1e-9)
            display.update(task, completed=state.images, note=f"{rate:,.0f} images/s")
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                state.refuse_non_finite()
            if state.groups is not None and state.groups.add(batch):
                self._look_at_precision()
            if kept is not None and kept.due():
                kept.write(state, images)
            if self._settled:
                break
            self._ranks.heartbeat(f"batch {index}")
        state.refuse_non_finite()
        if kept is not None:
            kept.require_compared()
            if latest is not None:
                try:
                    kept.write(state, latest)
                except WriteError as error:  # all is measured, and the result needs no checkpoint
                    warnings.warn(str(error), stacklevel=2)
        for _ in range(state.batches, shared_end):  # the others have more batches
            if self._settled:
                break
            if state.groups is not None and state.groups.add(None):
                self._look_at_precision()
        if self._histograms and not state.histograms:  # a shard without images
            self._make_bins(state.totals)

    def result(self, metadata: dict[str, str]) -> Statistics:
        """Return the statistics of all processes together."""
        state, ranks = self._state, self._ranks
        images = sum(ranks.gather(state.images, "images"))
        if not images:
            raise DataError(self._source.nothing)
        sites = merge_all(gather_totals(ranks, [state.totals], "end")).by_site()
        if state.histograms:
            everyone = ranks.gather([h.counts.cpu() for h in state.histograms], "histograms")
            with torch.inference_mode(False):
                counts = (torch.stack(of_site).sum(0).to(self._device) for of_site in zip(*everyone, strict=True))
                histograms = (replace(h, counts=c) for h, c in zip(state.histograms, counts, strict=True))
                sites = [replace(s, histogram=h) for s, h in zip(sites, histograms, strict=True)]
        ranges = torch.stack(ranks.gather(state.input_range.cpu(), "range"))
        # Of one image in the latest batch; the first process has images if any has.
        shape = ranks.gather(self._shape, "image shape")[0]
        facts = {
            "meansparse_fx": version("meansparse_fx"),
            "torch": torch.__version__,
            "input_range": f"{float(ranges[:, 0].min()):g} to {float(ranges[:, 1].max()):g}",
            "image_shape": "x".join(map(str, shape)),
        }
        if self._tolerance is not None:
            facts["tolerance"] = f"{self._tolerance:g}, " + ("reached" if self._settled else "not reached")
            facts["precision"] = str(self._precision or "unknown: too few batches")
        table = {site.name: site.facts() for site in self._plan.active}
        by_name = dict(zip(self._names, sites, strict=True))
        marks = least_marks(ranks.gather(least_marks(state.marks), "marks"))
        return Statistics(by_name, self._weights, images, facts | metadata, self._graph, table, marks)

    @property
    def _settled(self) -> bool:
        """Whether the precision asked for is reached."""
        return self._tolerance is not None and self._precision is not None and self._precision.error < self._tolerance

    def _measure(self, images: Tensor) -> Totals:
        """Run one batch through the instrumented graph and return its totals."""
        images = images.to(self._device, non_blocking=True)
        if self._channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self._forward(images)
        batch = self._state.add(images)
        if self._histograms and not self._state.histograms:
            self._make_bins(batch)
            self._forward(images)  # once more, to be counted
        return batch

    def _forward(self, images: Tensor) -> None:
        cast = torch.autocast(self._device.type, self._amp) if self._amp is not None else nullcontext()
        with explaining_misfit(images), cast:
            self._observed(images)

    def _make_bins(self, first: Totals) -> None:
        """Lay the bins around what all processes saw first."""
        together = merge_all(gather_totals(self._ranks, [first], "bins"))
        with torch.inference_mode(False):
            self._state.count_into([ChannelHistogram.around(site) for site in together.by_site()])

    def _look_at_precision(self) -> None:
        """Estimate the precision from the groups of all processes, which all call this after as many batches."""
        groups = self._state.groups
        if groups is None or groups.open_batches or len(groups.closed) < MIN_GROUPS // self._ranks.world:
            return  # too few: what processes wait for each other for would be None
        everyone = gather_totals(self._ranks, groups.closed, f"precision {len(groups.closed)} x {groups.length}")
        self._precision = precision(everyone, self._names)
