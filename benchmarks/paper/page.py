"""docs/paper.md and its plots, from the result files: our numbers beside the paper's, with the same sign or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from meansparse_fx.plots import LIGHT, picture, prepare

from .. import choice
from ..harness import points, read
from .measure import Row
from .published import change
from .tables import NETWORKS, TABLES

OPENING = """\
# The paper's experiments, in small

Tables 1 to 12 of the MeanSparse paper, on Fashion-MNIST and a network of {sites} activations instead of CIFAR-10 and
ResNet-18, and each with what the paper lacks: attackers who know the operator and take a surrogate of its gradient.
Written by `python -m benchmarks.paper page` from the files `benchmarks/results/paper-TABLE.csv`, which
`python -m benchmarks.paper all` measures: it trains {networks} networks (three epochs each, adversarial ones against
Linf eps 0.1; the recipes are in `benchmarks/paper/tables.py`), calibrates each on 60,000 images, and attacks test
images that neither training nor calibration saw. No alpha is chosen here, every one is shown; the choice, on images of
its own, is `select_alpha`'s.

How to read it. *own*: robust accuracy under attacks by the operator's own gradient, as in the paper. *worst*: after
attackers who know, on what was left: APGD-CE through the identity, then APGD on the margin and APGD-CE through a gate
that narrows down to the band during the attack (see [robustness.md](robustness.md)). *change*: against the base, which
met the same attacks as often (it has no operator, so for it all gradients are one), in points with a 95 % interval over
images. A change is *beyond noise* if its interval leaves out 0. "APGD" is APGD-CE and APGD-DLR of 30 steps each. Where
*worst* is empty, no such attacker has been run yet: what is said of the own gradient is then no measure of robustness.

## All tables in one

The number of settings, alpha 0 left out, where robust accuracy is above the base's, and where it is below; in brackets
those beyond noise.
"""

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
_TREND = ("alpha",)  # tables whose rows are alphas have a plot over them


def write_page(results: Path, docs: Path) -> None:
    """Write paper.md and paper-TABLE.png into ``docs``, from the files in ``results``; missing tables are said."""
    measured = {number: read(path, Row) for number in TABLES if (path := results / f"paper-{number}.csv").exists()}
    parts = [OPENING.format(sites=7, networks=len(NETWORKS)), _summary(measured)]
    for number, table in TABLES.items():
        parts.append(f"## Table {number}: {table.title}\n")
        if number in NOTES:
            parts.append(NOTES[number] + "\n")
        if number not in measured:
            parts.append(f"Not measured yet: `python -m benchmarks.paper {number}`.\n")
            continue
        rows = measured[number]
        if missing := [column for column in table.columns if column not in {row.column for row in rows}]:
            parts.append(f"Not measured yet: {', '.join(missing)}.\n")
        if blind := dict.fromkeys(r.column for r in rows if r.worst is None and r.attacks != "square"):
            parts.append(f"**Not measured yet against attackers who know the operator: {', '.join(blind)}.**\n")
        parts.append(_finding(number, rows) + "\n")
        if table.row in _TREND and len({row.row for row in rows}) > 3:
            (docs / f"paper-{number}.png").write_bytes(picture(_figure(number, rows)))
            parts.append(f"![Change of robust accuracy over alpha, table {number}](paper-{number}.png)\n")
        parts.append(_markdown(number, rows))
    if (path := results / "choice.csv").exists():
        parts.append(_choice(read(path, choice.Row)))
    else:
        parts.append("## What the choice of alpha buys\n\nNot measured yet: `python -m benchmarks.choice`.\n")
    (docs / "paper.md").write_text("\n".join(parts))


def print_table(number: int, rows: Sequence[Row]) -> None:
    """Print one table as measured, the paper's change beside it."""
    table = RichTable(title=f"Table {number}: {TABLES[number].title}; {_images(rows)}")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for line in _lines(number, rows):
        table.add_row(*line)
    Console(width=140).print(table)


HEADINGS = ("column", "row", "clean", "own", "change", "worst", "change", "paper")


