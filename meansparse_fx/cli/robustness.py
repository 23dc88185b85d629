"""Floor 6: commands that attack: choose alpha, and compare with the base."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtifactError
from ..names import ALPHAS, CLEAN_BUDGET, DEFAULT_ATTACKS, SEARCH_ATTACKS, VARIANTS
from . import parsing
from .options import (
    Attacks,
    DataOptions,
    DryRun,
    LogitsName,
    ModelOptions,
    PaceOptions,
    Queries,
    StatisticsFile,
    Steps,
    ThreatOptions,
)

if TYPE_CHECKING:
    from torch import fx

HISTOGRAM_IMAGES = 64  # of the test images; enough values for a histogram, few enough for any model's memory
_SEARCH_ATTACKS = ",".join(SEARCH_ATTACKS)
_DEFAULT_ATTACKS = ",".join(DEFAULT_ATTACKS)
_DEFAULT_ALPHAS = ",".join(f"{a:g}" for a in ALPHAS)


def select(
    model: ModelOptions,
    data: DataOptions,
    statistics: StatisticsFile,
    threat: ThreatOptions,
    pace: PaceOptions,
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
    variants: Annotated[
        Any, typer.Option(parser=parsing.names(VARIANTS), metavar="NAMES", help=f"Of {', '.join(VARIANTS)}.")
    ] = "mean",
    per_site: Annotated[bool, typer.Option("--per-site", help="Go on from the choice site by site.")] = False,
    site_alphas: Annotated[
        Any, typer.Option(parser=parsing.numbers, metavar="NUMBERS", help="To try at each site instead of neighbours.")
    ] = None,
    attacks: Attacks = _SEARCH_ATTACKS,
    steps: Steps = 20,
    queries: Queries = 500,
    logits: LogitsName = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the search; evaluate takes it as --alpha.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for the search's figures (PDF), tables (LaTeX, CSV) and search.json.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Choose alpha on held-out images: best worst case under attack within the clean budget."""
    from ..alpha import select_alpha
    from ..artifacts import require_place, write_folder
    from ..report import result_files
    from .loading import check_attacks, console, estimate, open_images, open_sparse

    check_attacks(threat, attacks)
    if out is not None:
        require_place(out)
    if report is not None:
        require_place(report, folder=True)
    images = open_images(data)
    search_in: Any = partial(
        select_alpha,
        open_sparse(model, images, statistics, logits),
        alphas=alphas,
        attacked=attacked,
        clean_budget=clean_budget,
        variants=variants,
        per_site=per_site,
        site_alphas=site_alphas,
        attacks=attacks,
        steps=steps,
        queries=queries,
        logits=logits,
        **threat.as_arguments(),
        **pace.as_arguments(),
    )
    if dry_run:
        estimate(images, data.batch_size, lambda batches: search_in(batches, checkpoint=None, progress=False))
        return
    search = search_in(images.loader(data.batch_size))
    console().print(search.table())
    chosen = f"alpha {search.alpha:g}" if isinstance(search.alpha, float) else f"alpha by site: {search.alpha}"
    variant = f", variant {search.variant}" if search.variant != "mean" else ""
    console().print(f"{chosen}{variant}", style="bold", highlight=False)
    if out is not None:
        search.save(out)
    if report is not None:
        write_folder(report, result_files(search))
        search.save(report / "search.json")
        console().print(f"report: {report}")


def evaluate(
    model: ModelOptions,
    data: DataOptions,
    statistics: StatisticsFile,
    threat: ThreatOptions,
    pace: PaceOptions,
    alpha: Annotated[
        str, typer.Option(metavar="ALPHA|FILE", help="Half width of the band, or the file that select --out wrote.")
    ],
    report: Annotated[
        Path | None,
        typer.Option("--report", "--out", help="Directory for report.json, report.html, figures and tables."),
    ] = None,
    save_adversarial: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File for the adversarial images; verify checks it.")
    ] = None,
    attacks: Attacks = _DEFAULT_ATTACKS,
    steps: Steps = 100,
    queries: Queries = 5000,
    logits: LogitsName = None,
    dry_run: DryRun = False,
) -> None:
    """Compare MODEL with its base under the same attacks, on test images that nothing else saw.

    Under torchrun each process takes its share: torchrun --nproc-per-node 4 -m meansparse_fx evaluate ...
    """
    from ..artifacts import require_place
    from ..evaluate import evaluate
    from ..histogram import band_shares, feature_histogram
    from ..report import headline, write_report
    from ..statistics import Statistics
    from .loading import (
        check_attacks,
        console,
        device_of,
        estimate,
        first_images,
        join_processes,
        leave_processes,
        open_images,
        open_sparse,
    )

    check_attacks(threat, attacks)
    if report is not None:
        require_place(report, folder=True)
    if save_adversarial is not None:
        require_place(save_adversarial)
    model, group = join_processes(model)
    images = open_images(data)
    sparse = open_sparse(model, images, statistics, logits)
    put_alpha(sparse, alpha)
    attack: Any = partial(
        evaluate,
        sparse,
        attacks=attacks,
        steps=steps,
        queries=queries,
        logits=logits,
        **threat.as_arguments(),
        **pace.as_arguments(),
    )
    if dry_run:  # the checks, which look at a hundred images whatever there are, come on top
        single: Any = partial(attack, sanity_images=0, checkpoint=None, progress=False)
        estimate(images, data.batch_size, single)
        return
    evaluation = attack(images.loader(data.batch_size), group=group, save_adversarial=save_adversarial)
    if not leave_processes(group):
        return
    console().print(evaluation.table())
    console().print(headline(evaluation), style="bold", highlight=False)
    if report is not None:
        looked_at = first_images(images, HISTOGRAM_IMAGES, device_of(model))
        measured = Statistics.load(statistics)
        write_report(
            report,
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
        console().print(f"report: {report / 'report.html'}")


def verify(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="From evaluate --save-adversarial.")],
    model: ModelOptions,
    statistics: StatisticsFile,
    robustbench: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write x_adv and y there, by torch.save, for an external evaluation."),
    ] = None,
    logits: LogitsName = None,
) -> None:
    """Check adversarial images that evaluate kept: MODEL and its base are asked, nothing is attacked.

    Alpha and variant are those of the file. Exit status 1 if a model is right where the file says it is wrong.
    """
    import torch

    from ..evaluate import Evidence, external_evaluation, verify
    from ..transform import transform
    from .loading import console, device_of, open_model

    images = Evidence.load(file).images
    sparse = transform(
        open_model(model), images[:2].to(device_of(model)), placement=model.placement, statistics=statistics
    )
    found = verify(file, sparse, logits=logits)
    console().print(str(found), highlight=False)
    if robustbench is not None:
        torch.save(external_evaluation(file), robustbench)
    if not found.holds:
        raise typer.Exit(1)


def put_alpha(sparse: fx.GraphModule, written: str) -> None:
    """Set alpha as it was typed: a number, or the file of a search."""
    from ..operators import set_alpha, set_variant

    path = Path(written)
    if not path.is_file():
        set_alpha(sparse, parsing.fraction(written))
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        alpha, variant = found["alpha"], found["variant"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a file that select --out wrote ({error!r})") from error
    set_variant(sparse, variant)
    set_alpha(sparse, alpha)
