"""Make docs/performance.md, its plots and the README's figures from the files in benchmarks/results/.

    python -m benchmarks.performance [--results DIRECTORY] [--docs DIRECTORY] [--readme FILE] [--summary]

Nothing is measured here. What no file has is "not measured" on the page, whose prose is in benchmarks/page/.
"""

from __future__ import annotations

import re
from pathlib import Path

from .harness import RESULTS, options
from .page.markdown import between_marks
from .page.plots import models_figure, roofline_figure
from .page.results import Results, load
from .page.sections import SECTIONS, headline, kernels_on_gpus, summary

TEMPLATE = Path(__file__).parent / "page" / "performance.md"
ROOT = Path(__file__).parents[1]
PAGE = "performance.md"
PLOTS = {"performance-models.png": models_figure, "performance-roofline.png": roofline_figure}


def page(results: Results) -> str:
    """Return the page's text."""
    text = TEMPLATE.read_text()
    for name in re.findall(r"!\[.*\]\((.*)\)\n\n", text):
        if PLOTS[name](results) is None:  # a plot without a point is left out
            text = re.sub(rf"!\[.*\]\({re.escape(name)}\)\n\n", "", text)
    return re.sub(r"\{\{(\w+)\}\}", lambda found: SECTIONS[found[1]](results), text)


def main() -> None:
    parser = options(__doc__, out="")
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
    between_marks(args.readme, "performance", headline(results))
    between_marks(args.docs / "kernels.md", "performance", kernels_on_gpus(results))
    if args.summary:
        print(summary(results))
    print(args.docs / PAGE)


if __name__ == "__main__":
    main()
