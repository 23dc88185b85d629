"""Floor 6: commands that make statistics files and look into them."""

from __future__ import annotations

from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any

import typer

import meansparse_fx as msfx

from ..errors import StatisticsError
from . import parsing
from .options import Amp, DataOptions, DryRun, ModelOptions, file_argument, parsed


def calibrate(
    model: ModelOptions,
    data: DataOptions,
    out: Annotated[Path, typer.Option(help="File to write: statistics and placement (safetensors).")],
    tolerance: Annotated[
        Any, parsed(parsing.fraction, "SHARE", "Stop at this error of means and deviations, in deviations: 0.01.")
    ] = None,
    histograms: Annotated[bool, typer.Option("--histograms", help="Count each channel's values, for figures.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="To go on from after a crash; removed at the end.")] = None,
    every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Between two checkpoints.")] = 60.0,
    amp: Amp = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Give images in that layout.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images ahead; 0 reads in this one.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Silence of a dead process.")] = 600.0,
    dry_run: DryRun = False,
) -> None:
    """Measure mean and deviation of every site's channels in one pass over training images.

    Under torchrun each process takes its share: torchrun --nproc-per-node 4 -m meansparse_fx calibrate ...
    """
    from ..artifacts import require_place
    from ..shards import file_of_rank, rank_and_world
    from ..statistics.summary import summary_table
    from . import loading

    require_place(out)
    model, group = loading.join_processes(model)
    rank, world = rank_and_world(group)
    images, sparse = loading.open_sparse(model, data)
    measure: Any = partial(msfx.calibrate, sparse, histograms=histograms, amp=amp, channels_last=channels_last)
    if dry_run:
        loading.estimate(images, data.batch_size, partial(measure, progress=False), warm=True)
        loading.leave_processes(group)
        return
    found = measure(
        images.loader(data.batch_size, (rank, world), workers, next(sparse.parameters()).is_cuda),
        metadata={"data": images.description, "model": model.model},
        tolerance=tolerance,
        checkpoint=checkpoint,
        every=every,
        group=group,
        timeout=timeout,
    )
    if rank == 0:
        msfx.save(sparse, out)
        console = loading.console()
        console.print(summary_table(found))
        console.print(f"{len(found)} sites, {found.images} images: {out}")
    loading.leave_processes(group)
    if checkpoint is not None:  # the result is saved
        file_of_rank(checkpoint, rank, world).unlink(missing_ok=True)


def show(file: Annotated[Path, file_argument("Statistics, or settings of a model.")]) -> None:
    """Show what a file of statistics or settings holds."""
    from ..settings import Settings
    from ..statistics.summary import summary_table
    from . import loading

    statistics, held = msfx.Statistics.load_with_settings(file)
    console = loading.console()
    console.print(summary_table(statistics))
    if held is not None:
        console.print(Settings.of(file, statistics, held).in_words(), highlight=False)


def merge(
    files: Annotated[list[Path], file_argument("Statistics files of one model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Statistics file to write.")],
) -> None:
    """Merge statistics of different images into what one pass over all of them would have measured."""
    if len(files) < 2:
        raise StatisticsError("merge needs two files or more")
    from ..artifacts import require_place
    from . import loading

    require_place(out)
    merged = reduce(msfx.Statistics.merge, map(msfx.Statistics.load, files))
    merged.save(out)
    loading.console().print(f"{len(merged)} sites, {merged.images} images: {out}")
