"""What every benchmark shares: its options, timing in turns, rows that are a CSV's columns, their reader and writer.

A contender's result is checked against the reference before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Call = Callable[[], object]
Make = Callable[[], Call]  # makes a call, on the stream that is current


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of speed; the fields are the CSV's columns, None where nothing was asked or means nothing.

    Attributes:
        milliseconds, low, high: Wall time of a call and a synchronisation, median and quartiles over the repetitions.
        ratio: Median over repetitions of the time by that of the contender ``baseline`` in the same repetition.
        kept_bytes: Kept for backward, parameters and buffers left out.
        peak_bytes: Most memory allocated during one call, over what was allocated before.
        launches: Kernels on a GPU, calls of operators on a CPU.
        graphs: Graphs that Dynamo made of it.
        compile_seconds: Time of the first call, caches on disk unused.
        forward_images, backward_images: Images that an attack sends through its model.
        of_clone: Bandwidth as a share of a clone's of the same tensor, counting the tensors that the task must read and
            write; by device time where there is a device. Of kernels only.
        ratio_per_pass: The ratio of times per image pass; of attacks only.
        device_ms, device_ratio: Time on the device alone, and its ratio to the baseline's.
        host_ms: Time until the host is through with a call, of many calls without a synchronisation.
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


def options(doc: str | None, repetitions: int | None = None, out: str = "the CSV to write") -> argparse.ArgumentParser:
    """Return a parser that knows ``--out``, whose help is ``out``; with repetitions, what all that time take, too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out:
        parser.add_argument("--out", type=Path, help=out)
    if repetitions is not None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
        parser.add_argument("--repetitions", type=int, default=repetitions)
    return parser


def place(device: str) -> dict[str, Any]:
    """Return where something runs: the name of the GPU or of the CPU, torch's version, threads."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
    return {"device": name or platform.processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}


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


def host_ms(call: Call) -> float:
    """Return the wall time until the host is through with a call, of many without a synchronisation."""
    ((once,),) = in_turns({"": call}, "cuda", 1, warm_up=1).values()
    number = max(2, min(20, int(10 / once)))  # some ten milliseconds a round
    ((*times,),) = in_turns({"": call}, "cuda", 5, warm_up=0, number=number).values()
    return statistics.median(times)


def on_gpu(makes: Mapping[str, Make], baseline: str | Mapping[str, str], skip: Collection[str] = ()) -> dict[str, Any]:
    """Return by contender the columns that only a GPU has; ``skip`` names those that no graph can hold."""
    device = {name: None if name in skip else device_ms(make) for name, make in makes.items()}
    found = {}
    for name, make in makes.items():
        own, other = device[name], device.get(baseline if isinstance(baseline, str) else baseline[name])
        ratio = own / other if own and other else None
        found[name] = {"device_ms": own, "device_ratio": ratio, "host_ms": host_ms(make())}
    return found


def in_turns(
    calls: Mapping[str, Call], device: str, repetitions: int, warm_up: int, number: int = 1
) -> dict[str, list[float]]:
    """Return each call's wall times in milliseconds; they take turns, so that the machine's moods hit all alike.

    Args:
        number: Calls of a turn. One is timed with a synchronisation; of many, that are timed without, two more come
            first, for others were in the caches.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    for _ in range(repetitions):
        for name, call in calls.items():
            synchronize()
            if number > 1:
                call()
                call()
            start = time.perf_counter()
            for _ in range(number):
                call()
            if number == 1:
                synchronize()
            times[name].append(1e3 * (time.perf_counter() - start) / number)
    return times


def ratio_of(own: Iterable[float], others: Iterable[float]) -> float:
    """Return the median of the ratios of times taken in the same turns."""
    return statistics.median(a / b for a, b in zip(own, others, strict=True))


def measure(
    benchmark: str, case: str, contenders: Mapping[str, Call], baseline: str | Mapping[str, str], device: str,
    repetitions: int = 21, more: Mapping[str, Mapping[str, Any]] | None = None, warm_up: int = 3,
) -> list[Row]:  # fmt: skip
    """Return one row a contender, timed in turns.

    Args:
        baseline: The contender that ratios refer to, one for all or one for each.
        more: Other columns of each contender.
        warm_up: Calls of each contender that are not timed.
    """
    times = in_turns(contenders, device, repetitions, warm_up)
    rows = []
    for name, own in times.items():
        reference = baseline if isinstance(baseline, str) else baseline[name]
        low, middle, high = statistics.quantiles(own, n=4) if repetitions > 1 else own * 3
        rest = place(device) | provenance() | dict((more or {}).get(name, {}))
        ratio = ratio_of(own, times[reference])
        rows.append(Row(benchmark, case, name, middle, low, high, ratio, reference, repetitions, **rest))
    return rows


def report(rows: Sequence[Any], path: Path | None, title: str = "", columns: Collection[str] = ()) -> None:
    """Print the columns that say something, or those that are named, and write the rows as CSV if a path is given."""
    full = [f.name for f in fields(rows[0]) if any(getattr(row, f.name) is not None for row in rows)]
    hidden = ("benchmark", "low", "high", "repetitions", "device", "torch", "threads", "triton", "commit", "date")
    names = columns or [name for name in full if name not in hidden]
    values = [[getattr(row, name) for name in names] for row in rows]
    cells = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in values]
    first = rows[0]
    title = title or f"{first.benchmark} on {first.device}, {first.threads} threads, torch {first.torch}"
    show([name.replace("_", " ") for name in names], cells, title=title)
    if path is not None:
        write(rows, path)


def show(heads: Iterable[str], rows: Iterable[Iterable[str]], width: int = 140, **style: Any) -> None:
    """Print a table on the terminal."""
    table = Table(*heads, **style)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


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
    """Return the rows of a CSV, none if it is not there; columns that an older file lacks are None, as are empty ones.

    Raises:
        ValueError: A column that must not be empty is.
    """

    def value(field: Field[Any], text: str | None) -> Any:
        base, *optional = str(field.type).split(" | ")
        return None if optional and not text else _VALUES[base](text or "")

    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [kind(**{f.name: value(f, row.get(f.name)) for f in fields(kind)}) for row in csv.DictReader(file)]
