"""Make docs/performance.md, its plots and the README's figures from the files in benchmarks/results/.

    python -m benchmarks.performance [--results DIRECTORY] [--docs DIRECTORY] [--readme FILE] [--summary]

Nothing is measured here. What no file has is "not measured" on the page, whose template is in benchmarks/page/.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .harness import RESULTS, ROOT, options
from .page import sections
from .page.markdown import between_marks, render
from .page.plots import models_figure, roofline_figure
from .page.results import Results, load
from .page.targets import wins

PAGE = "performance.md"
PLOTS = {"performance-models.png": models_figure, "performance-roofline.png": roofline_figure}


def plots(results: Results) -> dict[str, Figure]:
    """Return the plots that have a point, by file."""
    return {name: figure for name, draw in PLOTS.items() if (figure := draw(results)) is not None}


def page(results: Results) -> str:
    """Return the page's text."""
    # The template calls what is in sections.
    return render(PAGE, **vars(sections), results=results, wins=wins, figures=plots(results))


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
    for name, figure in plots(results).items():
        figure.savefig(args.docs / name)
    between_marks(args.readme, "performance", sections.headline(results))
    between_marks(args.docs / "kernels.md", "performance", sections.kernels_on_gpus(results))
    if args.summary:
        print(sections.summary(results))
    print(args.docs / PAGE)


if __name__ == "__main__":
    main()
