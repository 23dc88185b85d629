"""Floor 5: a search over alpha as figures. Knows matplotlib and results; runs no model and writes no file."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import plots
from ..evaluate.outcome import ModelOutcome, PairedDifference, mean
from ..plots import Theme
from .result import AlphaSearch

# Where robustness breaks down it falls by tens of points: what is further below the base stands at the edge.
SHOWN = 0.1
# Every run has its marker and every gradient its dashes, so that they can be told apart in grey print.
DASHES = {"exact": (0, (1, 1.2)), "identity": (0, (6, 2)), "annealed": (0, (3, 1.2)), "smooth": (0, (5, 1.5, 1, 1.5))}
MARKERS = "s^D<P>X*"


def alpha_figure(search: AlphaSearch, theme: Theme = plots.LIGHT) -> Figure:
    """Return clean accuracy, and below it accuracy under attack, over alpha.

    Bars are 95 % intervals of the paired change from the base, so the base has none. An alpha given up early was
    attacked on fewer images than the base: it is hollow, joined to nothing, and stands at the base's accuracy and the
    paired change.
    """
    base, outcomes = search.base, search.outcomes
    early = [alpha for alpha, outcome in outcomes.items() if len(outcome.worst) < len(base.worst)]
    finished = [alpha for alpha in outcomes if alpha not in early]
    clean = {alpha: mean(outcome.clean) for alpha, outcome in outcomes.items()}
    worst = {alpha: search.comparable(outcome) for alpha, outcome in outcomes.items()}
    lines = {name: {a: search.comparable(o, name) for a, o in outcomes.items()} for name in base.robust}
    lowest = worst[0.0] - SHOWN
    figure = plots.new_figure(theme, 7.2, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.7]})
    plots.prepare(top, theme)
    top.set_title(f"Clean accuracy, {len(base.clean):,} images", color=theme.ink, fontsize=10, loc="left", pad=18)
    plots.prepare(bottom, theme, f"Accuracy under attack, {len(base.worst):,} images{search.threat_in_words()}")
    bottom.set_xlabel("alpha: half width of the band, in standard deviations", color=theme.muted)
    rule = {"linewidth": 1.0, "zorder": 1.5}
    allowed = f"allowed: {100 * search.clean_budget:g} points less"
    top.axhline(clean[0.0], color=theme.ink, linestyle=plots.DASHED, label="base", **rule)
    top.axhline(clean[0.0] - search.clean_budget, color=theme.muted, linestyle=plots.DOTTED, label=allowed, **rule)
    bottom.axhline(worst[0.0], color=theme.ink, linestyle=plots.DASHED, **rule)
    clean_changes = {alpha: PairedDifference.of(base.clean, outcome.clean) for alpha, outcome in outcomes.items()}
    _points(top, list(outcomes), clean, clean_changes, color=theme.second, linewidth=2.0, label="clean, 95 % interval")
    for marker, (name, line) in zip(cycle(MARKERS), lines.items(), strict=False):
        mode = name.partition("/")[2]
        colour = {"exact": theme.second, "": theme.ink, "identity": theme.muted}.get(mode, theme.accent)
        style = {"color": colour, "marker": marker, "markersize": 4}
        dashes = DASHES.get(mode.partition("-")[0], "-")
        bottom.plot(finished, [line[a] for a in finished], linewidth=1.1, linestyle=dashes, label=name, **style)
        bottom.plot(early, [line[a] for a in early], linewidth=0, mfc=theme.paper, alpha=0.7, **style)
    shown = {alpha: max(height, lowest) for alpha, height in worst.items()}
    bottom.plot(finished, [shown[a] for a in finished], color=theme.accent, linewidth=2.2, zorder=3)
    changes = {alpha: search.change(outcome) for alpha, outcome in outcomes.items()}
    for alphas, label, fill in (
        (finished, "worst case, 95 % interval", theme.accent),
        (early, "worst case, given up early", theme.paper),
    ):
        inside = [alpha for alpha in alphas if worst[alpha] >= lowest]
        if inside:
            _points(bottom, inside, worst, changes, color=theme.accent, linewidth=0, mfc=fill, label=label)
        below = [alpha for alpha in alphas if alpha not in inside]
        bottom.plot(below, [lowest] * len(below), "v", ms=6, color=theme.accent, mfc=fill, zorder=4)
    bottom.set_ylim(*plots.limits(max(v, lowest) for line in (worst, *lines.values()) for v in line.values()))
    fallen = [((alpha, lowest), plots.percent(v, 0), theme.accent) for alpha, v in worst.items() if v < lowest]
    plots.annotate(figure, bottom, fallen)
    for axes, height, colour in ((top, clean, theme.second), (bottom, shown, theme.accent)):
        axes.axvline(search.uniform, color=theme.muted, linewidth=1.0, zorder=1)
        axes.plot(search.uniform, height[search.uniform], "o", ms=11, mfc="none", mec=colour, mew=1.5)
    top.annotate(
        f"chosen: alpha {search.uniform:g}", (search.uniform, 1), (0, 4), color=theme.ink, fontsize=plots.SMALL,
        xycoords=top.get_xaxis_transform(), textcoords="offset points", ha="center",
    )  # fmt: skip
    plots.legend(figure, theme)
    return figure


def _points(
    axes: Axes, alphas: list[float], heights: dict[float, float], changes: dict[float, PairedDifference], **style: Any
) -> None:
    """Draw points with the intervals of their changes; alpha 0, the base, has none."""
    around = [
        [abs(getattr(changes[alpha], end) - changes[alpha].estimate) if alpha else math.nan for alpha in alphas]
        for end in ("low", "high")
    ]
    places = [heights[alpha] for alpha in alphas]
    axes.errorbar(alphas, places, around, marker="o", markersize=6, elinewidth=1.0, capsize=2.5, zorder=4, **style)


def tradeoff_figure(search: AlphaSearch, theme: Theme = plots.LIGHT) -> Figure:
    """Return clean accuracy against the worst case, one point an alpha, the choice marked, the base as a cross.

    Hollow points were given up early; accuracies as in `alpha_figure`.
    """
    figure = plots.new_figure(theme, 7.2, 5.0)
    axes = figure.subplots()
    plots.prepare(axes, theme, f"Worst case under attack, {len(search.base.worst):,} images{search.threat_in_words()}")
    axes.xaxis.set_major_formatter(plots.percents())
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    base = _place(search, search.base)
    floor, uniform = base[1] - SHOWN, isinstance(search.alpha, float)
    colours = dict(zip((search.variant, *search.others), (theme.accent, theme.second, theme.muted), strict=False))
    labels: dict[tuple[float, float], list[str]] = {base: ["base" if search.uniform else "base, chosen"]}
    for variant, alpha, outcome in search.rows():
        if not alpha:
            continue
        clean, worst = _place(search, outcome)
        shown = (clean, max(worst, floor))
        full = len(outcome.worst) == len(search.base.worst)
        axes.plot(*shown, "o" if worst >= floor else "v", markersize=6, color=colours[variant],
                  mfc=colours[variant] if full else "none")  # fmt: skip
        label = f"{alpha:g}" if variant == search.variant else f"{variant} {alpha:g}"
        label += f" \N{DOWNWARDS ARROW} {plots.percent(worst, 0)}" if worst < floor else ""
        if (alpha, variant) == (search.uniform, search.variant):
            axes.plot(*shown, "o", markersize=13, mfc="none", mec=theme.ink, mew=1.4)
            label += ", chosen" if uniform else ", best for all"
        labels.setdefault(shown, []).append(label)
    if not uniform and search.refinement is not None:
        place = _place(search, search.refinement.outcome)
        axes.plot(*place, "D", markersize=7, color=theme.ink)
        labels.setdefault(place, []).append("by site")
    axes.plot(*base, "x", markersize=10, mew=2.2, color=theme.ink)
    allowed = base[0] - search.clean_budget
    axes.axvline(allowed, color=theme.muted, linewidth=0.9, linestyle=plots.DOTTED, zorder=1)
    axes.annotate(
        "clean budget", (allowed, 0), (4, 5), color=theme.muted, fontsize=plots.SMALL,
        xycoords=axes.get_xaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    axes.axhline(base[1], color=theme.ink, linewidth=0.9, linestyle=plots.DASHED, zorder=1)
    axes.set_ylim(*plots.limits(worst for _, worst in labels))
    axes.set_xlim(*plots.limits(max(clean, base[0] - 0.05) for clean, _ in labels))
    axes.set_xlabel("clean accuracy; numbers at the points are alpha, hollow ones met fewer images", color=theme.muted)
    plots.annotate(figure, axes, [(place, ", ".join(words), theme.ink) for place, words in labels.items()])
    return figure


def _place(search: AlphaSearch, outcome: ModelOutcome) -> tuple[float, float]:
    return mean(outcome.clean), search.comparable(outcome)
