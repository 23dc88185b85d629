"""Floor 6: commands that attack: the choice of alpha, and the comparison with the base."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import meansparse_fx as msfx

from ..arguments import number
from ..errors import ArtifactError, StateError
from ..names import ALPHAS, CLEAN_BUDGET, SEARCH_ATTACKS, VARIANTS
from . import options, parsing
from .options import AttackOptions, DataOptions, MeasuredOptions, parsed

if TYPE_CHECKING:
    from torch import fx

HISTOGRAM_IMAGES = 64  # of the test images; enough values for a histogram, few enough for any model's memory
_SEARCH_ATTACKS = ", ".join(SEARCH_ATTACKS)
_ALPHAS, _BUDGET = ", ".join(f"{alpha:g}" for alpha in ALPHAS), str(CLEAN_BUDGET)


@dataclass(frozen=True, slots=True)
class SearchOptions(AttackOptions):
    """How alpha is looked for, and what the attacker may do."""

    attacks: options.Attacks = _SEARCH_ATTACKS
    steps: options.Steps = 20
    queries: options.Queries = 500
    alphas: Annotated[Any, parsed(parsing.numbers, "NUMBERS", "Candidates; 0 is always among them.")] = _ALPHAS
    clean_budget: Annotated[Any, parsed(parsing.fraction, "SHARE", "Of clean accuracy, that may be lost.")] = _BUDGET
    attacked: Annotated[int | None, typer.Option(min=1, help="Attack only the first so many images.")] = None
    variants: Annotated[Any, parsed(parsing.names(VARIANTS), "NAMES", f"Of {', '.join(VARIANTS)}.")] = "mean"
    per_site: Annotated[bool, typer.Option("--per-site", help="Go on from the choice site by site.")] = False
    per_stage: Annotated[bool, typer.Option("--per-stage", help="The same, sites of one resolution together.")] = False
    site_alphas: Annotated[Any, parsed(parsing.numbers, "NUMBERS", "At each site, instead of neighbours.")] = None


def select(
    model: MeasuredOptions,
    data: DataOptions,
    search: SearchOptions,
    out: Annotated[Path | None, typer.Option(help="For evaluate --settings; or FILE.json, for --alpha.")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for figures, tables and search.json.")] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Choose alpha on held-out images: best worst case under attack within the clean budget."""
    from ..artifacts import require_place, write_folder
    from ..report import result_files
    from . import loading

    loading.check_attacks(search)
    require_place(out)
    require_place(report, folder=True)
    images, sparse = loading.open_sparse(model, data, search.logits)
    arguments = asdict(search)
    if arguments.pop("per_stage"):
        arguments["per_site"] = "stage"
    search_in: Any = partial(msfx.select_alpha, sparse, **arguments)
    if dry_run:
        loading.estimate(images, data.batch_size, partial(search_in, checkpoint=None, progress=False))
        return
    found = search_in(images.loader(data.batch_size))
    console = loading.console()
    console.print(found.table())
    chosen = f"alpha {found.alpha:g}" if isinstance(found.alpha, float) else f"alpha by site: {found.alpha}"
    variant = f", variant {found.variant}" if found.variant != "mean" else ""
    console.print(f"{chosen}{variant}", style="bold", highlight=False)
    found.apply(sparse)
    if msfx.get_alpha(sparse) == 0:
        text = "Alpha is 0, so the model is its base, and evaluate has nothing to compare."
        console.print(f"{text} {_another_alpha(sparse)}", highlight=False)
    if out is not None and out.suffix == ".json":
        found.save(out)
    elif out is not None:
        msfx.save(sparse, out)
    if out is not None:
        console.print(f"settings: {out}", highlight=False)
    if report is not None:
        write_folder(report, result_files(found))
        found.save(report / "search.json")
        console.print(f"report: {report}")


