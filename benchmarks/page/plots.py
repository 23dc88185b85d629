"""The page's two plots. Knows matplotlib and results; writes no file."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Results
from .sections import extras

STYLES = {
    "published module": ("#9ba2ab", "s"),
    "branch-free module": ("#1d5fa8", "^"),
    "ours": ("#ff8f57", "o"),
    "ours, fused": ("#c2410c", "D"),
}
DPI = 130


def models_figure(results: Results) -> Figure | None:
    """Return every contender's ratio, a line a case: eager ones left, compiled ones right; None without rows."""
    cases = [(source, case) for source in results.models for case in source.cases]
    if not cases:
        return None
    figure = Figure(figsize=(8.6, 1.6 + 0.34 * len(cases)), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for side, suffix, title in zip(axes, ("", " compiled"), ("over the base", "over the compiled base"), strict=True):
        for name, (colour, marker) in STYLES.items():
            points = [
                (source.cases[case][name + suffix].ratio, -line)
                for line, (source, case) in enumerate(cases)
                if name + suffix in source.cases[case]
            ]
            if points:
                side.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=name)
        _prepare(side, title)
        side.axvline(1, color="#1c1e21", linewidth=1)
    labels = [f"{case}\n{source.where.partition(', torch')[0]}" for source, case in cases]
    axes[0].set_yticks([-line for line in range(len(cases))], labels, fontsize=7)
    axes[0].set_ylim(0.6 - len(cases), 0.6)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def roofline_figure(results: Results) -> Figure | None:
    """Return measured extra time over counted extra bytes, both as shares of the base's time; None without rows."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in STYLES}
    for source in results.models:
        for name, _, extra, longer in extras(results, source):
            points[name].append((extra, longer))
    if not any(points.values()):
        return None
    figure = Figure(figsize=(8.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, (colour, marker) in STYLES.items():
        if points[name]:
            axes.plot(*zip(*points[name], strict=True), marker, color=colour, markersize=6, label=name)
    _prepare(axes, "")
    axes.axhline(0, color="#1c1e21", linewidth=1)
    axes.axvline(0, color="#1c1e21", linewidth=1)
    axes.set_xlabel("counted: MiB moved more than by the base, a call", fontsize=8)
    axes.set_ylabel("measured: ms longer than the base", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _prepare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.grid(color="#e4e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