def _lines(number: int, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for row in rows:
        base, paper = not row.alpha, change(number, row.column, row.row)
        lines.append(
            (
                row.column,
                row.row,
                f"{100 * row.clean:.1f}",
                f"{100 * row.own:.1f}",
                "" if base else points(row.own_change, row.own_low, row.own_high),
                "" if row.worst is None else f"{100 * row.worst:.1f}",
                "" if base or row.worst is None else points(row.worst_change, row.worst_low, row.worst_high),  # type: ignore[arg-type]
                "" if base or paper is None else f"{100 * paper:+.1f}",
            )
        )
    return lines


def _markdown(number: int, rows: Sequence[Row]) -> str:
    headings = (HEADINGS[0], TABLES[number].row, *HEADINGS[2:])
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    previous = ""
    for column, *rest in _lines(number, rows):
        lines.append("| " + " | ".join(("" if column == previous else column, *rest)) + " |")
        previous = column
    return "\n".join(lines) + "\n"


def _images(rows: Sequence[Row]) -> str:
    return f"clean on {rows[0].images:,} images, attacks on {rows[0].attacked:,}"


def _counts(rows: Sequence[Row], which: str) -> tuple[int, int, int, int]:
    """Return how many changes are above 0, above beyond noise, below 0, below beyond noise."""
    found = [
        (getattr(r, f"{which}_change"), getattr(r, f"{which}_low"), getattr(r, f"{which}_high"))
        for r in rows
        if r.alpha and getattr(r, which) is not None
    ]
    return (
        sum(c > 0 for c, _, _ in found),
        sum(low > 0 for _, low, _ in found),
        sum(c < 0 for c, _, _ in found),
        sum(high < 0 for _, _, high in found),
    )


def _summary(measured: dict[int, list[Row]]) -> str:
    lines = [
        "| table | settings | own gradient: above | below | those who know: above | below | paper: above | below |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for number, rows in measured.items():
        own, worst = _counts(rows, "own"), _counts(rows, "worst")
        paper = [p for r in rows if r.alpha and (p := change(number, r.column, r.row)) is not None]
        lines.append(
            f"| {number}: {TABLES[number].title} | {sum(bool(r.alpha) for r in rows)} "
            f"| {own[0]} ({own[1]}) | {own[2]} ({own[3]}) "
            + (
                f"| {worst[0]} ({worst[1]}) | {worst[2]} ({worst[3]}) "
                if any(r.worst is not None for r in rows)
                else "| | "
            )
            + (f"| {sum(p > 0 for p in paper)} | {sum(p < 0 for p in paper)} |" if paper else "| | |")
        )
    return "\n".join(lines) + "\n"


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


def _choice(rows: Sequence[choice.Row]) -> str:
    """Return what choosing buys, on images of their own."""
    chosen = [row for row in rows if row.chosen and row.search != "base"]
    real = [row for row in chosen if row.worst_low > 0]
    aim = any(row.worst_change >= 0.02 and row.worst_low > 0 and row.clean_change >= -0.003 for row in rows)
    lines = [
        "## What the choice of alpha buys\n",
        f"Not in the paper: the bundled network, alpha chosen on {max(row.selection_images for row in rows):,} "
        "selection images under attacks of 30 steps, by the operator's own gradient and by those who know, then "
        f"judged on {rows[0].attacked:,} test images that nothing else saw, by `evaluate`'s attacks (100 steps, "
        "3 targets, 1,000 queries). `python -m benchmarks.choice` measures it. "
        f"Of {len(rows) - 1} searches {len(chosen)} chose something beyond noise, and {len(real)} of these "
        "are better than the base beyond noise on the test images. The aim, 2 points of worst case for at most 0.3 of "
        f"clean accuracy, is {'reached' if aim else 'missed'}.\n",
        "| search | setting | chosen beyond noise | selection: worst case | test: clean | own gradient | worst case |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = row.search == "base"
        changes = [
            "" if base else " " + points(*(getattr(row, f"{which}_{end}") for end in ("change", "low", "high")))
            for which in ("selection", "own", "worst")
        ]
        clean = f"{100 * row.clean:.1f}" + ("" if base else f" {100 * row.clean_change:+.1f}")
        lines.append(
            f"| {row.search} | {row.setting} | {'' if base else 'yes' if row.chosen else 'no, it looked best'} "
            f"|{changes[0]} | {clean} | {100 * row.own:.1f}{changes[1]} | {100 * row.worst:.1f}{changes[2]} |"
        )
    return "\n".join(lines) + "\n"


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
