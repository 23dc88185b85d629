"""What every benchmark shares: interleaved timing, one row format, one place for results.

A contender's result is checked against the reference before it is timed.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a contender beside its time; None where it was not asked or means nothing.

    Attributes:
        kept_bytes: Kept for backward: `kept_bytes`.
        peak_bytes: Most memory allocated during one call, over what was allocated before; CUDA only.
        graphs: Graphs that Dynamo made of it.
        compile_seconds: Time of the first call, caches on disk unused.
    """

    kept_bytes: int | None = None
    peak_bytes: int | None = None
    graphs: int | None = None
    compile_seconds: float | None = None


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
        kept_bytes, peak_bytes, graphs, compile_seconds: See `Facts`.
        of_clone: Bandwidth as a share of a clone's of the same tensor, counting the tensors that the task must read and
            write; of kernels only.
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
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    graphs: int | None = None
    compile_seconds: float | None = None
    of_clone: float | None = None


def device_name(device: str) -> str:
    """Return the name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def kept_bytes(call: Callable[[], object], state: Sequence[torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for backward in a call, each storage once, those of ``state`` never."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # alive while its bytes are counted, so that no address is used twice
    for tensor in state:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def measure(
    benchmark: str,
    case: str,
    contenders: dict[str, Callable[[], object]],
    baseline: str | Mapping[str, str],
    device: str,
    repetitions: int = 21,
    facts: Mapping[str, Facts] | None = None,
) -> list[Row]:
    """Return one row a contender, timed in turns so that the machine's moods hit all of them alike.

    Args:
        baseline: The contender that ratios refer to, one for all or one for each.
        facts: What else is known of each contender.
    """
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
        reference = baseline if isinstance(baseline, str) else baseline[name]
        low, middle, high = statistics.quantiles(own, n=4)
        ratio = statistics.median(a / b for a, b in zip(own, times[reference], strict=True))
        rows.append(
            Row(
                benchmark, case, name, middle, low, high, ratio, reference, repetitions,
                device_name(device), torch.__version__, torch.get_num_threads(),
                **(asdict(facts[name]) if facts and name in facts else {}),
            )
        )  # fmt: skip
    return rows


# How the facts are printed: field, heading, text.
_FACTS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("kept_bytes", "kept MiB", lambda n: f"{n / 2**20:.1f}"),
    ("peak_bytes", "peak MiB", lambda n: f"{n / 2**20:.1f}"),
    ("graphs", "graphs", str),
    ("compile_seconds", "compile s", lambda s: f"{s:.1f}"),
    ("of_clone", "of the clone's bandwidth", lambda share: f"{share:.0%}"),
)


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Print the rows as a table, and write them as CSV if a path is given."""
    facts = [fact for fact in _FACTS if any(getattr(row, fact[0]) is not None for row in rows)]
    table = Table(title=f"{rows[0].benchmark} on {rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}")
    for column in ("case", "contender", "ms [quartiles]", "ratio", "to", *(heading for _, heading, _ in facts)):
        table.add_column(column, justify="left" if column in ("case", "contender", "to") else "right")
    previous = rows[0].case
    for row in rows:
        if row.case != previous:
            table.add_section()
        values = [(getattr(row, name), text) for name, _, text in facts]
        table.add_row(
            row.case if row.case != previous or row is rows[0] else "",
            row.contender,
            f"{row.milliseconds:.3f} [{row.low:.3f}, {row.high:.3f}]",
            f"{row.ratio:.2f}",
            row.baseline,
            *("" if value is None else text(value) for value, text in values),
        )
        previous = row.case
    Console(width=140).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
