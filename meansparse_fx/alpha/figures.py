"""Floor 5: a search over alpha as figures. Knows matplotlib and results; runs no model and writes no file."""

from __future__ import annotations

from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..evaluate.outcome import ModelOutcome, PairedDifference
from ..plots import (
    DASHED,
    DOTTED,
    LIGHT,
    SMALL,
    Theme,
    annotate,
    legend,
    limits,
    new_figure,
    percent,
    percents,
    prepare,
)  # fmt: skip
from .result import AlphaSearch

# Where robustness breaks down it falls by tens of points: what is further below the base stands at the edge.
SHOWN = 0.1
# Every run has its marker and every gradient its dashes, so that they can be told apart in grey print.
DASHES = {"exact": (0, (1, 1.2)), "identity": (0, (6, 2)), "annealed": (0, (3, 1.2)), "smooth": (0, (5, 1.5, 1, 1.5))}
MARKERS = "s^D<P>X*"


def alpha_figure(search: AlphaSearch, theme: Theme = LIGHT) -> Figure:
    """Return clean accuracy, and below it accuracy under attack, over alpha.

    Bars are 95 % intervals of the paired change from the base, so the base has none. An alpha given up early was
    attacked on fewer images than the base: it is hollow, joined to nothing, and stands at the base's accuracy and the
    paired change.
    """
    base, alphas = search.base, list(search.outcomes)
    finished = [alpha for alpha, o in search.outcomes.items() if len(o.worst) == len(base.worst)]
    clean = {alpha: o.to_dict()["clean"] for alpha, o in search.outcomes.items()}
    worst = {alpha: search.comparable(o) for alpha, o in search.outcomes.items()}
    allowed, lowest = clean[0.0] - search.clean_budget, worst[0.0] - SHOWN
    figure = new_figure(theme, 7.2, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.7]})
    prepare(top, theme, f"Clean accuracy, {len(base.clean):,} images")
    attacked = f"Accuracy under attack, {len(base.worst):,} images{search.threat_in_words()}"
    prepare(bottom, theme, attacked)
    for axes in (top, bottom):
        axes.axvline(search.uniform, color=theme.muted, linewidth=1.0, zorder=1)
    top.axhline(clean[0.0], color=theme.ink, linewidth=1.0, linestyle=DASHED, label="base", zorder=1.5)
    top.axhline(allowed, color=theme.muted, linewidth=1.0, linestyle=DOTTED, zorder=1.5,
                label=f"allowed: {100 * search.clean_budget:g} points less")  # fmt: skip
    top.plot(
        alphas,
        list(clean.values()),
        color=theme.second,
        linewidth=2.0,
        marker="o",
        markersize=4.5,
        label="clean, 95 % interval",
    )
    _bars(
        top, theme.second, {a: (clean[a], PairedDifference.of(base.clean, o.clean)) for a, o in search.outcomes.items()}
    )
    bottom.axhline(worst[0.0], color=theme.ink, linewidth=1.0, linestyle=DASHED, zorder=1.5)
    lines = {name: {a: search.comparable(o, name) for a, o in search.outcomes.items()} for name in base.robust}
    for marker, (name, line) in zip(cycle(MARKERS), lines.items(), strict=False):
        mode = name.partition("/")[2]
        colour = {"exact": theme.second, "": theme.ink, "identity": theme.muted}.get(mode, theme.accent)
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.1}
        bottom.plot(
            finished,
            [line[a] for a in finished],
            linestyle=DASHES.get(mode.partition("-")[0], "-"),
            label=name,
            **style,
        )
        early = [a for a in alphas if a not in finished]
        bottom.plot(early, [line[a] for a in early], **style | {"linewidth": 0, "mfc": theme.paper, "alpha": 0.7})
    bottom.plot(finished, [worst[a] for a in finished], color=theme.accent, linewidth=2.2, zorder=3)
    _bars(
        bottom,
        theme.accent,
        {a: (worst[a], search.change(o)) for a, o in search.outcomes.items() if worst[a] >= lowest},
    )
    for alpha, height in worst.items():
        fill = theme.accent if alpha in finished else theme.paper
        mark = "o" if height >= lowest else "v"
        bottom.plot(alpha, max(height, lowest), mark, ms=6, color=theme.accent, mfc=fill, zorder=4, clip_on=False)
    low, high = limits(max(v, lowest) for line in (worst, *lines.values()) for v in line.values())
    bottom.set_ylim(low, high)
    annotate(bottom, [((a, lowest), percent(v, 0), theme.accent) for a, v in worst.items() if v < lowest])
    for axes, height, colour in (
        (top, clean[search.uniform], theme.second),
        (bottom, worst[search.uniform], theme.accent),
    ):
        axes.plot(
            search.uniform,
            max(height, lowest) if axes is bottom else height,
            "o",
            ms=11,
            mfc="none",
            mec=colour,
            mew=1.5,
        )
    top.annotate(
        f"chosen: alpha {search.uniform:g}", (search.uniform, 1), (0, 4), color=theme.ink, fontsize=SMALL,
        ha="right" if search.uniform == alphas[-1] else "left" if search.uniform == 0 else "center",
        xycoords=top.get_xaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    top.set_title(top.get_title("left"), color=theme.ink, fontsize=10, loc="left", pad=18)
    bottom.set_xlabel("alpha: half width of the band, in standard deviations", color=theme.muted)
    shared = {"color": theme.accent, "marker": "o", "markersize": 6}
    handles = [
        *top.get_legend_handles_labels()[0],
        Line2D([], [], linewidth=2.2, label="worst case, 95 % interval", **shared),
    ]
    handles += bottom.get_legend_handles_labels()[0]
    if len(finished) < len(alphas):
        handles.append(Line2D([], [], linewidth=0, mfc=theme.paper, label="given up early, fewer images", **shared))
    legend(figure, theme, handles)
    return figure


def _bars(axes: Axes, colour: str, places: dict[float, tuple[float, PairedDifference]]) -> None:
    for alpha, (height, change) in places.items():
        if alpha:
            around = [[change.estimate - change.low], [change.high - change.estimate]]
            axes.errorbar(alpha, height, around, color=colour, linewidth=1.0, capsize=2.5, zorder=2.5)


def tradeoff_figure(search: AlphaSearch, theme: Theme = LIGHT) -> Figure:
    """Return clean accuracy against the worst case, one point an alpha, the choice marked, the base as a cross.

    Hollow points were given up early; accuracies as in `alpha_figure`.
    """
    figure = new_figure(theme, 7.2, 5.0)
    axes = figure.subplots()
    prepare(axes, theme, f"Worst case under attack, {len(search.base.worst):,} images{search.threat_in_words()}")
    axes.xaxis.set_major_formatter(percents())
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
        label += f" \N{DOWNWARDS ARROW} {percent(worst, 0)}" if worst < floor else ""
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
    axes.axvline(allowed, color=theme.muted, linewidth=0.9, linestyle=DOTTED, zorder=1)
    axes.annotate(
        "clean budget", (allowed, 0), (4, 5), color=theme.muted, fontsize=SMALL, xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
    )  # fmt: skip
    axes.axhline(base[1], color=theme.ink, linewidth=0.9, linestyle=DASHED, zorder=1)
    axes.set_ylim(*limits(worst for _, worst in labels))
    axes.set_xlim(*limits(max(clean, base[0] - 0.05) for clean, _ in labels))
    axes.set_xlabel("clean accuracy; numbers at the points are alpha, hollow ones met fewer images", color=theme.muted)
    annotate(axes, [(place, ", ".join(words), theme.ink) for place, words in labels.items()])  # some lie upon others
    return figure


def _place(search: AlphaSearch, outcome: ModelOutcome) -> tuple[float, float]:
    return outcome.to_dict()["clean"], search.comparable(outcome)
