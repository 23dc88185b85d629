"""Transform a fixed list of models, and write what became of each as a table.

    python -m benchmarks.zoo [--extra] [--only PATTERN] [--fresh] [--out FILE]

Every RobustBench architecture, the families of timm and of torchvision, with random weights; on one core about a
quarter of an hour. With --extra instead models of transformers, segmentation_models_pytorch and open_clip, which have
to be installed, and torchvision's for segmentation; some minutes. Whatever `transform` itself has checked, each
transformed model is run here, and compared with its base in numbers. Seconds are those of the processor: other work on
the machine lengthens them a little, and wall time a lot. The CSV is written model by model: what it holds is not
measured again unless --fresh. The page in docs/ is made from both CSVs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import meansparse_fx
from meansparse_fx.outputs import flatten
from meansparse_fx.zoo import input_shape

from . import harness
from .harness import RESULTS, ROOT, options, place
from .page.markdown import render
from .zoo_models import EXTRA, MODELS, build, library

DOC = ROOT / "docs" / "zoo.md"
SMALL = 96  # pixels; models that insist on a size of their own get it


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one model; the fields are the CSV's columns.

    Attributes:
        model, image: As `load_model` takes it, and the side of the images, in pixels.
        route: How the graph was captured.
        checked: By what `transform` saw that it is the model: ``operations`` or ``numbers``.
        rewritten, skipped: Sites by kind, and by the first words of the reason.
        equal: ``bitwise``, or the largest difference between transformed model and base at alpha 0 (eager lowering).
        gradient: The same of the gradients with respect to the images; ``none`` if the base has none.
        forward_cpu_s: One forward pass of the base on two images, as a measure for the next ones; the model's first.
        capture_cpu_s, find_cpu_s, transform_cpu_s: Capture with its checks; finding the sites; all of `transform`.
        torch: Of models of other libraries also their library.
    """

    model: str
    image: int = 0
    route: str = ""
    checked: str = ""
    rewritten: str = ""
    skipped: str = ""
    nodes: int = 0
    equal: str = ""
    gradient: str = ""
    forward_cpu_s: float = 0.0
    capture_cpu_s: float = 0.0
    find_cpu_s: float = 0.0
    transform_cpu_s: float = 0.0
    error: str = ""
    device: str = ""
    torch: str = ""
    threads: int = 0


def measure(name: str) -> Row:
    """Return the row of one model."""
    known = {"model": name} | place("cpu") | {"torch": " with ".join([torch.__version__, *library(name)])}
    try:
        model = build(name)
        images, expected, known["forward_cpu_s"] = _first_forward(model)
        known["image"] = images.shape[-1]
        with _stopwatch() as (seconds, results):
            start = time.process_time()
            sparse = meansparse_fx.transform(model, images)
            known["transform_cpu_s"] = round(time.process_time() - start, 3)
        plan = meansparse_fx.inspect(sparse)
        known |= {
            "route": plan.route,
            "checked": results["capture"].checked,
            "rewritten": _counts(site.kind for site in plan.active),
            "skipped": _counts(site.refusal.kind for site in plan if site.refusal),
            "nodes": len(sparse.graph.nodes),
            "equal": _difference(sparse(images), expected),
            "gradient": _difference(_gradient(sparse, images), _gradient(model, images)),
            "capture_cpu_s": seconds["capture"],
            "find_cpu_s": seconds["find_sites"],
        }
    except Exception as error:  # a row with its error, whatever it is
        known["error"] = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:600]
    return Row(**known)


def _first_forward(model: nn.Module) -> tuple[Tensor, Any, float]:
    """Return images that the model takes, what it makes of them, and the seconds it takes for that."""
    own = input_shape(model)
    sizes = [own[-1]] if own[-1] < SMALL else [SMALL, own[-1]]
    while True:
        size = sizes.pop(0)
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            start = time.process_time()
            return images, model(images), round(time.process_time() - start, 3)
        except Exception:
            if not sizes:
                raise


