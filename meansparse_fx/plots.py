"""Floor 5: the figures of the report. Knows matplotlib and results; runs no model and writes no file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .alpha import AlphaSearch
from .histogram import FeatureHistogram

DPI = 200


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one figure."""

    paper: str
    ink: str
    muted: str
    grid: str
    accent: str
    second: str


LIGHT = Theme("#ffffff", "#1c1e21", "#656b73", "#e4e6e9", "#c2410c", "#1d5fa8")
DARK = Theme("#15171b", "#e9eaec", "#9ba2ab", "#2d3138", "#ff8f57", "#74b4ff")


def alpha_figure(search: AlphaSearch, theme: Theme = LIGHT) -> Figure:
    """Return clean accuracy, and below it accuracy under attack, over alpha.

    Where an alpha was attacked on fewer images than the base, its accuracy is the base's and the paired change.
    """
    alphas = list(search.outcomes)
    clean = [o.to_dict()["clean"] for o in search.outcomes.values()]
    worst = [search.comparable(o) for o in search.outcomes.values()]
    attacks = {name: [search.comparable(o, name) for o in search.outcomes.values()] for name in search.base.robust}
    floor = clean[0] - search.clean_budget
    # Where robustness breaks down it falls by tens of points: such lines leave the axes, the rest stays readable.
    lowest = worst[0] - 0.1
    attacked = [v for line in (worst, *attacks.values()) for v in line]
    limits = [_limits([*clean, floor]), _limits([max(v, lowest) for v in attacked])]
    heights = [high - low for low, high in limits]
    figure = _figure(theme, 7.2, 5.6, right=0.75)
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [max(heights[0], 0.35 * heights[1]), heights[1]]}
    )
    for axes, low_high in zip((top, bottom), limits, strict=True):
        prepare(axes, theme)
        axes.set_ylim(*low_high)
        axes.axvline(search.uniform, color=theme.muted, linewidth=1.0, zorder=1)
    top.axhline(clean[0], color=theme.ink, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1.5)
    top.axhline(floor, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1.5)
    top.plot(alphas, clean, color=theme.second, linewidth=2.2, marker="o", markersize=4.5)
    bottom.axhline(worst[0], color=theme.ink, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1.5)
    for line in attacks.values():
        bottom.plot(alphas, line, color=theme.accent, linewidth=0.9, alpha=0.65)
    bottom.plot(alphas, worst, color=theme.accent, linewidth=2.4, marker="o", markersize=4.5)
    chosen = alphas.index(search.uniform)
    for axes, values, colour in ((top, clean, theme.second), (bottom, worst, theme.accent)):
        axes.plot([search.uniform], [values[chosen]], "o", markersize=11, mfc="none", mec=colour, mew=1.6)
    top.annotate(
        f"chosen: alpha {search.uniform:g}", (search.uniform, 1), (0, 4), color=theme.ink, fontsize=9, ha="center",
        xycoords=top.get_xaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    _label_ends(
        top,
        [
            (clean[-1], "clean", theme.second, True),
            (clean[0], f"base {percent(clean[0])}", theme.ink, False),
            (floor, f"allowed: {100 * search.clean_budget:g} less", theme.muted, False),
        ],
    )
    _label_ends(
        bottom,
        [
            (worst[-1], "worst case", theme.accent, True),
            (worst[0], f"base {percent(worst[0])}", theme.ink, False),
            *((line[-1], name, theme.accent, False) for name, line in attacks.items()),
        ],
    )
    top.set_title("Clean accuracy", color=theme.ink, fontsize=10, loc="left", pad=18)
    bottom.set_title("Accuracy under attack", color=theme.ink, fontsize=10, loc="left")
    bottom.set_xlabel("alpha: half width of the band, in standard deviations", color=theme.muted)
    return figure


def tradeoff_figure(search: AlphaSearch, theme: Theme = LIGHT) -> Figure:
    """Return clean accuracy against the worst case, one point an alpha, the choice marked, the base as a cross.

    Hollow points were given up early; accuracies as in `alpha_figure`.
    """
    figure = _figure(theme, 7.2, 5.0, right=0.97)
    axes = figure.subplots()
    prepare(axes, theme)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    base, *places = (
        (outcome.to_dict()["clean"], search.comparable(outcome))
        for outcome in (search.base, *(outcome for _, _, outcome in search.rows()))
    )
    if not isinstance(search.alpha, float) and search.refinement is not None:
        by_site = (search.refinement.outcome.to_dict()["clean"], search.comparable(search.refinement.outcome))
        places.append(by_site)
        axes.plot(*([v] for v in by_site), "D", markersize=7, color=theme.ink)
        _note(axes, by_site, "by site", theme.ink)
    # Where robustness breaks down it falls by tens of points: such alphas stand at the edge, the rest stays readable.
    floor = base[1] - 0.1
    colours = dict(zip((search.variant, *search.others), (theme.accent, theme.second, theme.muted), strict=False))
    labels: dict[tuple[float, float], list[str]] = {}
    for (variant, alpha, outcome), (clean, worst) in zip(search.rows(), places, strict=False):
        if not alpha:
            continue
        colour, shown = colours[variant], (clean, max(worst, floor))
        full = len(outcome.worst) == len(search.base.worst)
        axes.plot(
            *([v] for v in shown), "o" if worst >= floor else "v", markersize=6, color=colour,
            mfc=colour if full else "none",
        )  # fmt: skip
        left = f" \N{DOWNWARDS ARROW} {percent(worst, 0)}" if worst < floor else ""
        label = f"{alpha:g}" if variant == search.variant else f"{variant} {alpha:g}"
        labels.setdefault(shown, []).append(label + left)
        if (alpha, variant) == (search.uniform, search.variant):
            axes.plot(*([v] for v in shown), "o", markersize=13, mfc="none", mec=theme.ink, mew=1.4)
            _note(axes, shown, "chosen" if isinstance(search.alpha, float) else "best for all", theme.ink, below=True)
    for place, words in labels.items():  # points may lie upon one another
        _note(axes, place, ", ".join(words), theme.accent if not search.others else theme.ink)
    axes.plot(*([v] for v in base), "x", markersize=10, mew=2.2, color=theme.ink)
    _note(axes, base, "base" if search.uniform else "base, chosen", theme.ink, below=True)
    allowed = base[0] - search.clean_budget
    axes.axvline(allowed, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1)
    axes.annotate(
        "clean budget", (allowed, 0), (4, 5), color=theme.muted, fontsize=9, xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
    )  # fmt: skip
    axes.axhline(base[1], color=theme.ink, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
    axes.set_ylim(*_limits([max(worst, floor) for _, worst in places]))
    axes.set_xlim(*_limits([max(clean, base[0] - 0.05) for clean, _ in places]))
    axes.set_title("Worst case under attack", color=theme.ink, fontsize=10, loc="left")
    axes.set_xlabel("clean accuracy; numbers at the points are alpha", color=theme.muted)
    return figure


def _note(axes: Axes, place: tuple[float, float], text: str, colour: str, below: bool = False) -> None:
    offset = (8, -13 if below else 5)
    axes.annotate(text, place, offset, color=colour, fontsize=9, textcoords="offset points")


def histogram_figure(histogram: FeatureHistogram, theme: Theme = LIGHT) -> Figure:
    """Return one channel's feature histogram before and after the operator, band and mean marked."""
    figure = _figure(theme, 7.2, 4.8, right=0.97)
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    ceiling = 1.25 * histogram.before.max()
    for axes, heights, title in ((top, histogram.before, "Before"), (bottom, histogram.after, "After")):
        prepare(axes, theme)
        if histogram.threshold >= 0:
            axes.axvspan(
                histogram.mean - histogram.threshold,
                histogram.mean + histogram.threshold,
                color=theme.accent,
                alpha=0.14,
                lw=0,
            )
        axes.stairs(heights, histogram.edges, fill=True, color=theme.second, alpha=0.85)
        axes.axvline(histogram.mean, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(0, ceiling)
        axes.set_title(f"{title} the operator, share of all values", color=theme.ink, fontsize=10, loc="left")
    right = (histogram.edges[0] + histogram.edges[-1]) / 2 > histogram.mean
    offset, side = (8, "left") if right else (-8, "right")

    def note(axes: Axes, height: float, text: str, colour: str) -> None:
        at = histogram.mean + (1 if right else -1) * max(histogram.threshold, 0)
        axes.annotate(
            text, (at, height), (offset, 0), color=colour, fontsize=9, ha=side, va="top",
            xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        )  # fmt: skip

    if histogram.threshold >= 0:
        note(
            top,
            0.95,
            f"the band: {histogram.mean:.2f} ± {histogram.threshold:.2f}".replace("-", "\N{MINUS SIGN}"),
            theme.accent,
        )
        note(
            bottom,
            0.95,
            f"{percent(histogram.share, 0)} of all values are now the mean:\none bar, cut off here",
            theme.ink,
        )
    else:
        note(top, 0.95, "alpha = 0: no band, the operator is off", theme.accent)
    bottom.set_xlabel(f"feature value, {histogram.site}, channel {histogram.channel}", color=theme.muted)
    return figure


def percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _figure(theme: Theme, width: float, height: float, right: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)
    figure.subplots_adjust(left=0.09, right=right, bottom=0.11, top=0.91, hspace=0.25)
    return figure


def prepare(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return an axis around ``values``, at least two points high."""
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), (0.02 - (high - low)) / 2, 0.003)
    return low - pad, high + pad


def _label_ends(axes: Axes, labels: list[tuple[float, str, str, bool]]) -> None:
    """Write (height, text, colour, bold) to the right of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 11 * DPI / 72 / axes.bbox.height  # a line of text of 11 points, as a share of the axes
    labels = sorted(labels)
    places: list[float] = []
    for height, *_ in labels:
        wanted = max((height - low) / (high - low), 0.03)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    for place, (height, text, colour, bold) in zip(places, labels, strict=True):
        left_the_axes = f" \N{DOWNWARDS ARROW} {percent(height, 0)}" if height < low else ""
        axes.annotate(
            text + left_the_axes, (1, place), (6, 0), color=colour, fontsize=9, va="center",
            fontweight="bold" if bold else "normal", xycoords="axes fraction", textcoords="offset points",
        )  # fmt: skip
