"""What each table of the paper becomes here, as data: which network, which setting of the operators, which attack."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..training import Recipe

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4)
THRESHOLDS = (0.2, 0.35)  # the two that the paper's tables 5, 7, 9 and 10 look at
SITES = 7  # of the network: the stem's, and two in each of three blocks
# After the paper's own attack: those who know the operator, on what it left. See `evaluate.attacks.VERSIONS`.
KNOWING = ("apgd-ce/identity", "apgd-margin/annealed", "apgd-ce/annealed")
EPS, EPS_L2 = 0.1, 1.5  # the Linf radius it was trained against; an L2 radius that leaves about as much

# The bundled network's training in small: fewer epochs, shorter attacks.
_SMALL = Recipe(epochs=3, steps=2, step_size=0.075)
NETWORKS: dict[str, Recipe] = {
    "GELU": _SMALL,
    **{
        name: replace(_SMALL, activation=name.lower())
        for name in ("ReLU", "ELU", "SiLU", "PSiLU", "PSSiLU")
    },
    "TRADES": replace(_SMALL, method="trades"),
    "standard": replace(_SMALL, method="standard"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Threat:
    """An attacker: what is run, in which ball."""

    attacks: tuple[str, ...] = ("apgd-ce/exact", "apgd-dlr/exact", *KNOWING)  # exact: what the paper calls APGD
    norm: str = "Linf"
    eps: float = EPS
    steps: int = 30


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a table.

    Attributes:
        row, column: Where it stands, in the paper's words.
        alpha: Half width of the band; 0 is the base.
        network: Of `NETWORKS`.
        sites: Indices of the sites that have the operator on; the others have alpha 0.
        centre: Of the band: ``channel``, ``zero`` or ``layer``.
        split: Of Fashion-MNIST: ``test`` or ``train``.
        threat: The attacker.
    """

    row: str
    column: str
    alpha: float
    network: str = "GELU"
    sites: tuple[int, ...] = tuple(range(SITES))
    centre: str = "channel"
    split: str = "test"
    threat: Threat = Threat()


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        title: What it asks.
        row: What its rows are.
        cells: In the order of measurement, the base of a column before its other cells.
    """

    title: str
    row: str
    cells: tuple[Cell, ...]

    def only(self, columns: Collection[str] | None) -> Table:
        """Return the table with these columns alone; with all of them for None.

        Raises:
            ValueError: There is no such column.
        """
        if columns is None:
            return self
        if unknown := set(columns) - set(self.columns):
            raise ValueError(f"no column {', '.join(sorted(unknown))}: there are {', '.join(self.columns)}")
        return replace(self, cells=tuple(c for c in self.cells if c.column in columns))

    @property
    def columns(self) -> list[str]:
        """The columns' names, in order."""
        return list(dict.fromkeys(cell.column for cell in self.cells))


def _sweep(column: str, alphas: tuple[float, ...] = ALPHAS, **given: object) -> list[Cell]:
    return [Cell(f"{alpha:g}" if alpha else "base", column, alpha, **given) for alpha in alphas]  # type: ignore[arg-type]


def _over_eps(values: tuple[float, ...], network: str) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"{eps:g}", f"alpha {alpha:g}" if alpha else "base", alpha, network, threat=Threat(eps=eps))
        for eps in values
        for alpha in (0.0, *THRESHOLDS)
    )


def _single_and_cumulative() -> tuple[Cell, ...]:
    cells = []
    for alpha in THRESHOLDS:
        for scenario, sites in (("single", lambda i: (i,)), ("cumulative", lambda i: tuple(range(i + 1)))):
            column = f"{scenario}, alpha {alpha:g}"
            cells.append(Cell("base", column, 0.0))
            cells += [Cell(str(i), column, alpha, sites=sites(i)) for i in range(SITES)]
    return tuple(cells)


def _flat(*columns: list[Cell]) -> tuple[Cell, ...]:
    return tuple(cell for column in columns for cell in column)


_CE = Threat(attacks=("apgd-ce/exact", *KNOWING))
_SQUARE = Threat(attacks=("square",))


def _of_the_paper(attack: str) -> Threat:
    return Threat(attacks=(f"{attack}/exact", *KNOWING), steps=50)


_PGD = _of_the_paper("pgd")
_ADVERSARIAL = [name for name in NETWORKS if name != "standard"]

TABLES: dict[int, Table] = {
    1: Table(
        "Training and test images, APGD-CE",
        "alpha",
        _flat(
            *(
                _sweep(f"{name}, {split}", network=name, split=split, threat=_CE)
                for name in ("GELU", "ReLU")
                for split in ("train", "test")
            )
        ),
    ),
    2: Table("Activation functions", "alpha", _flat(*(_sweep(n, network=n) for n in list(NETWORKS)[:6]))),
    3: Table("Threat models", "alpha", _flat(_sweep("Linf"), _sweep("L2", threat=Threat(norm="L2", eps=EPS_L2)))),
    4: Table(
        "Queries only: Square",
        "alpha",
        _flat(
            _sweep("Square", threat=_SQUARE),
            _sweep("Square, PSiLU", (0.0, 0.2, 0.4), network="PSiLU", threat=_SQUARE),
        ),
    ),
    5: Table(
        "The paper's adaptive attack, equation 8",
        "alpha",
        _flat(
            _sweep("PGD-50", (0.0, *THRESHOLDS), threat=_PGD),
            *(
                _sweep(f"Adaptive-({p}, {p})", (0.0, *THRESHOLDS), threat=_of_the_paper(f"adaptive-{p}-{p}"))
                for p in (1, 2)
            ),
        ),
    ),
    6: Table("Adversarial training", "alpha", _flat(_sweep("PGD"), _sweep("TRADES", network="TRADES"))),
    7: Table("Standard training", "eps", _over_eps((0.01, 0.02, 0.04, 0.08), "standard")),
    8: Table(
        "Centre of the band",
        "alpha",
        _flat(
            _sweep("zero", centre="zero"),
            _sweep("layer mean", centre="layer"),
            _sweep("channel mean"),
        ),
    ),
    9: Table("Attack strength", "eps", _over_eps((0.025, 0.05, 0.075, 0.1, 0.15, 0.2), "GELU")),
    10: Table("One site, and all up to one", "site", _single_and_cumulative()),
    11: Table(
        "Main path, and after the addition",
        "alpha",
        _flat(_sweep("main path", sites=(1, 3, 5)), _sweep("after addition", sites=(2, 4, 6))),
    ),
    12: Table(
        "PGD-50",
        "alpha",
        _flat(*(_sweep(name, (0.0, 0.2), network=name, threat=_PGD) for name in _ADVERSARIAL)),
    ),
}  # fmt: skip
