"""The targets of the design, and what the files say of each: met, missed, or not measured."""

import functools
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..harness import Row
from ..models import CONTENDERS
from .results import Results, mark

NODES = (900, 1200)  # that count as the thousand of the target
Value = Callable[[Row, Row], float | None]  # of a row and the one that it refers to


@dataclass(frozen=True, slots=True)
class Target:
    """One target.

    Attributes:
        limit: The figure allowed, in ``unit``; with ``least`` it is a least figure, not a largest.
        benchmark, gpu: Whose rows it is about; of GPUs, of CPUs or, None, of both.
        contender: An expression that the contender's name matches.
        value: The column, or what a figure is of a row and its baseline, or else the file's first row; rows that have
            none are left out.
        mode: What the case ends with.
    """

    what: str
    limit: float
    benchmark: str
    gpu: bool | None
    contender: str = "ours"
    value: str | Value = "ratio"
    mode: str = ""
    least: bool = False
    unit: str = ""

    def figures(self, results: Results) -> Iterator[tuple[float, str, str, str]]:
        """Yield (figure, of what, in which file, its mark)."""
        for source in getattr(results, self.benchmark):
            for row in source.rows if self.gpu in (None, source.gpu) else ():
                if not row.case.endswith(self.mode) or not re.fullmatch(self.contender, row.contender):
                    continue
                if isinstance(self.value, str):
                    value = row.get(self.value)
                else:
                    other = source.cases[row.case].get(row.baseline or "base", source.rows[0])
                    value = self.value(row, other)
                more = {"scaling": f"{row.size} {row.unit}", "models": "", "kernels": "", "roofline": ""}
                words = [row.case, more.get(self.benchmark, row.contender)]
                if value is not None:
                    own = mark(row) if isinstance(self.value, str) else ""
                    yield value, ", ".join(filter(None, words)), source.name, own

    def line(self, results: Results) -> tuple[str, str, str, str, str]:
        """Return target, limit, verdict, figures and files, as the cells of the page's table."""
        limit = f"{'≥' if self.least else '≤'} {self.limit:.2f}{self.unit}"
        found = list(self.figures(results))
        if not found:
            return self.what, limit, "not measured", "", ""
        # As it is printed: a figure that reads as the limit meets it.
        values = [round(value, 2) for value, *_ in found]
        bad = [not (v >= self.limit if self.least else v <= self.limit) for v in values]  # NaN is bad
        _, worst, *_ = found[values.index(min(values) if self.least else max(values))]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        verdict = "**missed**" if any(bad) else "met"
        if len(found) == 1:
            span = f"{low}{self.unit} ({worst})"
        else:
            verdict += f" in {sum(bad)} of {len(found)}" if any(bad) else ""
            span = f"{low if low == high else f'{low} to {high}'}{self.unit} in {len(found)} rows"
            span += f"; worst: {worst}" if low != high else ""
        span += max(mark for *_, mark in found)
        return self.what, limit, verdict, span, ", ".join(dict.fromkeys(f"`{file}`" for _, _, file, _ in found))


def kept(row: Row, base: Row) -> float | None:
    """Return the bytes kept for backward over the baseline's."""
    return row.kept_bytes / base.kept_bytes if row.kept_bytes and base.kept_bytes else None


def moved(row: Row, base: Row) -> float:
    """Return the bytes moved over the base's."""
    return (row.forward_bytes + row.backward_bytes) / (base.forward_bytes + base.backward_bytes)


def a_thousand_nodes(row: Row, _: Row) -> float | None:
    """Return the seconds of transform for a graph of about a thousand nodes."""
    return row.seconds if row.what == "transform" and NODES[0] <= row.size <= NODES[1] else None


def growth(row: Row, smallest: Row) -> float | None:
    """Return what a node costs in a graph of about a thousand over one in the smallest."""
    seconds = a_thousand_nodes(row, smallest)
    return seconds and (seconds / row.size) / (smallest.seconds / smallest.size)


def calls_a_site(row: Row, _: Row) -> float:
    """Return how many calls of operators a site takes forward."""
    return row.forward_calls / row.site_count


FUSED, CALIBRATE = "ours, fused", "meansparse_fx.calibrate|torch.compile, observe"
shares = functools.partial(
    Target, benchmark="kernels", gpu=True, contender="meansparse_fx", value="of_clone", least=True
)
TARGETS = (
    Target("eager, fused, over base, GPU", 1.00, "models", True, FUSED),
    Target("the same, time on the device alone", 1.00, "models", True, FUSED, "device_ratio"),
    Target("eager over base, CPU", 1.15, "models", False),
    Target("eager, fused, over base, CPU", 1.15, "models", False, FUSED),
    Target("compiled over base compiled, GPU", 1.02, "models", True, "ours compiled"),
    Target("the same, mode reduce-overhead", 1.00, "models", True, "ours reduce-overhead"),
    Target("compiled over base compiled, CPU", 1.05, "models", False, "ours compiled"),
    Target("graphs of the compiled model", 1, "models", None, "ours compiled", "graphs"),
    Target("bytes kept for backward over base", 1.00, "models", None, value=kept),
    Target("the same, fused", 1.00, "models", None, FUSED, kept),
    Target("the same, compiled over base compiled", 1.00, "models", None, "ours compiled", kept),
    Target("calls a site, fused, forward (counted)", 1, "roofline", None, FUSED, calls_a_site),
    Target("bytes moved at the sites, fused over base (counted)", 1.00, "roofline", None, FUSED, moved),
    shares("kernel's share of the clone's bandwidth, forward, GPU", 0.90, mode=" forward"),
    shares("the same, backward", 0.90, mode=" backward"),
    shares("moments, share of a read at the clone's bandwidth, GPU", 0.90, mode=" moments"),
    shares("moments and activation, share of the clone's, GPU", 0.95, mode=" moments+activation"),
    Target("calibration over plain forward pass, GPU", 1.05, "calibration", True, CALIBRATE),
    Target("calibration over plain forward pass, CPU", 1.15, "calibration", False, CALIBRATE),
    Target("attack over attack on the base, GPU", 1.00, "attack", True, "ours.*"),
    Target("transform of a graph of 1,000 nodes", 2.00, "scaling", None, "", a_thousand_nodes, unit=" s"),
    Target("a node of the largest graph over one of the smallest (linear)", 1.50, "scaling", None, "", growth),
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
                words = f"{own}{max(mark(row) for row, _ in pairs)} against {rival}"
                found.append((source.name, words, won, len(ratios) - won, statistics.median(ratios)))
    return found
