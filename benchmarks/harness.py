"""What every benchmark shares: its options, timing in turns, rows, the tables and files that they become."""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from meansparse_fx.artifacts import write_whole
from meansparse_fx.errors import MeanSparseError, ModelError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Call = Callable[[], object]
Make = Callable[[], Call]  # makes a call, on the stream that is current

# Every column of every file by the type of its values; benchmarks/README.md says what they mean.
_NAMES: dict[type, str] = {
    str: """
        benchmark case contender baseline device torch triton commit date what unit formula model route checked
        rewritten skipped equal gradient error kind verdict failed search setting row column network sites
        centre split attacks norm""",
    int: """
        repetitions threads kept_bytes peak_bytes launches graphs forward_images backward_images size site_count
        forward_calls forward_bytes backward_calls backward_bytes image nodes table images attacked steps
        selection_images test_images""",
    float: """
        milliseconds low high ratio compile_seconds of_clone ratio_per_pass device_ms device_ratio host_ms seconds
        beside tolerance mean_error std_error accuracy forward_cpu_s capture_cpu_s find_cpu_s transform_cpu_s alpha
        eps clean clean_change own own_change own_low own_high worst worst_change worst_low worst_high
        selection_change selection_low selection_high base gain strongest_base strongest_gain strongest_low
        strongest_high robust""",
    bool: "chosen convicted",
}
COLUMNS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
# What tables on the terminal leave out.
HIDDEN = {"benchmark", "low", "high", "repetitions", "device", "torch", "threads", "triton", "commit", "date"}


class Row(dict[str, Any]):
    """One line of a result file: its values by `COLUMNS`, read as attributes; None or no text where it has none.

    Raises:
        ValueError: There is no such column.

    Example:
        >>> row = Row(case="a", ratio=1.5, launches=None)
        >>> row.case, row.ratio, row.launches, row.commit, row.but(ratio=2.0)
        ('a', 1.5, None, '', {'case': 'a', 'ratio': 2.0})
    """

    def __init__(self, **given: Any) -> None:
        if unknown := given.keys() - COLUMNS.keys():
            raise ValueError(f"no column {', '.join(sorted(unknown))}: benchmarks.harness has all")
        super().__init__({name: value for name, value in given.items() if value is not None and value != ""})

    def __getattr__(self, name: str) -> Any:
        if name not in COLUMNS:
            raise AttributeError(f"no column {name}")
        return self.get(name, "" if COLUMNS[name] is str else None)

    def but(self, **changed: Any) -> "Row":
        """Return it with other values."""
        return Row(**self | changed)


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


@functools.cache
def _versions() -> dict[str, str | None]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    ask = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    found = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    return {"torch": torch.__version__, "triton": triton, "commit": os.environ.get("MEANSPARSE_FX_COMMIT") or found}


def environment(device: str) -> dict[str, Any]:
    """Return where and when something runs: GPU or CPU, threads, versions, day; the commit is MEANSPARSE_FX_COMMIT."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    today = datetime.date.today().isoformat()
    return {"device": name or platform.processor(), "threads": torch.get_num_threads(), **_versions(), "date": today}


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
        known: dict[str, Any] = {"benchmark": benchmark, "case": case, "contender": name}
        known |= {"milliseconds": middle, "low": low, "high": high, "ratio": ratio_of(own, times[reference])}
        known |= {"baseline": reference, "repetitions": repetitions} | environment(device)
        rows.append(Row(**known | dict((more or {}).get(name, {}))))
    return rows


# Rows that have these in common were measured together, and are replaced together.
TOGETHER = ("case", "baseline", "what", "unit", "model", "table", "column", "network", "alpha", "search", "tolerance")


def _together(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(map(row.get, TOGETHER)), []).append(row)
    return found


def run(cases: Mapping[str, Callable[[], Sequence[Row]]], out: Path | None) -> None:
    """Measure cases, print each one's rows, and put them into a file, if one is given, after each.

    What the file holds of the same case and baseline is replaced; all else stays, so that a run may measure a part, and
    one that is stopped keeps what it had.

    A case that raises a `ModelError`, as where a library is not installed, is skipped, in words. One that raises
    another error of ours or an AssertionError has failed: the others are measured, and the process exits with it.
    """
    held, wrong = _together(read(out)) if out else {}, []
    for name, measured in cases.items():
        try:
            found = measured()
        except ModelError as reason:
            print(f"skipped {name}: {reason}", flush=True)
            continue
        except (AssertionError, MeanSparseError) as reason:
            wrong.append(f"FAILED {name}: {reason}")
            continue
        report(found)
        held |= _together(found)
        if out:
            write([row for rows in held.values() for row in rows], out)
    if wrong:
        sys.exit("\n".join(wrong))


def report(rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    names = [name for name in _columns(rows) if name not in HIDDEN and not name.endswith(("_low", "_high"))]
    values = [[getattr(row, name) for name in names] for row in rows]
    cells = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in values]
    where = [f"{name} {rows[0][name]}" for name in ("benchmark", "device", "threads", "torch") if name in rows[0]]
    show([name.replace("_", " ") for name in names], cells, title=", ".join(where))


def show(heads: Iterable[str], rows: Iterable[Iterable[str]], width: int = 140, **style: Any) -> None:
    """Print a table on the terminal."""
    table = Table(*heads, **style)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def _columns(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV, at once: a killed run leaves a whole file.

    Raises:
        ValueError: There are none, which is no reason to empty a file.
    """
    if not rows:
        raise ValueError(f"no rows for {path}")

    def save(place: Path) -> None:
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, _columns(rows))
            writer.writeheader()
            writer.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save)


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV, none if it is not there."""
    if not path.exists():
        return []
    kinds = COLUMNS | {name: "True".__eq__ for name, kind in COLUMNS.items() if kind is bool}
    with path.open(newline="") as file:
        return [Row(**{n: kinds[n](text) for n, text in line.items() if text}) for line in csv.DictReader(file)]
