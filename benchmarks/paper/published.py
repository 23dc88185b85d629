"""The paper's own numbers where a cell here has a counterpart there: clean and robust accuracy in percent.

By table, then by the column's and the row's name here. CIFAR-10, ResNet-18 with GELU and eps 8/255 (tables 2 to 11)
stand beside Fashion-MNIST, the bundled network's kind and eps 0.1.
"""

from __future__ import annotations

Numbers = dict[str, dict[str, tuple[float, float]]]  # column -> row -> (clean, robust)

_ROWS = ("base", "0.1", "0.2", "0.3", "0.4")


def _column(*pairs: tuple[float, float], rows: tuple[str, ...] = _ROWS) -> dict[str, tuple[float, float]]:
    return dict(zip(rows, pairs, strict=True))


_GELU = _column((84.59, 49.12), (84.58, 49.57), (84.32, 50.37), (83.95, 51.13), (82.85, 51.25))
# Table 1 has no row 0.1.
_FROM_02 = ("base", "0.2", "0.3", "0.4")
_PAIR = ("base", "0.2", "0.35")
# Tables 7 and 9 count eps in 255ths, 8 of them what the network was trained against: here 0.1.
_STRENGTHS = ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2")  # 2, 4, 6, 8, 12 and 16 of 255
_CLEAN = {"base": 84.59, "alpha 0.2": 84.32, "alpha 0.35": 83.51}
_CLEAN_STANDARD = {"base": 94.36, "alpha 0.2": 94.20, "alpha 0.35": 93.61}


def _strengths(rows: tuple[str, ...], clean: dict[str, float], **robust: tuple[float, ...]) -> Numbers:
    columns = zip(clean, robust.values(), strict=True)
    return {
        column: {row: (clean[column], r) for row, r in zip(rows, values, strict=True)} for column, values in columns
    }


PUBLISHED: dict[int, Numbers] = {
    1: {
        # RaWideResNet and WideResNet there.
        "GELU, train": _column((99.15, 93.44), (99.13, 93.75), (99.07, 93.49), (98.87, 92.48), rows=_FROM_02),
        "GELU, test": _column((93.27, 73.87), (93.26, 74.52), (93.17, 74.63), (92.88, 73.90), rows=_FROM_02),
        "ReLU, train": _column((99.37, 94.69), (99.33, 94.93), (99.29, 94.58), (99.11, 93.27), rows=_FROM_02),
        "ReLU, test": _column((93.26, 73.45), (93.18, 74.11), (92.90, 74.04), (92.38, 73.32), rows=_FROM_02),
    },
    2: {
        "ReLU": _column((83.59, 47.77), (83.59, 48.25), (83.71, 48.88), (83.48, 49.24), (82.49, 48.87)),
        "ELU": _column((81.65, 46.65), (81.58, 48.69), (81.53, 49.49), (81.20, 48.66), (78.77, 46.10)),
        "GELU": _GELU,
        "SiLU": _column((83.05, 48.54), (83.09, 49.05), (83.01, 50.01), (82.78, 50.81), (81.34, 49.97)),
        "PSiLU": _column((84.80, 48.02), (84.72, 48.58), (84.69, 49.07), (84.27, 49.35), (83.20, 48.76)),
        "PSSiLU": _column((83.95, 48.03), (83.95, 48.61), (83.79, 49.29), (83.81, 49.19), (82.69, 48.63)),
    },
    3: {
        "Linf": _GELU,
        "L2": _column((84.59, 59.98), (84.58, 60.53), (84.32, 61.36), (83.95, 61.73), (82.85, 61.74)),
    },
    4: {"Square": _column((84.59, 57.37), (84.58, 58.19), (84.32, 60.30), (83.95, 61.32), (82.85, 61.49))},
    5: {
        "PGD-50": _column((84.59, 51.56), (84.32, 53.89), (83.51, 55.50), rows=_PAIR),
        "Adaptive-(1, 1)": _column((84.59, 51.56), (84.32, 53.56), (83.51, 55.36), rows=_PAIR),
        "Adaptive-(2, 2)": _column((84.59, 51.56), (84.32, 53.58), (83.51, 55.26), rows=_PAIR),
    },
    6: {
        "PGD": _GELU,
        "TRADES": _column((83.01, 47.03), (83.09, 47.61), (83.08, 48.64), (82.92, 49.34), (82.20, 48.76)),
    },
    # 1 to 4 of 255 there, radii that leave about as much of a network that was trained on clean images.
    7: _strengths(
        ("0.01", "0.02", "0.04", "0.08"),
        _CLEAN_STANDARD,
        base=(49.09, 4.86, 0.07, 0.0),
        small=(52.06, 7.69, 0.24, 0.01),
        large=(56.36, 14.52, 1.33, 0.03),
    ),
    8: {
        "zero": _column((84.59, 49.12), (84.50, 49.63), (84.06, 50.98), (82.81, 52.08), (79.84, 51.72)),
        "layer mean": _column((84.59, 49.12), (84.52, 49.45), (84.13, 50.23), (83.27, 50.87), (81.09, 49.93)),
        "channel mean": _GELU,
    },
    9: _strengths(
        _STRENGTHS,
        _CLEAN,
        base=(77.72, 68.88, 58.95, 49.12, 28.12, 11.97),
        small=(77.60, 69.08, 59.92, 50.37, 29.77, 13.41),
        large=(76.47, 68.80, 60.15, 51.36, 31.50, 15.44),
    ),
    # 17 sites there: the first of each and the last of each are counterparts.
    10: {
        "single, alpha 0.2": {"base": (84.59, 49.12), "0": (84.52, 49.34), "6": (84.63, 49.09)},
        "cumulative, alpha 0.2": {"base": (84.59, 49.12), "0": (84.52, 49.37), "6": (84.32, 50.37)},
        "single, alpha 0.35": {"base": (84.59, 49.12), "0": (84.21, 49.19), "6": (84.75, 49.01)},
        "cumulative, alpha 0.35": {"base": (84.59, 49.12), "0": (84.21, 49.19), "6": (83.51, 51.36)},
    },
    11: {
        "main path": _column((84.59, 49.12), (84.59, 49.31), (84.40, 49.63), (83.94, 49.88), (82.96, 49.91)),
        "after addition": _column((84.59, 49.12), (84.59, 49.43), (84.47, 49.66), (84.27, 49.90), (83.67, 49.24)),
    },
    # Other networks there: WRN-94-16, RaWRN-70-16, WRN-70-16 (CIFAR-100), Swin-L, ConvNeXt-L; see the page's words.
    12: {},
}


def change(table: int, column: str, row: str) -> float | None:
    """Return by how much the paper's robust accuracy differs from its base's, as a fraction; None without counterpart.

    In tables 7 and 9 the base is a column; in the others it is a row.
    """
    numbers = PUBLISHED[table]
    own = numbers.get(column, {}).get(row)
    base = numbers.get("base", {}).get(row) if table in (7, 9) else numbers.get(column, {}).get("base")
    return None if own is None or base is None else (own[1] - base[1]) / 100
