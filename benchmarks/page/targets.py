"""The targets of the design, and what the files say of each: met, missed, or not measured."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..models import CONTENDERS
from ..roofline import Count
from .results import Results, mark

# Nodes that count as the thousand of the target, and how much dearer a node of the largest graph may be than one of the
# smallest before that is not called linear.
NODES = (900, 1200)
LINEAR = 1.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that a target is judged by: of what, in which file; the mark behind it is `results.mark`'s."""

    value: float
    what: str
    file: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One target.

    Attributes:
        limit: The figure allowed, in ``unit``; with ``least`` it is a least figure, not a largest.
        figures: Returns those that the files have.
    """

    what: str
    limit: float
    figures: Callable[[Results], Iterator[Figure]]
    least: bool = False
    unit: str = ""

    def line(self, results: Results) -> tuple[str, str, str, str, str]:
        """Return target, limit, verdict, figures and files, as the cells of the page's table."""
        limit = f"{'≥' if self.least else '≤'} {self.limit:.2f}{self.unit}"
        found = list(self.figures(results))
        if not found:
            return self.what, limit, "not measured", "", ""
        # As it is printed: a figure that reads as the limit meets it.
        values = [round(figure.value, 2) for figure in found]
        bad = [not (v >= self.limit if self.least else v <= self.limit) for v in values]  # NaN is bad
        worst = found[values.index(min(values) if self.least else max(values))]
        span = f"{worst.value:.2f}{self.unit} ({worst.what})"
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        if len(found) > 1:
            worst_of = f"; worst: {worst.what}" if low != high else ""
            span = f"{low if low == high else f'{low} to {high}'}{self.unit} in {len(found)} rows{worst_of}"
        verdict = "**missed**" if any(bad) else "met"
        if any(bad) and len(found) > 1:
            verdict += f" in {sum(bad)} of {len(found)}"
        span += max(figure.mark for figure in found)
        return self.what, limit, verdict, span, ", ".join(dict.fromkeys(f"`{figure.file}`" for figure in found))


def rows_of(
    benchmark: str, gpu: bool | None, contender: str, field: str = "ratio", behind: str = ""
) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of a ``field`` of rows of GPUs, of CPUs or, None, of both, where it is not empty.

    Args:
        contender: An expression that the contender's name matches.
        behind: What the case ends with.
    """

    def figures(results: Results) -> Iterator[Figure]:
        for source in getattr(results, benchmark):
            for row in source.rows if gpu in (None, source.gpu) else ():
                value = getattr(row, field)
                if value is not None and row.case.endswith(behind) and re.fullmatch(contender, row.contender):
                    what = row.case if benchmark in ("models", "kernels") else f"{row.case}, {row.contender}"
                    yield Figure(value, what, source.name, mark(row))

    return figures


def kept(contender: str) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of bytes kept for backward over the base's."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in results.models:
            for case, rows in source.cases.items():
                own, other = rows.get(contender), rows.get(CONTENDERS[contender][0])
                if own and other and own.kept_bytes and other.kept_bytes:
                    yield Figure(own.kept_bytes / other.kept_bytes, case, source.name)

    return figures


def counted(value: Callable[[Count, Count], float]) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of the fused form's counts, given them and the base's."""

    def figures(results: Results) -> Iterator[Figure]:
        for count in results.counts:
            base = results.count(count.model, "base")
            if count.form == "ours, fused" and base:
                yield Figure(value(count, base), count.model, "roofline.csv")

    return figures


def moved(own: Count, base: Count) -> float:
    """Return the bytes moved over the base's."""
    return (own.forward_bytes + own.backward_bytes) / (base.forward_bytes + base.backward_bytes)


def transform(results: Results) -> Iterator[Figure]:
    """Return the figures of seconds for a graph of about a thousand nodes."""
    for source in results.scaling:
        for row in source.rows:
            if row.what == "transform" and NODES[0] <= row.size <= NODES[1]:
                yield Figure(row.seconds, f"{row.case}, {row.size} nodes", source.name)


def linear(results: Results) -> Iterator[Figure]:
    """Return the figures of what a node costs in the largest graph over one in the smallest."""
    for source in results.scaling:
        rows = sorted((row for row in source.rows if row.what == "transform"), key=lambda row: row.size)
        if len(rows) > 1:
            small, large = rows[0], rows[-1]
            ratio = (large.seconds / large.size) / (small.seconds / small.size)
            yield Figure(ratio, f"{large.size} nodes over {small.size}", source.name)


CALIBRATE = "meansparse_fx.calibrate|torch.compile, observe"
shares = functools.partial(rows_of, "kernels", True, "meansparse_fx", "of_clone")
TARGETS = (
    Target("eager, fused, over base, GPU", 1.00, rows_of("models", True, "ours, fused")),
    Target("the same, time on the device alone", 1.00, rows_of("models", True, "ours, fused", "device_ratio")),
    Target("eager over base, CPU", 1.15, rows_of("models", False, "ours")),
    Target("eager, fused, over base, CPU", 1.15, rows_of("models", False, "ours, fused")),
    Target("compiled over base compiled, GPU", 1.02, rows_of("models", True, "ours compiled")),
    Target("the same, mode reduce-overhead", 1.00, rows_of("models", True, "ours reduce-overhead")),
    Target("compiled over base compiled, CPU", 1.05, rows_of("models", False, "ours compiled")),
    Target("graphs of the compiled model", 1, rows_of("models", None, "ours compiled", "graphs")),
    Target("bytes kept for backward over base", 1.00, kept("ours")),
    Target("the same, fused", 1.00, kept("ours, fused")),
    Target("the same, compiled over base compiled", 1.00, kept("ours compiled")),
    Target("calls a site, fused, forward (counted)", 1, counted(lambda own, base: own.forward_calls / own.sites)),
    Target("bytes moved at the sites, fused over base (counted)", 1.00, counted(moved)),
    Target("kernel's share of the clone's bandwidth, forward, GPU", 0.90, shares(" forward"), least=True),
    Target("the same, backward", 0.90, shares(" backward"), least=True),
    Target("moments, share of a read at the clone's bandwidth, GPU", 0.90, shares(" moments"), least=True),
    Target("moments and activation, share of the clone's, GPU", 0.95, shares(" moments+activation"), least=True),
    Target("calibration over plain forward pass, GPU", 1.05, rows_of("calibration", True, CALIBRATE)),
    Target("calibration over plain forward pass, CPU", 1.15, rows_of("calibration", False, CALIBRATE)),
    Target("attack over attack on the base, GPU", 1.00, rows_of("attack", True, "ours.*")),
    Target("transform of a graph of 1,000 nodes", 2.00, transform, unit=" s"),
    Target("a node of the largest graph over one of the smallest (linear)", LINEAR, linear),
)


def wins(results: Results) -> list[tuple[str, str, int, int, float]]:
    """Return (file, ours against rival, cases that ours wins, cases it loses, median of ours over rival)."""
    found = []
    for source in results.models:
        for own in ("ours", "ours, fused", "ours compiled"):
            for rival in source.contenders:
                pairs = [(rows[own], rows[rival]) for rows in source.cases.values() if own in rows and rival in rows]
                same = CONTENDERS.get(rival, "")[:1] == CONTENDERS[own][:1]  # the baseline, in the same run
                if rival.startswith("ours") or not same or not pairs:
                    continue
                ratios = [a.ratio / b.ratio for a, b in pairs]
                won = sum(ratio < 1 for ratio in ratios)
                words = f"{own}{mark(pairs[0][0])} against {rival}"
                found.append((source.name, words, won, len(ratios) - won, statistics.median(ratios)))
    return found
