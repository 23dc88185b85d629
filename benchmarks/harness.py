"""What every benchmark shares: interleaved timing, one row format, one place for results.

A contender's result is checked against the reference before it is timed.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a contender beside its time; None where it was not asked or means nothing.

    Attributes:
        kept_bytes: Kept for backward, parameters and buffers left out.
        peak_bytes: Most memory allocated during one call, over what was allocated before.
        launches: Kernels on a GPU, calls of operators on a CPU.
        graphs: Graphs that Dynamo made of it.
        compile_seconds: Time of the first call, caches on disk unused.
        forward_images, backward_images: Images that an attack sends through its model.
    """

    kept_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    graphs: int | None = None
    compile_seconds: float | None = None
    forward_images: int | None = None
    backward_images: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; the fields are the CSV's columns.

    Attributes:
        benchmark, case, contender: What was measured.
        milliseconds: Wall time of a call and a synchronisation, median over the repetitions.
        low, high: Quartiles of the same; of a range that was noted by hand, its ends.
        ratio: Median over repetitions of this contender's time by the baseline's in the same repetition.
        baseline: Name of the contender that ratios refer to.
        repetitions: Number of interleaved repetitions.
        device, torch, threads: Where it ran.
        kept_bytes, ..., backward_images: See `Facts`.
        of_clone: Bandwidth as a share of a clone's of the same tensor, counting the tensors that the task must read and
            write; by device time where there is a device. Of kernels only.
        ratio_per_pass: The ratio of times per image pass; of attacks only.
        device_ms, device_ratio: Time on the device alone, and the median of its ratios to the baseline's.
        host_ms: Time until the host is through with a call, of many calls without a synchronisation.
        triton, commit, date: What was measured, and when; older files do not say.
    """

    benchmark: str
    case: str
    contender: str
    milliseconds: float | None
    low: float | None
    high: float | None
    ratio: float | None
    baseline: str
    repetitions: int | None
    device: str
    torch: str
    threads: int
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    graphs: int | None = None
    compile_seconds: float | None = None
    forward_images: int | None = None
    backward_images: int | None = None
    of_clone: float | None = None
    ratio_per_pass: float | None = None
    device_ms: float | None = None
    device_ratio: float | None = None
    host_ms: float | None = None
    triton: str | None = None
    commit: str | None = None
    date: str | None = None


def device_name(device: str) -> str:
    """Return the name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


@functools.cache
def provenance() -> dict[str, str | None]:
    """Return the versions and the day that a row carries; the commit is MEANSPARSE_FX_COMMIT where there is no git."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    ask = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    found = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("MEANSPARSE_FX_COMMIT") or found or None
    return {"triton": triton, "commit": commit, "date": datetime.date.today().isoformat()}


Make = Callable[[], Callable[[], object]]  # makes a call, on the stream that is current


def device_ms(make: Make, milliseconds: float = 20.0) -> float | None:
    """Return the median time of a call on the GPU alone: replayed as a CUDA graph, the cache flushed before each.

    None for what no graph can hold.
    """
    from triton.testing import do_bench

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            call = make()
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()  # noqa: F841, its memory belongs to the graph
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    return do_bench(graph.replay, warmup=milliseconds / 4, rep=milliseconds, return_mode="median")


def host_ms(call: Callable[[], object], rounds: int = 5) -> float:
    """Return the wall time until the host is through with a call, of many without a synchronisation."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    number = max(2, min(20, int(0.01 / (time.perf_counter() - start))))  # some ten milliseconds a round
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append(1e3 * (time.perf_counter() - start) / number)
    torch.cuda.synchronize()
    return statistics.median(times)


