"""The targets of the design, and what the files say of each: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..models import CONTENDERS
from .results import Results, Source, mark

# Nodes that count as the thousand of the target, and how much dearer a node of the largest graph may be than one of the
# smallest before that is not called linear.
NODES = (900, 1200)
LINEAR = 1.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that a target is judged by.

    Attributes:
        value: The figure.
        what: What it is of.
        file: Where it stands.
        mark: Behind it, see `results.mark`.
    """

    value: float
    what: str
    file: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One target.

    Attributes:
        what: In words.
        limit: The figure allowed.
        figures: Returns those that the files have.
        least: The limit is a least figure, not a largest.
        unit: Written behind figures.
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


def replayed(contender: str) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of a contender's time on the device over its base's."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in _sources(results.models, True):
            for row in source.rows:
                if row.contender == contender and row.device_ratio is not None:
                    yield Figure(row.device_ratio, row.case, source.name, mark(row))

    return figures


def _sources(sources: list[Source], gpu: bool) -> list[Source]:
    return [source for source in sources if source.gpu == gpu]


def models(contender: str, gpu: bool) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of a contender's time over that of its base."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in _sources(results.models, gpu):
            for row in source.rows:
                if row.contender == contender:
                    yield Figure(row.ratio, row.case, source.name, mark(row))

    return figures


def kept(contender: str, base: str) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of bytes kept for backward over the base's."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in results.models:
            for case, rows in source.cases.items():
                own, other = rows.get(contender), rows.get(base)
                if own and other and own.kept_bytes and other.kept_bytes:
                    yield Figure(own.kept_bytes / other.kept_bytes, case, source.name)

    return figures


def graphs(results: Results) -> Iterator[Figure]:
    """Return the figures of how many graphs the plug-in's model is."""
    for source in results.models:
        for row in source.rows:
            if row.contender == "ours compiled" and row.graphs is not None:
                yield Figure(row.graphs, row.case, source.name)


def calls(results: Results) -> Iterator[Figure]:
    """Return the figures of calls a site, of the fused form forward."""
    for count in results.counts:
        if count.form == "ours, fused":
            yield Figure(count.forward_calls / count.sites, count.model, "roofline.csv")


def moved(results: Results) -> Iterator[Figure]:
    """Return the figures of bytes moved by the fused form over the base's."""
    for count in results.counts:
        base = results.count(count.model, "base")
        if count.form == "ours, fused" and base:
            total = base.forward_bytes + base.backward_bytes
            yield Figure((count.forward_bytes + count.backward_bytes) / total, count.model, "roofline.csv")


def kernels(mode: str) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of the kernel's share of the clone's bandwidth on GPUs."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in _sources(results.kernels, True):
            for row in source.rows:
                if row.contender == "meansparse_fx" and row.case.endswith(f" {mode}") and row.of_clone is not None:
                    yield Figure(row.of_clone, row.case, source.name, mark(row))

    return figures


def calibration(gpu: bool) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of calibration over the plain forward pass."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in _sources(results.calibration, gpu):
            for row in source.rows:
                if row.contender in ("meansparse_fx.calibrate", "torch.compile, observe"):
                    yield Figure(row.ratio, f"{row.case}, {row.contender}", source.name)

    return figures


def attacks(gpu: bool) -> Callable[[Results], Iterator[Figure]]:
    """Return the figures of attacks on our models over those on the base."""

    def figures(results: Results) -> Iterator[Figure]:
        for source in _sources(results.attack, gpu):
            for row in source.rows:
                if row.contender.startswith("ours"):
                    yield Figure(row.ratio, f"{row.case}, {row.contender}", source.name, mark(row))

    return figures


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


TARGETS = (
    Target("eager, fused, over base, GPU", 1.00, models("ours, fused", True)),
    Target("the same, time on the device alone", 1.00, replayed("ours, fused")),
    Target("eager over base, CPU", 1.15, models("ours", False)),
    Target("eager, fused, over base, CPU", 1.15, models("ours, fused", False)),
    Target("compiled over base compiled, GPU", 1.02, models("ours compiled", True)),
    Target("the same, mode reduce-overhead", 1.00, models("ours reduce-overhead", True)),
    Target("compiled over base compiled, CPU", 1.05, models("ours compiled", False)),
    Target("graphs of the compiled model", 1, graphs),
    Target("bytes kept for backward over base", 1.00, kept("ours", "base")),
    Target("the same, fused", 1.00, kept("ours, fused", "base")),
    Target("the same, compiled over base compiled", 1.00, kept("ours compiled", "base compiled")),
    Target("calls a site, fused, forward (counted)", 1, calls),
    Target("bytes moved at the sites, fused over base (counted)", 1.00, moved),
    Target("kernel's share of the clone's bandwidth, forward, GPU", 0.90, kernels("forward"), least=True),
    Target("the same, backward", 0.90, kernels("backward"), least=True),
    Target("moments, share of a read at the clone's bandwidth, GPU", 0.90, kernels("moments"), least=True),
    Target(
        "moments with activation, share of the clone's bandwidth, GPU", 0.95, kernels("moments+activation"), least=True
    ),
    Target("calibration over plain forward pass, GPU", 1.05, calibration(True)),
    Target("calibration over plain forward pass, CPU", 1.15, calibration(False)),
    Target("attack over attack on the base, GPU", 1.00, attacks(True)),
    Target("transform of a graph of 1,000 nodes", 2.00, transform, unit=" s"),
    Target("a node of the largest graph over one of the smallest (linear)", LINEAR, linear),
)


def wins(results: Results) -> list[tuple[str, str, int, int, float]]:
    """Return (file, ours against rival, cases that ours wins, cases it loses, median of ours over rival)."""
    found = []
    for source in results.models:
        for own in ("ours", "ours, fused", "ours compiled"):
            names = dict.fromkeys(row.contender for row in source.rows)
            for rival in (name for name in names if CONTENDERS.get(name, "")[:1] == CONTENDERS[own][:1]):
                pairs = [(rows[own], rows[rival]) for rows in source.cases.values() if own in rows and rival in rows]
                if rival.startswith("ours") or not pairs:
                    continue
                # Both ratios are to the same baseline in the same run.
                ratios = sorted(a.ratio / b.ratio for a, b in pairs)
                won = sum(ratio < 1 for ratio in ratios)
                middle = (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2
                marked = f"{own}{mark(pairs[0][0])} against {rival}"
                found.append((source.name, marked, won, len(ratios) - won, middle))
    return found