@contextlib.contextmanager
def _stopwatch() -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
    """Yield the processor's seconds that `transform` spends in its phases, and what each of them returns."""
    verbs = importlib.import_module("meansparse_fx.transform")
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            results[name] = function(*args, **kwargs)
            seconds[name] = round(time.process_time() - start, 3)
            return results[name]

        return call

    with contextlib.ExitStack() as stack:
        for name in ("capture", "find_sites"):
            stack.enter_context(mock.patch.object(verbs, name, timed(name, getattr(verbs, name))))
        yield seconds, results


def _counts(words: Any) -> str:
    return " ".join(f"{word.replace(' ', '-')}:{count}" for word, count in Counter(words).items())


def _gradient(model: nn.Module, images: Tensor) -> Tensor | None:
    """Return the gradient of a combination of all that a model returns with respect to the images; None if none."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        parts = [t for t in flatten(model(images.clone()))[0] if isinstance(t, Tensor)]
        total = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in parts)
    return torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None


def _difference(actual: Any, expected: Any) -> str:
    (parts, form), (others, other_form) = flatten(actual), flatten(expected)
    if form != other_form:
        return "other containers"
    differences = []
    for a, b in zip(parts, others, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if a is not b and a != b:
                return "only one has any"
        elif not b.isfinite().all():
            return "not finite"
        elif not torch.equal(a, b):
            differences.append((a - b).abs().max().item())
    if not any(isinstance(part, Tensor) for part in others):
        return "none"
    return f"{max(differences):.1e}" if differences else "bitwise"


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a CSV by model."""
    return {row.model: row for row in harness.read(path, Row)}


def write(rows: dict[str, Row], path: Path) -> None:
    """Write the rows in the order of the lists."""
    harness.write([rows[name] for name in (*MODELS, *EXTRA) if name in rows], path)


# The page.


def page(rows: Sequence[Row], extra: Sequence[Row] = ()) -> str:
    """Return docs/zoo.md, of the list and of other libraries' models."""
    captured = [row for row in rows if row.route]
    return render(
        "zoo.md", rows=rows, extra=extra, captured=captured, Counter=Counter, spoken=_spoken, total=_total, cell=_cell,
        equal=_spoken("bitwise" if row.equal == "bitwise" else "within rounding" for row in captured),
        bitwise=sum(row.equal == row.gradient == "bitwise" for row in extra),
        where="; ".join(sorted({f"{row.device}, torch {row.torch}, {row.threads} threads" for row in rows})),
        libraries="; ".join(sorted({row.torch for row in extra})),
    )  # fmt: skip


def _spoken(words: Iterable[str] | Counter) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def _total(rows: Sequence[Row], column: str) -> str:
    totals: Counter = Counter()
    for row in rows:
        for item in getattr(row, column).split():
            word, _, count = item.rpartition(":")
            totals[word.replace("-", " ") if column == "skipped" else word] += int(count)
    return _spoken(totals) or "none"


def _cell(text: str) -> str:
    # Paths of one machine mean nothing on another.
    return re.sub(r"/\S*/(?:site-packages|lib/python[\d.]+)/", "", text).replace("|", "\\|")


def main() -> None:
    """Measure what the CSV lacks, and write both files."""
    parser = options(__doc__, out="[zoo.csv or zoo-extra.csv in benchmarks/results]")
    parser.add_argument("--extra", action="store_true", help="models of other libraries")
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose name matches this expression")
    parser.add_argument("--fresh", action="store_true", help="measure also what the CSV holds")
    args = parser.parse_args()
    os.environ["MEANSPARSE_FX_LOWERING"] = "eager"
    torch.backends.mha.set_fastpath_enabled(False)  # rounds differently, and transform turns it off, too
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")  # the libraries' own
    args.out = args.out or RESULTS / ("zoo-extra.csv" if args.extra else "zoo.csv")
    rows = read(args.out)
    for name in EXTRA if args.extra else MODELS:
        if not re.search(args.only, name) or (name in rows and not args.fresh):
            continue
        rows[name] = row = measure(name)
        print(f"{name}: {row.route or row.error} {row.rewritten} {row.skipped} {row.equal}", flush=True)
        write(rows, args.out)
        gc.collect()
    both = (read(RESULTS / "zoo.csv"), rows) if args.extra else (rows, read(RESULTS / "zoo-extra.csv"))
    DOC.write_text(page(*([found[name] for name in (*MODELS, *EXTRA) if name in found] for found in both)))


if __name__ == "__main__":
    main()