def on_gpu(makes: Mapping[str, Make], baseline: str | Mapping[str, str], skip: Collection[str] = ()) -> dict[str, Any]:
    """Return by contender the columns that only a GPU has.

    Args:
        makes: By contender, what makes its call.
        baseline: As in `measure`.
        skip: Contenders that no graph can hold.
    """
    device = {name: None if name in skip else device_ms(make) for name, make in makes.items()}
    found = {}
    for name, make in makes.items():
        own, other = device[name], device.get(baseline if isinstance(baseline, str) else baseline[name])
        ratio = own / other if own and other else None
        found[name] = {"device_ms": own, "device_ratio": ratio, "host_ms": host_ms(make())}
    return found


def measure(
    benchmark: str,
    case: str,
    contenders: dict[str, Callable[[], object]],
    baseline: str | Mapping[str, str],
    device: str,
    repetitions: int = 21,
    facts: Mapping[str, Facts] | None = None,
    warm_up: int = 3,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """Return one row a contender, timed in turns so that the machine's moods hit all of them alike.

    Args:
        baseline: The contender that ratios refer to, one for all or one for each.
        facts: What else is known of each contender.
        warm_up: Calls of each contender that are not timed.
        more: Other columns of each contender.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(warm_up):
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
        low, middle, high = statistics.quantiles(own, n=4) if repetitions > 1 else own * 3
        ratio = statistics.median(a / b for a, b in zip(own, times[reference], strict=True))
        rows.append(
            Row(
                benchmark, case, name, middle, low, high, ratio, reference, repetitions,
                device_name(device), torch.__version__, torch.get_num_threads(),
                **(asdict(facts[name]) if facts and name in facts else {}), **(more or {}).get(name, {}),
                **provenance(),
            )
        )  # fmt: skip
    return rows


# How the facts are printed: field, heading, text.
_FACTS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("kept_bytes", "kept MiB", lambda n: f"{n / 2**20:.1f}"),
    ("peak_bytes", "peak MiB", lambda n: f"{n / 2**20:.1f}"),
    ("launches", "launches", str),
    ("graphs", "graphs", str),
    ("compile_seconds", "compile s", lambda s: f"{s:.1f}"),
    ("forward_images", "images forward", "{:,}".format),
    ("backward_images", "backward", "{:,}".format),
    ("ratio_per_pass", "ratio per pass", "{:.2f}".format),
    ("of_clone", "of the clone's bandwidth", lambda share: f"{share:.0%}"),
    ("device_ms", "device ms", "{:.4f}".format),
    ("device_ratio", "ratio", "{:.2f}".format),
    ("host_ms", "host ms", "{:.4f}".format),
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
            f"{row.milliseconds:.3f}" + ("" if row.low is None else f" [{row.low:.3f}, {row.high:.3f}]"),
            f"{row.ratio:.2f}",
            row.baseline,
            *("" if value is None else text(value) for value, text in values),
        )
        previous = row.case
    Console(width=140).print(table)
    if path is not None:
        write(rows, path)


def print_rows(rows: Sequence[Any], columns: Sequence[str], title: str) -> None:
    """Print some fields of any rows as a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = (getattr(row, column) for column in columns)
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=140).print(table)


def points(change: float, low: float, high: float) -> str:
    """Return a change of accuracy and its interval, fractions, in percentage points."""
    return f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def write(rows: Sequence[Any], path: Path) -> None:
    """Write rows of one dataclass as CSV, its fields the header, at once: a killed run leaves a whole file."""
    columns = [f.name for f in fields(rows[0])]  # before the file is opened: no rows are no reason to empty it
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    part.replace(path)


# As annotations are text: how a field's text becomes its value.
_VALUES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}


def read(path: Path, kind: type[Any] = Row) -> list[Any]:
    """Return the rows of a CSV; columns that an older file lacks are None, as are empty ones."""

    def value(field: Field[Any], text: str | None) -> Any:
        base, *optional = str(field.type).split(" | ")
        return None if optional and not text else _VALUES[base](text or "")

    with path.open(newline="") as file:
        return [kind(**{f.name: value(f, row.get(f.name)) for f in fields(kind)}) for row in csv.DictReader(file)]
