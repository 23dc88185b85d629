"""Make every page, plot and table of README and docs that has figures from the files in benchmarks/results/.

    python -m benchmarks.page [--results DIRECTORY] [--root DIRECTORY] [--summary]
    python -m benchmarks.page --count     first count anew what the operator must move, for roofline.csv

Nothing is measured here. What no file has is "not measured" on the page. Templates are in benchmarks/page/.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from meansparse_fx.plots import picture

from ..contenders import MODELS, counts
from ..harness import RESULTS, ROOT, Row, options, run
from ..judge import THREAT
from ..paper.tables import NETWORKS, SITES, TABLES
from . import paper, speed
from .markdown import between_marks, points, render
from .results import Results
from .targets import wins


def performance_page(results: Results) -> str:
    """Return docs/performance.md; the template calls what is in `speed`."""
    return render("performance.md", **vars(speed), results=results, wins=wins)


def paper_page(results: Results) -> str:
    """Return docs/paper.md."""
    given = {"TABLES": TABLES, "SITES": SITES, "networks": len(NETWORKS), "measured": results.paper}
    given |= {"figures": paper.drawn(results), "choice": results.choice, "summary": paper.summary(results.paper)}
    return render("paper.md", **given, finding=paper.finding, lines=paper.lines, points=points)


def zoo_page(results: Results) -> str:
    """Return docs/zoo.md, of the list and of other libraries' models."""
    rows, extra = results.zoo, results.extra
    captured = [row for row in rows if row.route]
    return render(
        "zoo.md", rows=rows, extra=extra, captured=captured, Counter=Counter,
        counted=_counted, total=_total, cell=_cell,
        equal=_counted("bitwise" if row.equal == "bitwise" else "within rounding" for row in captured),
        bitwise=sum(row.equal == row.gradient == "bitwise" for row in extra),
        where="; ".join(sorted({f"{row.device}, torch {row.torch}, {row.threads} threads" for row in rows})),
        libraries="; ".join(sorted({row.torch for row in extra})),
    )  # fmt: skip


def _counted(words: Iterable[str] | Counter) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def _total(rows: Sequence[Row], column: str) -> str:
    totals: Counter = Counter()
    for row in rows:
        for item in getattr(row, column).split():
            word, _, count = item.rpartition(":")
            totals[word.replace("-", " ") if column == "skipped" else word] += int(count)
    return _counted(totals) or "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


COUNTED = ("WRN-16-4", "WRN-28-10", "RaWRN-small", "ResNet-50", "ConvNeXt-T", "Swin-T")
# What is written whole, and between two marks of a page.
PAGES = {"performance.md": performance_page, "paper.md": paper_page, "zoo.md": zoo_page}
PARTS = {
    ("README.md", "performance"): speed.headline,
    ("docs/kernels.md", "kernels"): speed.kernels_on_gpus,
    ("docs/robustness.md", "judge"): lambda results: render("judge.md", rows=results.judge, threat=THREAT),
    ("docs/robustness.md", "strongest"): lambda results: render("strongest.md", rows=results.strongest),
}


def write_pages(results: Results, root: Path) -> None:
    """Write everything below ``root``, in its README.md and docs/; the zoo, judge and strongest if they have a file."""
    needs = {"zoo.md": results.zoo, "judge": results.judge, "strongest": results.strongest}
    for name, page in PAGES.items():
        if needs.get(name, True):
            (root / "docs" / name).write_text(page(results))
    for (path, part), text in PARTS.items():
        if needs.get(part, True):
            between_marks(root / path, part, text(results))
    figures = {"performance-models.png": speed.figure_of(results.models)} if results.models else {}
    figures |= {f"paper-{number}.png": paper.figure_of(number, rows) for number, rows in paper.drawn(results).items()}
    for name, figure in figures.items():
        figure.set_dpi(130)
        (root / "docs" / name).write_bytes(picture(figure))


def main() -> None:
    parser = options(__doc__, out="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/")
    parser.add_argument("--summary", action="store_true", help="print verdicts and headline of GPUs, 40 lines at most")
    parser.add_argument("--count", nargs="*", choices=MODELS, help="models, by default those that are counted")
    args = parser.parse_args()
    if args.count is not None:
        calls = {name: partial(counts, name) for name in args.count or COUNTED}
        run(calls, args.results / "roofline.csv")
    write_pages(Results(args.results), args.root)
    if args.summary:
        print(speed.summary(Results(args.results, gpu=True)))
    print(args.root / "docs")


if __name__ == "__main__":
    main()
