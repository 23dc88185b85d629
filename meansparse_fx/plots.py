"""Floor 1: what all figures share, and one channel's histogram. Knows matplotlib; writes no file.

Every figure is a matplotlib `Figure` of its own, without pyplot: ``figure.savefig("x.pdf")``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

DPI = 200
DASHED, DOTTED = (0, (5, 4)), (0, (1, 2.5))
LARGEST, SMALL = 10, 9  # points of text


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


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches, that makes room for what stands around its axes."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper, layout="constrained")


def prepare(axes: Axes, theme: Theme, title: str = "") -> None:
    """Give axes the house's look: a grid, shares as percent on the y axis, and a title."""
    axes.set_facecolor(theme.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=SMALL, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(percents())
    if title:
        axes.set_title(title, color=theme.ink, fontsize=LARGEST, loc="left")


def percents() -> FuncFormatter:
    """Return the formatter of an axis of shares."""
    return FuncFormatter(lambda value, _: f"{100 * value:g} %".replace("-", "\N{MINUS SIGN}"))


def percent(share: float, decimals: int = 1) -> str:
    """Return a share in percent."""
    return f"{100 * share:.{decimals}f} %"


def picture(figure: Figure, form: str = "png") -> bytes:
    """Return a figure as the contents of a file: png, pdf, svg, ...; equal figures are equal bytes."""
    buffer = io.BytesIO()
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    # Publishers refuse fonts of type 3, matplotlib's default.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "meansparse_fx"}):
        figure.savefig(buffer, format=form, metadata=dates.get(form))
    return buffer.getvalue()


def limits(values: Iterable[float]) -> tuple[float, float]:
    """Return an axis around ``values``, at least two points high."""
    low, high = min(values := list(values)), max(values)
    pad = max(0.12 * (high - low), (0.02 - (high - low)) / 2, 0.003)
    return low - pad, high + pad


def legend(figure: Figure, theme: Theme, columns: int = 3) -> None:
    """Put the legend of all axes below them."""
    handles = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL, handlelength=3.2,
        labelcolor=theme.ink,
    )  # fmt: skip


def annotate(figure: Figure, axes: Axes, notes: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Write (place, text, colour) beside their places, each where it covers neither another text nor another place."""
    figure.draw_without_rendering()  # lays the axes out
    points = [axes.transData.transform(place) for place, _, _ in notes]
    taken: list[Any] = []
    for place, text, colour in notes:
        tried: list[tuple[int, Any, Any]] = []
        for right, up in ((r, sign * far) for far in (1, 2.6) for r in (1, -1, 0) for sign in (1, -1)):
            note = axes.annotate(
                text, place, (7 * right, 7 * up), color=colour, fontsize=SMALL, textcoords="offset points",
                ha=("right", "center", "left")[right + 1], va="bottom" if up > 0 else "top",
            )  # fmt: skip
            box = note.get_window_extent()
            covered = sum(box.overlaps(other) for other in taken) + sum(box.contains(*point) for point in points)
            outside = not all(axes.bbox.contains(x, y) for x, y in (box.min, box.max))
            tried.append((covered + outside, note, box))
        _, best, box = min(tried, key=lambda one: one[0])
        taken.append(box)
        for _, note, _ in tried:
            if note is not best:
                note.remove()


def histogram_figure(histogram: Any, theme: Theme = LIGHT) -> Figure:
    """Return a `FeatureHistogram` as a figure: before and after its operator in the same bins, band and mean marked."""
    figure = new_figure(theme, 7.2, 4.8)
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    band, mean = histogram.threshold, histogram.mean
    for axes, heights, title in ((top, histogram.before, "Before"), (bottom, histogram.after, "After")):
        prepare(axes, theme, f"{title} the operator, share of all values")
        if band >= 0:
            axes.axvspan(mean - band, mean + band, color=theme.accent, alpha=0.14, lw=0)
        axes.stairs(heights, histogram.edges, fill=True, color=theme.second, alpha=0.85, antialiased=False)
        axes.axvline(mean, color=theme.ink, linewidth=0.9, linestyle=DASHED)
    top.set_ylim(0, 1.3 * histogram.before.max())
    top.set_xlim(histogram.edges[0], histogram.edges[-1])
    right = (histogram.edges[0] + histogram.edges[-1]) / 2 > mean
    at = mean + (1 if right else -1) * max(band, 0)
    off = f"alpha {histogram.alpha:g}: no band, the operator is off"
    words = {
        top: f"alpha {histogram.alpha:g}: {mean:.3g} ± {band:.3g}".replace("-", "\N{MINUS SIGN}") if band >= 0 else off,
        bottom: f"{percent(histogram.share, 0)} of all values are now the mean:\none bar, cut off here"
        if band >= 0
        else "",
    }
    for axes, text in words.items():
        axes.annotate(
            text, (at, 0.95), (8 if right else -8, 0), color=theme.ink, fontsize=SMALL, ha="left" if right else "right",
            va="top", xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        )  # fmt: skip
    where = f"feature value at {histogram.site}, channel {histogram.channel}; {histogram.images:,} images"
    bottom.set_xlabel(where, color=theme.muted)
    return figure
