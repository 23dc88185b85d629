"""The paper's own numbers where a cell here has a counterpart there, from published.csv: accuracies in percent.

By table, then by the column's and the row's name here. CIFAR-10, ResNet-18 with GELU and eps 8/255 (tables 2 to 11)
stand beside Fashion-MNIST, the bundled network's kind and eps 0.1. Tables 7 and 9 count eps in 255ths: 1 to 4 of them
beside our 0.01 to 0.08 (radii that leave about as much of a network trained on clean images), and 2, 4, 6, 8, 12, 16
beside 0.025 to 0.2. Table 1 has RaWideResNet and WideResNet and no row 0.1, table 10 has 17 sites (the first of each
and the last of each are counterparts), table 12 other networks.
"""

from __future__ import annotations

import csv
from pathlib import Path

Numbers = dict[str, dict[str, tuple[float, float]]]  # column -> row -> (clean, robust)

PUBLISHED: dict[int, Numbers] = {table: {} for table in range(1, 13)}
with Path(__file__).with_suffix(".csv").open(newline="") as _file:
    for _line in csv.DictReader(_file):
        _column = PUBLISHED[int(_line["table"])].setdefault(_line["column"], {})
        _column[_line["row"]] = float(_line["clean"]), float(_line["robust"])


def change(table: int, column: str, row: str) -> float | None:
    """Return by how much the paper's robust accuracy differs from its base's, as a fraction; None without counterpart.

    In tables 7 and 9 the base is a column; in the others it is a row.
    """
    numbers = PUBLISHED[table]
    own = numbers.get(column, {}).get(row)
    base = numbers.get("base", {}).get(row) if table in (7, 9) else numbers.get(column, {}).get("base")
    return None if own is None or base is None else (own[1] - base[1]) / 100
