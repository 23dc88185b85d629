"""Floor 6: commands that attack: choose alpha, and compare with the base."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import number
from ..errors import ArtifactError, EvaluationError, StateError
from ..names import ALPHAS, CLEAN_BUDGET, DEFAULT_ATTACKS, SEARCH_ATTACKS, VARIANTS
from . import parsing
from .options import (
    Alpha,
    Attacks,
    DataOptions,
    DryRun,
    LogitsName,
    MeasuredOptions,
    PaceOptions,
    Queries,
    Steps,
    ThreatOptions,
    as_arguments,
    file_argument,
)

if TYPE_CHECKING:
    from torch import fx

HISTOGRAM_IMAGES = 64  # of the test images; enough values for a histogram, few enough for any model's memory
_SEARCH_ATTACKS = ", ".join(SEARCH_ATTACKS)
_DEFAULT_ATTACKS = ", ".join(DEFAULT_ATTACKS)
_DEFAULT_ALPHAS = ", ".join(f"{a:g}" for a in ALPHAS)


def select(
    model: MeasuredOptions,
    data: DataOptions,
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
    per_stage: Annotated[
        bool, typer.Option("--per-stage", help="Go on from the choice stage by stage: sites of one resolution.")
    ] = False,
    site_alphas: Annotated[
        Any, typer.Option(parser=parsing.numbers, metavar="NUMBERS", help="To try at each site instead of neighbours.")
    ] = None,
    attacks: Attacks = _SEARCH_ATTACKS,
    steps: Steps = 20,
    queries: Queries = 500,
    logits: LogitsName = None,
    out: Annotated[Path | None, typer.Option(help="For evaluate --settings; or FILE.json, for --alpha.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for the search's figures (PDF), tables (LaTeX, CSV) and search.json.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Choose alpha on held-out images: best worst case under attack within the clean budget."""
    from ..alpha import select_alpha
    from ..artifacts import require_place, write_folder
    from ..report import result_files
    from ..settings import save
    from .loading import check_attacks, console, estimate, open_images, open_sparse

    check_attacks(threat, attacks)
    if out is not None:
        require_place(out)
    if report is not None:
        require_place(report, folder=True)
    images = open_images(data)
    images, sparse = open_sparse(model, images, logits)
    search_in: Any = partial(
        select_alpha,
        sparse,
        alphas=alphas,
        attacked=attacked,
        clean_budget=clean_budget,
        variants=variants,
        per_site="stage" if per_stage else per_site,
        site_alphas=site_alphas,
        attacks=attacks,
        steps=steps,
        queries=queries,
        logits=logits,
        **as_arguments(threat, pace),
    )
    if dry_run:
        estimate(images, data.batch_size, lambda batches: search_in(batches, checkpoint=None, progress=False))
        return
    search = search_in(images.loader(data.batch_size))
    console().print(search.table())
    chosen = f"alpha {search.alpha:g}" if isinstance(search.alpha, float) else f"alpha by site: {search.alpha}"
    variant = f", variant {search.variant}" if search.variant != "mean" else ""
    console().print(f"{chosen}{variant}", style="bold", highlight=False)
    search.apply(sparse)
    if _is_base(sparse):
        console().print(_nothing(sparse), highlight=False)
    if out is not None and out.suffix == ".json":
        search.save(out)
    elif out is not None:
        save(sparse, out)
    if report is not None:
        write_folder(report, result_files(search))
        search.save(report / "search.json")
        console().print(f"report: {report}")


def evaluate(
    model: MeasuredOptions,
    data: DataOptions,
    threat: ThreatOptions,
    pace: PaceOptions,
    alpha: Alpha = None,
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
    from ..operators import added
    from ..report import headline, write_report
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
    images, sparse = open_sparse(model, images, logits)
    put_alpha(sparse, alpha)
    if _is_base(sparse):
        raise EvaluationError(_nothing(sparse))
    attack: Any = partial(
        evaluate,
        sparse,
        attacks=attacks,
        steps=steps,
        queries=queries,
        logits=logits,
        **as_arguments(threat, pace),
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
        measured = added(sparse).statistics
        assert measured is not None  # `transformed` saw to it
        write_report(
            report,
            sparse,
            evaluation,
            first_images(images, HISTOGRAM_IMAGES, device_of(model)),
            model=model.model,
            data={
                "calibration": f"{measured.images} images, {measured.metadata.get('data', 'unknown')}",
                "test": images.description,
            },
        )
        console().print(f"report: {report / 'report.html'}")


def verify(
    file: Annotated[Path, file_argument("From evaluate --save-adversarial.")],
    model: MeasuredOptions,
    robustbench: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write x_adv and y there, by torch.save, for an external evaluation."),
    ] = None,
    logits: LogitsName = None,
) -> None:
    """Check adversarial images that evaluate kept: MODEL and its base are asked, nothing is attacked.

    Alpha and all switches are those of the file. Exit status 1 if a model is right where the file says it is wrong.
    """
    import torch

    from ..artifacts import write_whole
    from ..evaluate import Evidence, external_evaluation, verify
    from .loading import console, device_of, open_model, transformed

    images = Evidence.load(file).images
    sparse = transformed(model, open_model(model), images[:2].to(device_of(model)))
    found = verify(file, sparse, logits=logits)
    console().print(str(found), highlight=False)
    if robustbench is not None:
        write_whole(robustbench, lambda place: torch.save(external_evaluation(file), place))
    if not found.holds:
        raise typer.Exit(1)


def put_alpha(sparse: fx.GraphModule, written: str | None) -> None:
    """Set alpha as it was typed: a number, ``leader``, or a JSON file; as it is if nothing was.

    Raises:
        ArtifactError: There is no such file, or it is of another kind.
        StateError: ``leader``, and no search that had one; or nothing was typed, and there are no settings.
    """
    from ..operators import added, set_alpha, set_variant

    choice = added(sparse).choice
    if written is None:
        if choice is None and _is_base(sparse):
            raise StateError("no alpha: give --alpha, or --settings FILE of select --out")
    elif written == "leader":
        if not (choice and choice["leader"]):
            raise StateError("no leader: it is what select found, so give --settings FILE of select --out")
        set_variant(sparse, choice["variant"])
        set_alpha(sparse, choice["leader"])
    elif Path(written).is_file():
        try:
            found = json.loads(Path(written).read_text("utf-8"))
            set_variant(sparse, found.get("variant", "mean"))
            set_alpha(sparse, found["alpha"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f'{written}: not a file that select --out wrote, or JSON such as {{"alpha": {{"layer1": 0.2}}}} '
                f"({type(error).__name__}: {error}); settings are given as --settings"
            ) from error
        if found.get("threat"):
            added(sparse).choice = found
    else:
        try:
            set_alpha(sparse, number(written, "alpha"))
        except ValueError as error:
            raise ArtifactError(f"{written}: no such file, and no number from 0 such as 0.1 or 8/255") from error


def _is_base(sparse: fx.GraphModule) -> bool:
    from ..operators import get_alpha

    return get_alpha(sparse) == 0


def _nothing(sparse: fx.GraphModule) -> str:
    """Say that alpha is 0, and what evaluate can do about it."""
    from ..operators import added

    choice = added(sparse).choice
    text = "Alpha is 0, so the model is its base, and evaluate has nothing to compare."
    if not choice or not choice["leader"]:
        return f"{text} --alpha gives it another."
    return f"{text} --alpha {choice['leader']:g} (with --settings also --alpha leader) takes what looked best."
