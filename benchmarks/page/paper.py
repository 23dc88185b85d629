"""What the template of docs/paper.md calls and draws: our numbers beside the paper's."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from meansparse_fx.plots import LIGHT, new_figure, prepare

from ..harness import ROOT, Row, read
from ..paper.tables import TABLES
from .markdown import points, table
from .results import Results

# The paper's robust accuracy in percent where a cell here has a counterpart there, by table, column and row: CIFAR-10,
# ResNet-18 with GELU and eps 8/255 beside Fashion-MNIST, the bundled network's kind and eps 0.1. The page's notes say
# what else stands beside what.
_PUBLISHED = read(ROOT / "benchmarks/paper/published.csv")
PUBLISHED = {(found.table, found.column, found.row): found.robust for found in _PUBLISHED}


def change(table: int, column: str, row: str) -> float | None:
    """Return by how much the paper's robust accuracy differs from its base's, as a fraction; None without counterpart.

    In tables 7 and 9 the base is a column; in the others it is a row.
    """
    own = PUBLISHED.get((table, column, row))
    base = PUBLISHED.get((table, "base", row) if table in (7, 9) else (table, column, "base"))
    return None if own is None or base is None else (own - base) / 100


def lines(number: int, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a table's rows as cells."""
    found = []
    for row in rows:
        own, worst = f"{100 * row.own:.1f}", "" if row.worst is None else f"{100 * row.worst:.1f}"
        paper = change(number, row.column, row.row) if row.alpha else None
        changes = [points(row, which) if row.alpha else "" for which in ("own", "worst")]
        theirs = "" if paper is None else f"{100 * paper:+.1f}"
        found.append((row.column, row.row, f"{100 * row.clean:.1f}", own, changes[0], worst, changes[1], theirs))
    return found


def summary(measured: dict[int, list[Row]]) -> str:
    """Return all tables in one: how many settings are above and below the base, and how many of them beyond noise."""
    found = []
    for number, rows in measured.items():
        rows = [row for row in rows if row.alpha]
        cells = [f"{number}: {TABLES[number].title}", str(len(rows))]
        for which in ("own", "worst"):
            known = [row for row in rows if which in row]
            for sign, beyond in ((1, "low"), (-1, "high")):
                counts = [sum(sign * row[f"{which}_{end}"] > 0 for row in known) for end in ("change", beyond)]
                cells.append(f"{counts[0]} ({counts[1]})" if known else "")
        paper = [p for r in rows if (p := change(number, r.column, r.row)) is not None]
        cells += [str(sum(p > 0 for p in paper)), str(sum(p < 0 for p in paper))] if paper else ["", ""]
        found.append(cells)
    heads = ("table", "settings", "own gradient: above", "below", "those who know: above", "below")
    return table((*heads, "paper: above", "below"), found)


def finding(number: int, rows: Sequence[Row]) -> str:
    """Return in words whether the changes have the paper's sign."""
    pairs = [(r, p) for r in rows if r.alpha and (p := change(number, r.column, r.row))]
    words = [f"Clean on {rows[0].images:,} images, attacks on {rows[0].attacked:,};"]
    words += [f"{rows[0].norm} eps {rows[0].eps:g} where nothing else is said."]
    for which, name in (("own", "Under its own gradient"), ("worst", "Against those who know")):
        compared = [(r[f"{which}_change"], p) for r, p in pairs if which in r]
        if compared:
            same = sum(c * p > 0 for c, p in compared)
            words.append(f"{name} the change has the paper's sign in {same} of {len(compared)} settings.")
    return " ".join(words)


def drawn(results: Results) -> dict[int, list[Row]]:
    """Return the tables that have a plot: those over enough alphas."""
    over_alpha = {number: rows for number, rows in results.paper.items() if TABLES[number].row == "alpha"}
    return {number: rows for number, rows in over_alpha.items() if len({row.row for row in rows}) > 3}


def figure_of(number: int, rows: Sequence[Row]) -> Figure:
    """Return the change over alpha, a panel a column: own gradient, attackers who know, and the paper's."""
    columns = list(dict.fromkeys(row.column for row in rows))
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = new_figure(LIGHT, 2.6 * across + 0.6, 2.2 * down + 0.5)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, column in zip(panels, columns, strict=False):
        own = [row for row in rows if row.column == column]
        prepare(axes, LIGHT, column)
        axes.axhline(0, color=LIGHT.muted, linewidth=0.8)
        alphas = [row.alpha for row in own]
        paper = [(row.alpha, p) for row in own if (p := change(number, column, row.row)) is not None]
        axes.plot(*zip(*paper, strict=True), color=LIGHT.muted, linestyle=(0, (4, 3)), linewidth=1.2, label="paper")
        axes.plot(alphas, [row.own_change for row in own], color=LIGHT.accent, linewidth=1.8, label="own gradient")
        if all("worst" in row for row in own):
            low, high = ([row[f"worst_{end}"] for row in own] for end in ("low", "high"))
            axes.fill_between(alphas, low, high, color=LIGHT.second, alpha=0.15, linewidth=0)
            worst = [row.worst_change for row in own]
            axes.plot(alphas, worst, color=LIGHT.second, linewidth=1.8, label="attackers who know")
        axes.set_xticks(alphas)
    for axes in list(panels)[len(columns) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
