"""Floor 5: what was found, as pictures, one HTML page and one JSON file.

Draws and writes; runs a model only to look at its features. Imports matplotlib, which the package itself
never does.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor, fx

from .alpha import AlphaSearch
from .evaluate import Evaluation
from .kernels.reference import inside_band, per_channel, sparsify
from .nn import MeanSparse
from .operators import operators
from .sites import SitePlan
from .statistics import Statistics

CLEAN_BUDGET = 0.003  # loss of clean accuracy above which the headline says so, as a fraction


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


@dataclass(frozen=True, slots=True, eq=False)
class FeatureHistogram:
    """One channel's features before and after its operator (paper, Figure 1).

    Attributes:
        site, channel: Where.
        edges: ``[B + 1]``, of the bins, in the units of the features.
        before, after: ``[B]``, share of the values in each bin.
        mean, threshold: Centre and half width of the band; a negative threshold is an operator switched off.
        share: Of the values that lie in the band, which the operator makes one value.
        images: Number of images the features come from.
    """

    site: str
    channel: int
    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray
    mean: float
    threshold: float
    share: float
    images: int


@torch.no_grad()
def band_shares(sparse: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return, by site, the share ``[C]`` of each channel's values that lie in the band at the model's alpha."""
    shares: dict[str, Tensor] = {}

    def look(operator: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        centre, threshold = (
            per_channel(v, x.dim(), operator.channel_dim) for v in (operator.centre, operator.threshold)
        )
        inside = inside_band(x, centre, threshold).movedim(operator.channel_dim, 0).flatten(1)
        shares[operator.name] = inside.double().mean(1).cpu()

    _run_watched(sparse, images, look)
    return shares


@torch.no_grad()
def feature_histogram(
    sparse: fx.GraphModule, images: Tensor, site: str | None = None, channel: int | None = None, bins: int = 120
) -> FeatureHistogram:
    """Return the histogram of one channel's features on ``images``, before and after its operator.

    Args:
        sparse: A transformed model, at the alpha of interest.
        images: ``[N, C, H, W]``.
        site: By default the one with the channel that has the most values in its band; the first if none has any.
        channel: By default that channel of the site.
        bins: Number of bins, over the middle 99.8 % of the values and the whole band.
    """
    shares = band_shares(sparse, images)
    if site is None:
        site = max(shares, key=lambda name: shares[name].max())
    if channel is None:
        channel = int(shares[site].argmax())
    kept: list[Tensor] = []
    operator = operators(sparse)[site]

    def look(seen: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        if seen is operator:
            kept.append(inputs[0].detach().movedim(operator.channel_dim, 0)[channel].flatten())

    _run_watched(sparse, images, look)
    before = torch.cat(kept)
    centre, threshold = operator.centre[channel], operator.threshold[channel]
    after = sparsify(before, centre, threshold, operator.variant, "exact", operator.steepness)
    mean, band = float(centre), float(threshold)
    values, sparse_values = (v.double().cpu().numpy() for v in (before, after))
    low, high = np.quantile(values, [0.001, 0.999])
    low, high = min(low, mean - 1.5 * max(band, 0.0)), max(high, mean + 1.5 * max(band, 0.0))
    width = (high - low) / bins or 1.0
    # The mean sits in the middle of a bin, so that the bar it becomes stands on it.
    first, last = np.floor((low - mean) / width), np.ceil((high - mean) / width)
    edges = mean + width * (np.arange(first, last + 2) - 0.5)
    counts = [np.histogram(v, edges)[0] / len(values) for v in (values, sparse_values)]
    return FeatureHistogram(
        site, channel, edges, counts[0], counts[1], mean, band, float(shares[site][channel]), len(images)
    )


def alpha_figure(search: AlphaSearch, theme: Theme = LIGHT) -> Figure:
    """Return clean and worst-case accuracy over alpha; both panels have the same scale."""
    alphas = list(search.outcomes)
    rows = [o.to_dict() for o in search.outcomes.values()]
    clean, worst = ([r[k] for r in rows] for k in ("clean", "worst_case"))
    attacks = {name: [r["robust"][name] for r in rows] for name in rows[0]["robust"]}
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
        _prepare(axes, theme)
        axes.set_ylim(*low_high)
        axes.axvline(search.alpha, color=theme.muted, linewidth=1.0, zorder=1)
    top.axhline(clean[0], color=theme.ink, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1.5)
    top.axhline(floor, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1.5)
    top.plot(alphas, clean, color=theme.second, linewidth=2.2, marker="o", markersize=4.5)
    bottom.axhline(worst[0], color=theme.ink, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1.5)
    for line in attacks.values():
        bottom.plot(alphas, line, color=theme.accent, linewidth=0.9, alpha=0.65)
    bottom.plot(alphas, worst, color=theme.accent, linewidth=2.4, marker="o", markersize=4.5)
    chosen = alphas.index(search.alpha)
    for axes, values, colour in ((top, clean, theme.second), (bottom, worst, theme.accent)):
        axes.plot([search.alpha], [values[chosen]], "o", markersize=11, mfc="none", mec=colour, mew=1.6)
    top.annotate(
        f"chosen: alpha {search.alpha:g}", (search.alpha, 1), (0, 4), color=theme.ink, fontsize=9, ha="center",
        xycoords=top.get_xaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    _label_ends(
        top,
        [
            (clean[-1], "clean", theme.second, True),
            (clean[0], f"base {_percent(clean[0])}", theme.ink, False),
            (floor, f"allowed: {100 * search.clean_budget:g} less", theme.muted, False),
        ],
    )
    _label_ends(
        bottom,
        [
            (worst[-1], "worst case", theme.accent, True),
            (worst[0], f"base {_percent(worst[0])}", theme.ink, False),
            *((line[-1], name, theme.accent, False) for name, line in attacks.items()),
        ],
    )
    top.set_title("Clean accuracy", color=theme.ink, fontsize=10, loc="left", pad=18)
    bottom.set_title("Accuracy under attack", color=theme.ink, fontsize=10, loc="left")
    bottom.set_xlabel("alpha: half width of the band, in standard deviations", color=theme.muted)
    return figure


def histogram_figure(histogram: FeatureHistogram, theme: Theme = LIGHT) -> Figure:
    """Return one channel's feature histogram before and after the operator, band and mean marked."""
    figure = _figure(theme, 7.2, 4.8, right=0.97)
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    ceiling = 1.25 * histogram.before.max()
    for axes, heights, title in ((top, histogram.before, "Before"), (bottom, histogram.after, "After")):
        _prepare(axes, theme)
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
            f"{_percent(histogram.share, 0)} of all values are now the mean:\none bar, cut off here",
            theme.ink,
        )
    else:
        note(top, 0.95, "alpha = 0: no band, the operator is off", theme.accent)
    bottom.set_xlabel(f"feature value, {histogram.site}, channel {histogram.channel}", color=theme.muted)
    return figure


def headline(evaluation: Evaluation, clean_budget: float = CLEAN_BUDGET) -> str:
    """Return the result in plain sentences: gain with its interval, change of clean accuracy, verdict."""
    base, sparse = evaluation.base.to_dict(), evaluation.sparse.to_dict()
    change = evaluation.clean_change
    text = (
        f"{evaluation.verdict} On {evaluation.n_test} test images, {describe_alpha(evaluation.alpha)} takes it from "
        f"{_percent(base['worst_case'])} to {_percent(sparse['worst_case'])}, and clean accuracy from "
        f"{_percent(base['clean'])} to {_percent(sparse['clean'])}: {change.points()} points (95 % intervals)."
    )
    if -change.estimate > clean_budget + 1e-12:
        text += (
            f" The clean loss of {-100 * change.estimate:.1f} points is more than the {100 * clean_budget:g} that "
            "were to be spent."
        )
    return text


def _percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"


def describe_alpha(alpha: float | Mapping[str, float]) -> str:
    """Return alpha in words."""
    return f"alpha {alpha:g}" if isinstance(alpha, float) else "the alphas set site by site"


def write_report(
    out: Path,
    *,
    model: str,
    plan: SitePlan,
    statistics: Statistics,
    evaluation: Evaluation,
    data: Mapping[str, str],
    search: AlphaSearch | None = None,
    histogram: FeatureHistogram | None = None,
    shares: Mapping[str, Tensor] | None = None,
    clean_budget: float = CLEAN_BUDGET,
) -> dict[str, Any]:
    """Return the contents of ``report.json``, having written it, ``report.html`` and the plots into ``out``.

    Args:
        out: Directory; made if missing.
        model: What was measured, in words.
        plan: The model's sites.
        statistics: Of its calibration.
        evaluation: The final comparison.
        data: What each set of images was, by its role.
        search: The search that chose alpha, if there was one: drawn as ``alpha.png``.
        histogram: From `feature_histogram`: drawn as ``histogram.png``.
        shares: From `band_shares`.
        clean_budget: Loss of clean accuracy that the headline accepts without a word, as a fraction.
    """
    out.mkdir(parents=True, exist_ok=True)
    sites = _site_rows(plan, shares or {})
    report = evaluation.to_dict() | {
        "alpha": _as_written(evaluation.alpha),
        "headline": headline(evaluation, clean_budget),
        "model": model,
        "data": dict(data),
        "calibration": {"images": statistics.images, "fingerprint": statistics.fingerprint},
        "route": plan.route,
        "sites": sites,
        "search": search.to_dict() if search else None,
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    drawings = {
        "alpha": search and (lambda theme: alpha_figure(search, theme)),
        "histogram": histogram and (lambda theme: histogram_figure(histogram, theme)),
    }
    plots: dict[str, dict[str, str]] = {}
    for name, draw in drawings.items():
        if draw:
            light, dark = (_png(draw(theme)) for theme in (LIGHT, DARK))
            _write(out / f"{name}.png", light)
            plots[name] = {k: base64.b64encode(v).decode() for k, v in (("light", light), ("dark", dark))}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda v: f"{100 * v:.1f}", "points": lambda v: f"{100 * v:+.1f}"}
    template = environment.from_string((files(__package__) / "report.html.j2").read_text("utf-8"))
    page = template.render(
        report=report,
        comparison=evaluation.rows(),
        alpha=describe_alpha(evaluation.alpha),
        histogram=histogram,
        plots=plots,
        active=len(plan.active),
        clean_budget=clean_budget,
    )
    _write(out / "report.html", page.encode())
    _write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report


def versions() -> dict[str, str]:
    """Return the versions of what decides a result."""
    packages = ("meansparse_fx", "pyautoattack", "numpy")
    known = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return known | {name: version(name) for name in packages}


def _as_written(alpha: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return alpha as its user wrote it: 0.3, not the float32 nearest to it."""
    if isinstance(alpha, Mapping):
        return {name: float(str(np.float32(value))) for name, value in alpha.items()}
    return float(str(np.float32(alpha)))


def _site_rows(plan: SitePlan, shares: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "activation": s.activation.name if s.activation else s.kind,
            "shape": list(s.shape[1:]),
            "channels": s.channels,
            "channel_dim": s.channel_dim,
            "producer": s.producer,
            "skipped": s.skipped,
            "in_band": float(shares[s.name].mean()) if s.name in shares else None,
        }
        for s in plan
    ]


def _run_watched(sparse: fx.GraphModule, images: Tensor, look: Any) -> None:
    """Run the model on ``images``, showing each operator's input to ``look``."""
    with ExitStack() as stack:
        for operator in operators(sparse).values():
            stack.callback(operator.register_forward_pre_hook(look).remove)
        sparse(images)


def _figure(theme: Theme, width: float, height: float, right: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=200, facecolor=theme.paper)
    figure.subplots_adjust(left=0.09, right=right, bottom=0.11, top=0.91, hspace=0.25)
    return figure


def _prepare(axes: Axes, theme: Theme) -> None:
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
    gap = 11 / (axes.get_position().height * axes.figure.get_figheight() * 72)  # a line of text, as a share of the axes
    labels = sorted(labels)
    places: list[float] = []
    for height, *_ in labels:
        wanted = max((height - low) / (high - low), 0.03)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    for place, (height, text, colour, bold) in zip(places, labels, strict=True):
        left_the_axes = f" \N{DOWNWARDS ARROW} {_percent(height, 0)}" if height < low else ""
        axes.annotate(
            text + left_the_axes, (1, place), (6, 0), color=colour, fontsize=9, va="center",
            fontweight="bold" if bold else "normal", xycoords="axes fraction", textcoords="offset points",
        )  # fmt: skip


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
