"""Measure the paper's tables in small, and write them beside the paper's own numbers.

    python -m benchmarks.paper 2 [--data DIRECTORY]      Table 2: trains what it needs, goes on where it was killed
    python -m benchmarks.paper 2 --column ReLU GELU      of a table these columns alone
    python -m benchmarks.paper all                       tables 1 to 12: a few hours on two cores
    python -m benchmarks.paper 11 --bundled --attacked 50 --steps 10 --out DIRECTORY      a look, without data
    python -m benchmarks.paper page                      docs/paper.md and its plots, from the result files

DIRECTORY holds the IDX files of Fashion-MNIST: Debian's package dataset-fashion-mnist has them, and torchvision's
download in FashionMNIST/raw.
"""

from __future__ import annotations

from pathlib import Path

from meansparse_fx.progress import bar

from ..harness import RESULTS, ROOT, options, read, write
from .measure import Laboratory, Row
from .page import print_table, write_page
from .tables import TABLES


def main() -> None:
    parser = options(__doc__, out="directory of paper-TABLE.csv")
    parser.set_defaults(out=RESULTS)
    parser.add_argument("what", nargs="+", choices=(*map(str, TABLES), "all", "page"), metavar="TABLE")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--bundled", action="store_true", help="the bundled network and its selection images")
    parser.add_argument("--column", nargs="+", help="only these columns; the file keeps its others")
    parser.add_argument("--attacked", type=int, default=500, help="images to attack")
    parser.add_argument("--steps", type=int, help="of each attack, in place of the table's own")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/paper", help="networks and results of attacks")
    args = parser.parse_args()
    if args.what == ["page"]:
        write_page(args.out, ROOT / "docs")
        return
    laboratory = Laboratory(None if args.bundled else args.data, args.cache, args.attacked, args.steps)
    numbers = list(TABLES) if "all" in args.what else [int(what) for what in args.what]
    for number in numbers:
        try:
            table, rows = TABLES[number].only(args.column), list[Row]()
        except ValueError as error:
            parser.error(f"table {number}: {error}")
        with bar() as display:
            task = display.add_task(f"table {number}", total=len(table.cells), note=table.title)
            rows.extend(laboratory.rows(number, table, lambda task=task, display=display: display.advance(task)))
        path = args.out / f"paper-{number}.csv"
        rows += [row for row in read(path, Row) if row.column not in table.columns]
        rows.sort(key=lambda row: TABLES[row.table].columns.index(row.column))
        write(rows, path)
        print_table(number, rows)


if __name__ == "__main__":
    main()
