"""Measure the paper's tables in small, to stand beside the paper's own numbers in docs/paper.md.

    python -m benchmarks.paper 2 [--data DIRECTORY]      Table 2: trains what it needs, goes on where it was killed
    python -m benchmarks.paper 2 --column ReLU GELU      of a table these columns alone
    python -m benchmarks.paper all                       tables 1 to 12: a few hours on two cores
    python -m benchmarks.paper 11 --bundled --attacked 50 --steps 10 --out DIRECTORY      a look, without data
    python -m benchmarks.paper bundled [--out DIRECTORY]   trains the network, picks the images that the package carries

DIRECTORY holds the IDX files of Fashion-MNIST: Debian's package dataset-fashion-mnist has them, and torchvision's
download in FashionMNIST/raw.
"""

from functools import partial
from pathlib import Path

from meansparse_fx import bundled

from ..harness import RESULTS, ROOT, options, run
from .measure import Laboratory
from .tables import TABLES
from .training import make_bundled


def main() -> None:
    parser = options(__doc__, out="directory of paper-TABLE.csv")
    parser.add_argument("what", nargs="+", choices=(*map(str, TABLES), "all", "bundled"), metavar="TABLE")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--bundled", action="store_true", help="the bundled network and its selection images")
    parser.add_argument("--column", nargs="+", help="only these columns; the file keeps its others")
    parser.add_argument("--attacked", type=int, default=500, help="images to attack")
    parser.add_argument("--steps", type=int, help="of each attack, in place of the table's own")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/paper", help="networks and results of attacks")
    args = parser.parse_args()
    if args.what == ["bundled"]:
        make_bundled(args.data, args.out or Path(bundled.__file__).parent)
        return
    laboratory = Laboratory(None if args.bundled else args.data, args.cache, args.attacked, args.steps)
    for number in TABLES if "all" in args.what else map(int, args.what):
        columns = TABLES[number].columns
        if unknown := set(args.column or ()) - set(columns):
            parser.error(f"table {number}: no column {', '.join(sorted(unknown))}: there are {', '.join(columns)}")
        calls = {column: partial(laboratory.rows, number, column) for column in args.column or columns}
        run(calls, (args.out or RESULTS) / f"paper-{number}.csv")


if __name__ == "__main__":
    main()
