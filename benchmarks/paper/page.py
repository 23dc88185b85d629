"""docs/paper.md, and its plots, from the result files: our numbers beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from meansparse_fx.plots import LIGHT, picture, prepare

from .. import choice
from ..harness import read, show
from ..page.markdown import points, render, table
from .measure import Row
from .published import change
from .tables import NETWORKS, SITES, TABLES

HEADINGS = ("column", "row", "clean", "own", "change", "worst", "change", "paper")


def write_page(results: Path, docs: Path) -> None:
    """Write paper.md and paper-TABLE.png into ``docs``, from the files in ``results``; missing tables are said."""
    measured = {number: rows for number in TABLES if (rows := read(results / f"paper-{number}.csv", Row))}
    over_alpha = [number for number in measured if TABLES[number].row == "alpha"]
    figures = [number for number in over_alpha if len({row.row for row in measured[number]}) > 3]
    for number in figures:
        (docs / f"paper-{number}.png").write_bytes(picture(_figure(number, measured[number])))
    text = render(
        "paper.md", TABLES=TABLES, SITES=SITES, networks=len(NETWORKS), measured=measured,
        summary=_summary(measured), finding=_finding, figures=figures, lines=_lines, points=points,
        choice=read(results / "choice.csv", choice.Row),
    )  # fmt: skip
    (docs / "paper.md").write_text(text)


def print_table(number: int, rows: Sequence[Row]) -> None:
    """Print one table as measured, the paper's change beside it."""
    show(HEADINGS, _lines(number, rows), title=f"Table {number}: {TABLES[number].title}; {_images(rows)}")


def _lines(number: int, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for row in rows:
        own, worst = f"{100 * row.own:.1f}", "" if row.worst is None else f"{100 * row.worst:.1f}"
        paper = change(number, row.column, row.row) if row.alpha else None
        changes = [points(row, which) if row.alpha else "" for which in ("own", "worst")]
        theirs = "" if paper is None else f"{100 * paper:+.1f}"
        lines.append((row.column, row.row, f"{100 * row.clean:.1f}", own, changes[0], worst, changes[1], theirs))
    return lines


def _images(rows: Sequence[Row]) -> str:
    return f"clean on {rows[0].images:,} images, attacks on {rows[0].attacked:,}"


def _summary(measured: dict[int, list[Row]]) -> str:
    lines = []
    for number, rows in measured.items():
        rows = [row for row in rows if row.alpha]
        cells = [f"{number}: {TABLES[number].title}", str(len(rows))]
        for which in ("own", "worst"):
            found = [row for row in rows if getattr(row, which) is not None]
            changes = [[getattr(row, f"{which}_{end}") for row in found] for end in ("change", "low", "high")]
            above, beyond_above, below, beyond_below = (
                sum(sign * value > 0 for value in values)
                for sign, values in ((1, changes[0]), (1, changes[1]), (-1, changes[0]), (-1, changes[2]))
            )
            cells += [f"{above} ({beyond_above})", f"{below} ({beyond_below})"] if found else ["", ""]
        paper = [p for r in rows if (p := change(number, r.column, r.row)) is not None]
        cells += [str(sum(p > 0 for p in paper)), str(sum(p < 0 for p in paper))] if paper else ["", ""]
        lines.append(cells)
    heads = ("table", "settings", "own gradient: above", "below", "those who know: above", "below")
    return table((*heads, "paper: above", "below"), lines)


def _finding(number: int, rows: Sequence[Row]) -> str:
    """Return in words whether the changes have the paper's sign."""
    pairs = [(r, p) for r in rows if r.alpha and (p := change(number, r.column, r.row))]
    words = [f"{_images(rows).capitalize()}; {rows[0].norm} eps {rows[0].eps:g} where nothing else is said."]
    for which, name in (("own", "Under its own gradient"), ("worst", "Against those who know")):
        compared = [(getattr(r, f"{which}_change"), p) for r, p in pairs if getattr(r, which) is not None]
        if compared:
            same = sum(c * p > 0 for c, p in compared)
            words.append(f"{name} the change has the paper's sign in {same} of {len(compared)} settings.")
    return " ".join(words)


def _figure(number: int, rows: Sequence[Row]) -> Figure:
    """Return the change over alpha, a panel a column: own gradient, attackers who know, and the paper's."""
    columns = list(dict.fromkeys(row.column for row in rows))
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(
        figsize=(2.6 * across + 0.6, 2.2 * down + 0.5), dpi=160, facecolor=LIGHT.paper, layout="constrained"
    )
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, column in zip(panels, columns, strict=False):
        own = [row for row in rows if row.column == column]
        prepare(axes, LIGHT)
        axes.set_title(column, fontsize=9, color=LIGHT.ink, loc="left")
        axes.axhline(0, color=LIGHT.muted, linewidth=0.8)
        alphas = [row.alpha for row in own]
        paper = [(row.alpha, p) for row in own if (p := change(number, column, row.row)) is not None]
        axes.plot(*zip(*paper, strict=True), color=LIGHT.muted, linestyle=(0, (4, 3)), linewidth=1.2, label="paper")
        axes.plot(alphas, [row.own_change for row in own], color=LIGHT.accent, linewidth=1.8, label="own gradient")
        if all(row.worst is not None for row in own):
            low, high = ([getattr(row, f"worst_{end}") for row in own] for end in ("low", "high"))
            axes.fill_between(alphas, low, high, color=LIGHT.second, alpha=0.15, linewidth=0)
            axes.plot(
                alphas, [row.worst_change for row in own], color=LIGHT.second, linewidth=1.8, label="attackers who know"
            )
        axes.set_xticks(alphas)
    for axes in list(panels)[len(columns) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
