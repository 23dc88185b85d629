"""docs/paper.md and its plots, from the result files: our numbers beside the paper's, with the same sign or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from meansparse_fx.plots import LIGHT, picture, prepare

from .. import choice
from ..harness import read, show
from ..page.markdown import points, table
from .measure import Row
from .published import change
from .tables import NETWORKS, SITES, TABLES

# What the numbers of a table cannot say themselves.
NOTES = {
    1: "The paper's columns are RaWideResNet (beside GELU) and WideResNet (beside ReLU) on CIFAR-10, without row 0.1.",
    4: "Square uses no gradient, so there is none for an attacker to replace. PSiLU is not in "
    "the paper's table: it stands here because its change in table 2 is the largest.",
    5: "The paper does not give its lambda; ours are in `meansparse_fx/evaluate/descent.py`.",
    7: "The paper's radii are 1 to 4 of 255; beside them stand ours, which leave the base about as little.",
    9: "Radii as multiples of what the network was trained against: the paper's 2, 4, 6, 8, 12, 16 of 255.",
    10: "Sites in graph order: 0 is the stem's. The paper's network has 17; its first and last stand beside ours.",
    12: "The paper's networks are others: WRN-94-16 +1.85, RaWRN-70-16 +1.16, WRN-70-16 (CIFAR-100) +2.29, "
    "Swin-L +0.36, ConvNeXt-L +1.16 points.",
}
HEADINGS = ("column", "row", "clean", "own", "change", "worst", "change", "paper")


def write_page(results: Path, docs: Path) -> None:
    """Write paper.md and paper-TABLE.png into ``docs``, from the files in ``results``; missing tables are said."""
    measured = {number: rows for number in TABLES if (rows := read(results / f"paper-{number}.csv", Row))}
    parts = []
    for number, asked in TABLES.items():
        parts.append(f"## Table {number}: {asked.title}\n")
        if number in NOTES:
            parts.append(NOTES[number] + "\n")
        if number not in measured:
            parts.append(f"Not measured yet: `python -m benchmarks.paper {number}`.\n")
            continue
        rows = measured[number]
        if missing := [column for column in asked.columns if column not in {row.column for row in rows}]:
            parts.append(f"Not measured yet: {', '.join(missing)}.\n")
        if blind := dict.fromkeys(r.column for r in rows if r.worst is None and r.attacks != "square"):
            parts.append(f"**Not measured yet against attackers who know the operator: {', '.join(blind)}.**\n")
        parts.append(_finding(number, rows) + "\n")
        if asked.row == "alpha" and len({row.row for row in rows}) > 3:
            (docs / f"paper-{number}.png").write_bytes(picture(_figure(number, rows)))
            parts.append(f"![Change of robust accuracy over alpha, table {number}](paper-{number}.png)\n")
        lines = _lines(number, rows)
        firsts = [not at or line[0] != lines[at - 1][0] for at, line in enumerate(lines)]
        lines = [line if first else ("", *line[1:]) for line, first in zip(lines, firsts, strict=True)]
        parts.append(table((HEADINGS[0], asked.row, *HEADINGS[2:]), lines, left=2) + "\n")
    text = Path(__file__).with_name("page.md").read_text()
    given = {"summary": _summary(measured), "tables": "\n".join(parts), "choice": _choice(results / "choice.csv")}
    (docs / "paper.md").write_text(text.format(sites=SITES, networks=len(NETWORKS), **given))


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
    return table((*heads, "paper: above", "below"), lines) + "\n"


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


def _choice(path: Path) -> str:
    """Return what choosing buys, on images of their own."""
    rows = read(path, choice.Row)
    if not rows:
        return "## What the choice of alpha buys\n\nNot measured yet: `python -m benchmarks.choice`."
    found = [row for row in rows if row.chosen and row.search != "base"]
    aim = any(row.worst_change >= 0.02 and row.worst_low > 0 and row.clean_change >= -0.003 for row in rows)
    heads = ("search", "setting", "chosen beyond noise", "selection: worst case", "test: clean", "own gradient")
    lines = []
    for row in rows:
        cells = [f"{100 * value:.1f}" for value in (row.clean, row.own, row.worst)]
        looked, selected = "", ""
        if row.search != "base":
            looked, selected = "yes" if row.chosen else "no, it looked best", points(row, "selection")
            changes = (f"{100 * row.clean_change:+.1f}", points(row, "own"), points(row, "worst"))
            cells = [f"{cell} {change}" for cell, change in zip(cells, changes, strict=True)]
        lines.append((row.search, row.setting, looked, selected, *cells))
    text = Path(__file__).with_name("choice.md").read_text().removesuffix("\n")
    return text.format(
        selection=max(row.selection_images for row in rows), attacked=rows[0].attacked, searches=len(rows) - 1,
        chosen=len(found), real=sum(row.worst_low > 0 for row in found), aim="reached" if aim else "missed",
        table=table((*heads, "worst case"), lines, left=3),
    )  # fmt: skip


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
