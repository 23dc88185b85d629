"""Make docs/performance.md, its plots and the README's figures from the files in benchmarks/results/.

    python -m benchmarks.performance [--results DIRECTORY] [--docs DIRECTORY] [--readme FILE] [--summary]

Nothing is measured here. What no file has is "not measured" on the page, whose prose is in benchmarks/page/.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .harness import RESULTS
from .page.plots import models_figure, roofline_figure
from .page.results import Results, load
from .page.sections import SECTIONS, headline, kernels_on_gpus, summary

TEMPLATE = Path(__file__).parent / "page" / "performance.md"
ROOT = Path(__file__).parents[1]
PAGE = "performance.md"
PLOTS = {"performance-models.png": models_figure, "performance-roofline.png": roofline_figure}
START, END = "<!-- made by benchmarks.performance -->\n", "<!-- end -->"


def page(results: Results) -> str:
    """Return the page's text."""
    text = TEMPLATE.read_text()
    for name in re.findall(r"!\[.*\]\((.*)\)\n\n", text):
        if PLOTS[name](results) is None:  # a plot without a point is left out
            text = re.sub(rf"!\[.*\]\({re.escape(name)}\)\n\n", "", text)
    return re.sub(r"\{\{(\w+)\}\}", lambda found: SECTIONS[found[1]](results), text)


def between_marks(path: Path, text: str) -> None:
    """Put today's figures between the marks of a page."""
    before, _, rest = path.read_text().partition(START)
    _, mark, behind = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} lacks the marks {START.strip()} and {END}")
    path.write_text(f"{before}{START}{text}\n{END}{behind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--summary", action="store_true", help="print the verdicts and the headline, 40 lines at most")
    args = parser.parse_args()
    results = load(args.results)
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / PAGE).write_text(page(results))
    for name, draw in PLOTS.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(args.docs / name)
    between_marks(args.readme, headline(results))
    between_marks(args.docs / "kernels.md", kernels_on_gpus(results))
    if args.summary:
        print(summary(results))
    print(args.docs / PAGE)


if __name__ == "__main__":
    main()
