"""Floor 6: what select and evaluate wrote, for others: figures and tables again, and a folder for a model hub."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import meansparse_fx as msfx

from ..errors import StateError, StatisticsError
from . import parsing
from .model import Shape
from .options import SETTINGS, ModelOptions, file_argument, file_option, parsed

if TYPE_CHECKING:
    from ..settings import Settings

FORMS = ("pdf", "png", "svg")


def figures(
    file: Annotated[Path, file_argument("search.json, report.json, or of calibrate --histograms.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write into.")] = Path(),
    form: Annotated[Any, parsed(parsing.name(FORMS), "FORMAT", f"Of {', '.join(FORMS)}.", "--format")] = "pdf",
    site: Annotated[str | None, typer.Option(help="As show lists it.", show_default="the typical one")] = None,
    channel: Annotated[int | None, typer.Option(min=0, help="Of the site.", show_default="the typical one")] = None,
    alpha: Annotated[Any, parsed(parsing.fraction, "ALPHA", "Half width of a histogram's band.")] = "0.3",
) -> None:
    """Write the figures of a search, an evaluation or statistics, and its tables as LaTeX and CSV."""
    from ..alpha import result
    from ..artifacts import read_json, require_place, write_folder
    from ..evaluate import verdict
    from ..report import result_files
    from .loading import console

    require_place(out, folder=True)
    with file.open("rb") as opened:
        tensors = opened.read(9)[8:] == b"{"  # safetensors: eight bytes of length, then the header
    if tensors:
        if site is None and channel is not None:
            raise StatisticsError("--channel needs --site")
        histogram = msfx.Statistics.load(file).histogram(site, channel, alpha)
        console().print(histogram)
        files = result_files(histogram=histogram, form=form)
    else:
        known = read_json(file, {kind.FORMAT: kind.VERSION for kind in (verdict, result)})
        evaluation = msfx.Evaluation.load(file) if known["format"] == verdict.FORMAT else None
        search = msfx.AlphaSearch.load(file) if evaluation is None or known.get("search") else None
        files = result_files(search, evaluation, form=form)
    write_folder(out, files)
    console().print(f"{out}: {', '.join(files)}", highlight=False)


@dataclass(frozen=True, slots=True)
class OptionalModel(ModelOptions):
    """A model, or none."""

    model: Annotated[
        str | None, typer.Argument(parser=parsing.model, metavar="[MODEL]", help="To put its weights into the folder.")
    ] = None  # type: ignore[assignment]


def card(
    model: OptionalModel,
    report: Annotated[Path, file_option("report.json of evaluate --report.")],
    out: Annotated[Path, typer.Option(help="Folder for config.json, model.safetensors, README.md and the settings.")],
    shape: Shape = None,
) -> None:
    """Write a folder for a model hub: settings, state_dict, and a model card with the evaluation's table.

    Without MODEL the state_dict is that of the operators alone. Without --settings they are those that evaluate wrote
    beside its report.
    """
    from safetensors.torch import save as to_bytes

    from ..artifacts import require_place, write_folder
    from ..report import render
    from ..settings import Settings
    from . import loading

    settings_file = model.settings or report.with_name(SETTINGS)
    if not settings_file.is_file():
        raise StateError(f"no settings: {settings_file} is not there; give --settings FILE of msfx.save")
    model = replace(model, settings=settings_file)
    require_place(out, folder=True)
    settings = Settings.load(settings_file)
    found = _read(report, settings)
    state = settings.state_dict()
    if model.model is not None:
        net = loading.open_model(model)
        state = loading.transformed(model, net, loading.random_images(model, net, shape)).state_dict()
    config = {
        "library_name": "meansparse_fx",
        "base_model": found["model"],
        "base_fingerprint": settings.statistics.fingerprint,
        "placement": {name: value for name, value in asdict(settings.placement).items() if name != "predicate"},
        "fuse": settings.fuse,
        "sites": settings.sites,
    }
    given = {"report": found, "evaluation": msfx.Evaluation.load(report), "settings": settings, "file": SETTINGS}
    files = {
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "model.safetensors": to_bytes({k: v.contiguous().clone().cpu() for k, v in state.items()}, {"format": "pt"}),
        "README.md": render("card.md.j2", whole=model.model is not None, **given).encode(),
        SETTINGS: settings_file.read_bytes(),
    }
    write_folder(out, files)
    loading.console().print(f"{', '.join(files)}: {out}", highlight=False)


def _read(path: Path, settings: Settings) -> dict[str, Any]:
    """Return the contents of report.json, of this model and these alphas."""
    from ..artifacts import parsing, read_json
    from ..evaluate import verdict

    with parsing(path):
        found = read_json(path, {verdict.FORMAT: verdict.VERSION})
        measured, alpha = found["calibration"]["fingerprint"], found["alpha"]
        for name in ("model", "headline"):  # which the card shows
            if not isinstance(found[name], str):
                raise ValueError(f"its {name} is no text")
    if measured != settings.statistics.fingerprint:
        raise StateError(f"{path}: of a model with other weights than {settings.path} is of")
    own = {row["name"]: row["alpha"] for row in settings.sites}
    evaluated = alpha if isinstance(alpha, dict) else dict.fromkeys(own, alpha)
    if differing := [site for site in own if evaluated.get(site) != own[site]]:
        site = differing[0]
        raise StateError(
            f"{path}: evaluated at alpha {evaluated.get(site)} at {site}, where {settings.path} has {own[site]}: "
            f"those that were evaluated are in {SETTINGS} beside it"
        )
    return found
