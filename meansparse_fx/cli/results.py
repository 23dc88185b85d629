"""Floor 6: figures and tables of results that other commands wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import meansparse_fx as msfx

from ..errors import StatisticsError
from . import parsing
from .options import file_argument, parsed

FORMS = ("pdf", "png", "svg")


def figures(
    file: Annotated[
        Path, file_argument("search.json or report.json of --report, or what calibrate --histograms wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write into.")] = Path(),
    form: Annotated[
        Any, parsed(parsing.name(FORMS), "FORMAT", f"Of the figures: {', '.join(FORMS)}.", "--format")
    ] = "pdf",
    site: Annotated[
        str | None, typer.Option(help="Of a histogram, as show lists it.", show_default="the typical one")
    ] = None,
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
