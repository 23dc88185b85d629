"""What every benchmark shares: interleaved timing, one row format, one place for results.

A contender's result is checked against the reference before it is timed.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; the fields are the CSV's columns.

    Attributes:
        benchmark, case, contender: What was measured.
        milliseconds: Median over the repetitions.
        low, high: Quartiles of the same.
        ratio: Median over repetitions of this contender's time by the baseline's in the same repetition.
        baseline: Name of the contender that ratios refer to.
        repetitions: Number of interleaved repetitions.
        device, torch, threads: Where it ran.
    """

    benchmark: str
    case: str
    contender: str
    milliseconds: float
    low: float
    high: float
    ratio: float
    baseline: str
    repetitions: int
    device: str
    torch: str
    threads: int


def device_name(device: str) -> str:
    """Return the name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def measure(
    benchmark: str,
    case: str,
    contenders: dict[str, Callable[[], object]],
    baseline: str,
    device: str,
    repetitions: int = 21,
) -> list[Row]:
    """Return one row a contender, timed in turns so that the machine's moods hit all of them alike."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):
            call()
    for _ in range(repetitions):
        for name, call in contenders.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, own in times.items():
        low, middle, high = statistics.quantiles(own, n=4)
        ratio = statistics.median(a / b for a, b in zip(own, times[baseline], strict=True))
        rows.append(
            Row(
                benchmark, case, name, middle, low, high, ratio, baseline, repetitions,
                device_name(device), torch.__version__, torch.get_num_threads(),
            )
        )  # fmt: skip
    return rows


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Print the rows as a table, and write them as CSV if a path is given."""
    table = Table(title=f"{rows[0].benchmark} on {rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}")
    for column in ("case", "contender", "ms [quartiles]", f"ratio to {rows[0].baseline}"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    previous = rows[0].case
    for row in rows:
        if row.case != previous:
            table.add_section()
        table.add_row(
            row.case if row.case != previous or row is rows[0] else "",
            row.contender,
            f"{row.milliseconds:.3f} [{row.low:.3f}, {row.high:.3f}]",
            f"{row.ratio:.2f}",
        )
        previous = row.case
    Console(width=120).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