def evaluate(
    model: MeasuredOptions,
    data: DataOptions,
    attack: AttackOptions,
    alpha: options.Alpha = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", "--out", help="Directory for report.json, report.html, figures, tables and settings."),
    ] = None,
    save_adversarial: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File for the adversarial images; verify checks it.")
    ] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Compare MODEL with its base under the same attacks, on test images that nothing else saw.

    Under torchrun each process takes its share: torchrun --nproc-per-node 4 -m meansparse_fx evaluate ...
    """
    from ..artifacts import require_place
    from ..operators import added
    from ..report import headline, write_report
    from . import loading

    loading.check_attacks(attack)
    require_place(report, folder=True)
    require_place(save_adversarial)
    model, group = loading.join_processes(model)
    images, sparse = loading.open_sparse(model, data, attack.logits)
    put_alpha(sparse, alpha)
    compare: Any = partial(msfx.evaluate, sparse, **asdict(attack))
    if dry_run:  # the checks, which look at a hundred images whatever there are, come on top
        single = partial(compare, sanity_images=0, checkpoint=None, progress=False)
        loading.estimate(images, data.batch_size, single)
        loading.leave_processes(group)
        return
    evaluation = compare(images.loader(data.batch_size), group=group, save_adversarial=save_adversarial)
    if not loading.leave_processes(group):
        return
    console = loading.console()
    console.print(evaluation.table())
    console.print(headline(evaluation), style="bold", highlight=False)
    if msfx.get_alpha(sparse) == 0:
        console.print(_another_alpha(sparse), highlight=False)
    if report is not None:
        measured = added(sparse).statistics
        assert measured is not None  # `transformed` saw to it
        write_report(
            report,
            sparse,
            evaluation,
            loading.first_images(images, HISTOGRAM_IMAGES, loading.device_of(model)),
            model=model.model,
            data={
                "calibration": f"{measured.images} images, {measured.metadata.get('data', 'unknown')}",
                "test": images.description,
            },
        )
        msfx.save(sparse, report / options.SETTINGS)
        console.print(f"report: {report / 'report.html'}")


def verify(
    file: Annotated[Path, options.file_argument("From evaluate --save-adversarial.")],
    model: MeasuredOptions,
    robustbench: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write x_adv and y there, by torch.save, for an external evaluation."),
    ] = None,
    logits: options.LogitsName = None,
) -> None:
    """Check adversarial images that evaluate kept: MODEL and its base are asked, nothing is attacked.

    Alpha and all switches are those of the file. Exit status 1 if a model is right where the file says it is wrong.
    """
    import torch

    from ..artifacts import write_whole
    from ..evaluate import Evidence, external_evaluation
    from . import loading

    images = Evidence.load(file).images
    sparse = loading.transformed(model, loading.open_model(model), images[:2].to(loading.device_of(model)))
    found = msfx.verify(file, sparse, logits=logits)
    loading.console().print(str(found), highlight=False)
    if robustbench is not None:
        write_whole(robustbench, lambda place: torch.save(external_evaluation(file), place))
    if not found.holds:
        raise typer.Exit(1)


def put_alpha(sparse: fx.GraphModule, written: str | None) -> None:
    """Set alpha as it was typed: a number, ``leader``, or a JSON file; as it is if nothing was, and settings say it.

    A search's variant comes with its alpha; the band's centre stays as it was when alpha was looked for.
    """
    from ..alpha.halving import Candidate
    from ..operators import added

    choice = added(sparse).choice
    if written is None:
        if choice is None and msfx.get_alpha(sparse) == 0:
            raise StateError("no alpha: give --alpha, or --settings FILE of select --out")
    elif written == "leader":
        if choice is None:
            raise StateError("no leader: it is what select found, so give --settings FILE of select --out")
        if not choice["leader"]:
            raise StateError("no leader: select gave up every alpha but 0 early; give --alpha a number")
        Candidate(choice["leader"], choice["variant"]).set(sparse)
    elif Path(written).is_file():
        try:
            found = json.loads(Path(written).read_text("utf-8"))
            Candidate(found["alpha"], found.get("variant", "mean")).set(sparse)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f'{written}: not a file that select --out wrote, or JSON such as {{"alpha": {{"layer1": 0.2}}}} '
                f"({type(error).__name__}: {error}); settings are given as --settings"
            ) from error
        if found.get("threat"):
            added(sparse).choice = found
    else:
        try:
            value = number(written, "alpha")
        except ValueError as error:
            raise ArtifactError(f"{written}: no such file, and no number from 0 such as 0.1 or 8/255") from error
        msfx.set_alpha(sparse, value)


def _another_alpha(sparse: fx.GraphModule) -> str:
    """Return how evaluate compares a model whose alpha is 0 at another one."""
    from ..operators import added

    choice = added(sparse).choice
    if not choice or not choice["leader"]:
        return "Set another by --alpha."
    return f"To compare what looked best: --alpha {choice['leader']:g} (with --settings also --alpha leader)."
