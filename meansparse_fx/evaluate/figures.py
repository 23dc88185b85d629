"""Floor 5: an evaluation as a figure. Knows matplotlib and results; runs no model and writes no file."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..plots import DASHED, LIGHT, Theme, legend, new_figure, percents, prepare
from .verdict import Evaluation


def evaluation_figure(evaluation: Evaluation, theme: Theme = LIGHT) -> Figure:
    """Return both models' accuracy under each attack, and beside it the change with its 95 % interval."""
    rows = evaluation.rows()
    figure = new_figure(theme, 7.2, 1.9 + 0.28 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.3, 1])
    places = range(len(rows))
    alpha = f"alpha {evaluation.alpha:g}" if isinstance(evaluation.alpha, float) else "MeanSparse, alphas by site"
    failed = f"; {len(evaluation.warnings)} of {len(evaluation.checks)} checks failed" if evaluation.warnings else ""
    prepare(left, theme, "Accuracy")
    prepare(right, theme, "Change in points, 95 % interval")
    style = {"linewidth": 0, "markersize": 6.5, "color": theme.accent}
    left.plot(
        [b for _, b, _, _ in rows], places, marker="s", **style | {"color": theme.ink, "mfc": "none"}, label="base"
    )
    left.plot([s for _, _, s, _ in rows], places, marker="o", **style, label=alpha)
    for place, (_, _, _, change) in enumerate(rows):
        around = [[change.estimate - change.low], [change.high - change.estimate]]
        right.errorbar(change.estimate, place, xerr=around, fmt="o", color=theme.accent, ms=5, lw=1.2, capsize=3)
    right.axvline(0, color=theme.ink, linewidth=0.9, linestyle=DASHED, zorder=1)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(percents())
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    left.set_yticks(list(places), [what for what, *_ in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}".replace("-", "\N{MINUS SIGN}")))
    rows_mean = "\neach row: what survives it and all rows above" if evaluation.cumulative else ""
    figure.suptitle(f"{evaluation.in_words()}{failed}{rows_mean}", x=0.01, ha="left", color=theme.muted, fontsize=10)
    legend(figure, theme, columns=2)
    return figure
