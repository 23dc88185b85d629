"""What each table of the paper becomes here, as data: which network, which setting of the operators, which attack."""

from dataclasses import dataclass, replace

from .training import Recipe

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
    """One entry of a table, at ``row`` and ``column`` in the paper's words; alpha 0 is the base.

    Attributes:
        network: Of `NETWORKS`.
        sites: Indices of the sites that have the operator on; the others have alpha 0.
        centre: Of the band: ``channel``, ``zero`` or ``layer``.
        split: Of Fashion-MNIST: ``test`` or ``train``.
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
    """What a table asks, what its rows are, and its cells, in order, the base of a column before its others."""

    title: str
    row: str
    cells: tuple[Cell, ...]

    @property
    def columns(self) -> list[str]:
        """The columns' names, in order."""
        return list(dict.fromkeys(cell.column for cell in self.cells))


def _sweep(column: str, alphas: tuple[float, ...] = ALPHAS, **given: object) -> list[Cell]:
    return [Cell(f"{alpha:g}" if alpha else "base", column, alpha, **given) for alpha in alphas]  # type: ignore[arg-type]


def _over_alpha(title: str, *columns: list[Cell]) -> Table:
    return Table(title, "alpha", tuple(cell for column in columns for cell in column))


def _over_eps(title: str, values: tuple[float, ...], network: str) -> Table:
    names = {alpha: f"alpha {alpha:g}" if alpha else "base" for alpha in (0.0, *THRESHOLDS)}
    threats = {f"{eps:g}": Threat(eps=eps) for eps in values}
    cells = (Cell(eps, names[a], a, network, threat=threat) for eps, threat in threats.items() for a in names)
    return Table(title, "eps", tuple(cells))


def _over_sites(title: str) -> Table:
    cells = []
    for alpha in THRESHOLDS:
        for scenario, sites in (("single", lambda i: (i,)), ("cumulative", lambda i: tuple(range(i + 1)))):
            column = f"{scenario}, alpha {alpha:g}"
            cells.append(Cell("base", column, 0.0))
            cells += [Cell(str(i), column, alpha, sites=sites(i)) for i in range(SITES)]
    return Table(title, "site", tuple(cells))


def _of_the_paper(attack: str) -> Threat:
    return Threat(attacks=(f"{attack}/exact", *KNOWING), steps=50)


_CE = Threat(attacks=("apgd-ce/exact", *KNOWING))
_SQUARE = Threat(attacks=("square",))
_PGD = _of_the_paper("pgd")
_L2 = Threat(norm="L2", eps=EPS_L2)
_PAIR = (0.0, *THRESHOLDS)
_TRAIN_AND_TEST = (
    _sweep(f"{name}, {split}", network=name, split=split, threat=_CE)
    for name in ("GELU", "ReLU")
    for split in ("train", "test")
)
_ADAPTIVE = (_sweep(f"Adaptive-({p}, {p})", _PAIR, threat=_of_the_paper(f"adaptive-{p}-{p}")) for p in (1, 2))
_PSILU = _sweep("Square, PSiLU", (0.0, 0.2, 0.4), network="PSiLU", threat=_SQUARE)
_CENTRES = (_sweep("zero", centre="zero"), _sweep("layer mean", centre="layer"), _sweep("channel mean"))
_PATHS = (_sweep("main path", sites=(1, 3, 5)), _sweep("after addition", sites=(2, 4, 6)))
_ALL = (_sweep(name, (0.0, 0.2), network=name, threat=_PGD) for name in NETWORKS if name != "standard")

TABLES: dict[int, Table] = {
    1: _over_alpha("Training and test images, APGD-CE", *_TRAIN_AND_TEST),
    2: _over_alpha("Activation functions", *(_sweep(name, network=name) for name in list(NETWORKS)[:6])),
    3: _over_alpha("Threat models", _sweep("Linf"), _sweep("L2", threat=_L2)),
    4: _over_alpha("Queries only: Square", _sweep("Square", threat=_SQUARE), _PSILU),
    5: _over_alpha("The paper's adaptive attack, equation 8", _sweep("PGD-50", _PAIR, threat=_PGD), *_ADAPTIVE),
    6: _over_alpha("Adversarial training", _sweep("PGD"), _sweep("TRADES", network="TRADES")),
    7: _over_eps("Standard training", (0.01, 0.02, 0.04, 0.08), "standard"),
    8: _over_alpha("Centre of the band", *_CENTRES),
    9: _over_eps("Attack strength", (0.025, 0.05, 0.075, 0.1, 0.15, 0.2), "GELU"),
    10: _over_sites("One site, and all up to one"),
    11: _over_alpha("Main path, and after the addition", *_PATHS),
    12: _over_alpha("PGD-50", *_ALL),
}
