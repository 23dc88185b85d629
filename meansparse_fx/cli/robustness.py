"""Floor 6: commands that attack: choose alpha, and compare with the base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..alpha import ALPHAS, select_alpha
from ..evaluate import evaluate as run_evaluate
from ..histogram import band_shares, feature_histogram
from ..operators import set_alpha
from ..report import CLEAN_BUDGET, headline, write_report
from ..statistics import Statistics
from . import parsing
from .loading import console, device_of, first_images, open_images, open_sparse
from .options import DataOptions, ModelOptions, Queries, StatisticsFile, Steps, ThreatOptions

HISTOGRAM_IMAGES = 64  # of the test images; enough values for a histogram, few enough for any model's memory
_DEFAULT_ALPHAS = ",".join(f"{a:g}" for a in ALPHAS)


def select(
    model: ModelOptions,
    data: DataOptions,
    statistics: StatisticsFile,
    threat: ThreatOptions,
    alphas: Annotated[
        Any, typer.Option(parser=parsing.numbers, metavar="NUMBERS", help="Candidates; 0 is always among them.")
    ] = _DEFAULT_ALPHAS,
    clean_budget: Annotated[
        Any,
        typer.Option(parser=parsing.fraction, metavar="SHARE", help="Clean accuracy that may be lost, as a fraction."),
    ] = str(CLEAN_BUDGET),
    attacked: Annotated[
        int | None, typer.Option(min=1, help="Attack only the first images; clean accuracy is measured on all.")
    ] = None,
    steps: Steps = 20,
    queries: Queries = 500,
) -> None:
    """Choose alpha on held-out images: best worst case under attack within the clean budget."""
    images = open_images(data)
    search = select_alpha(
        open_sparse(model, images, statistics),
        images.loader(data.batch_size),
        alphas=alphas,
        attacked=attacked,
        clean_budget=clean_budget,
        steps=steps,
        queries=queries,
        **threat.as_arguments(),
    )
    console().print(search.table())
    console().print(f"alpha {search.alpha:g}", style="bold", highlight=False)


def evaluate(
    model: ModelOptions,
    data: DataOptions,
    statistics: StatisticsFile,
    threat: ThreatOptions,
    alpha: Annotated[
        float, typer.Option(parser=parsing.fraction, metavar="ALPHA", help="Half width of the band, from select.")
    ],
    out: Annotated[Path | None, typer.Option(help="Directory for report.json, report.html and plots.")] = None,
    steps: Steps = 100,
    queries: Queries = 5000,
) -> None:
    """Compare MODEL with its base under the same attacks, on test images that nothing else saw."""
    images = open_images(data)
    sparse = open_sparse(model, images, statistics)
    set_alpha(sparse, alpha)
    evaluation = run_evaluate(
        sparse, images.loader(data.batch_size), steps=steps, queries=queries, **threat.as_arguments()
    )
    console().print(evaluation.table())
    console().print(headline(evaluation), style="bold", highlight=False)
    if out is not None:
        looked_at = first_images(images, HISTOGRAM_IMAGES, device_of(model))
        measured = Statistics.load(statistics)
        write_report(
            out,
            model=model.model,
            plan=sparse.meta["plan"],
            statistics=measured,
            evaluation=evaluation,
            histogram=feature_histogram(sparse, looked_at),
            shares=band_shares(sparse, looked_at),
            data={
                "calibration": f"{measured.images} images, {measured.metadata.get('data', 'unknown')}",
                "test": images.description,
            },
        )
        console().print(f"report: {out / 'report.html'}")
