"""Floor 5: what a search over alpha found, and the rule by which one is chosen. Data and arithmetic; runs no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import fx

from ..artifacts import parsing, read_json, write_json
from ..errors import ArtifactError
from ..evaluate import verdict
from ..evaluate.outcome import ModelOutcome, PairedDifference, mean
from ..evaluate.threat import AttackSettings
from ..operators import added, operators, set_alpha
from ..tables import Tabled, as_csv, new_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "meansparse_fx.search", 1  # of the JSON
_EARLY = "; in parentheses: given up early, of fewer images, so that only the change against base compares"


@dataclass(frozen=True, slots=True)
class Move:
    """One proposal of the search site by site.

    Attributes:
        group: What was moved: a site, or the name of a group of them.
        alpha: What it was to get there.
        clean: Clean accuracy with it.
        attacked: Images attacked with it, before it fell behind or to the end.
        change: Against what stood before, on these images; None if the clean budget refused it.
        taken: Whether it stands now.
    """

    group: str
    alpha: float
    clean: float
    attacked: int
    change: PairedDifference | None
    taken: bool


@dataclass(frozen=True, slots=True, eq=False)
class Refinement:
    """What the search site by site made of one alpha for all.

    Attributes:
        start: That alpha.
        outcome: Of what it ended with.
        moves: All proposals, in order.
    """

    start: float
    outcome: ModelOutcome
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AlphaSearch(Tabled):
    """What a search over alpha found.

    Attributes:
        alpha: The choice; a mapping by site where the search site by site moved some.
        outcomes: alpha to what the model did there, ascending, for the chosen variant; clean on all images, robust on
            those attacked, which are the first ones: fewer where an alpha was given up early.
        clean_budget: Clean accuracy that was allowed to be lost, as a fraction.
        variant: The chosen variant of the operator.
        others: The same as ``outcomes`` for the variants not chosen.
        refinement: Of the search site by site, if there was one.
        threat: What the attacker might do.
        images: Marks of the held-out images (`seen.image_marks`), for `evaluate` to notice that it is given the same.
    """

    alpha: float | dict[str, float]
    outcomes: dict[float, ModelOutcome]
    clean_budget: float
    variant: str = "mean"
    others: dict[str, dict[float, ModelOutcome]] = field(default_factory=dict)
    refinement: Refinement | None = None
    threat: AttackSettings | None = None
    images: tuple[str, ...] = ()

    @property
    def uniform(self) -> float:
        """The best single alpha for all sites."""
        return self.alpha if isinstance(self.alpha, float) else self.refinement.start  # type: ignore[union-attr]

    @property
    def leader(self) -> float:
        """The alpha that looks best of those attacked to the end, beyond noise or not; 0 if none was."""
        finished = {
            alpha: int(o.worst.sum())
            for alpha, o in self.outcomes.items()
            if alpha and len(o.worst) == len(self.base.worst) and within_budget(self.base, o, self.clean_budget)
        }
        return max(finished, key=lambda alpha: finished[alpha], default=0.0)

    @property
    def base(self) -> ModelOutcome:
        """What the base did."""
        return self.outcomes[0.0]

    def change(self, outcome: ModelOutcome) -> PairedDifference:
        """Return the change of the worst case from the base's, on the images on which both were attacked."""
        n = len(outcome.worst)
        return PairedDifference.of(self.base.worst[:n], outcome.worst)

    def comparable(self, outcome: ModelOutcome, attack: str | None = None) -> float:
        """Return the accuracy to be expected on all attacked images: the base's there, and the paired change.

        An alpha given up early was attacked on fewer images, easier or harder ones; its plain share says less.

        Args:
            outcome: Of an alpha.
            attack: Under this attack; None for the worst case.
        """
        own, base = (o.worst if attack is None else o.robust[attack] for o in (outcome, self.base))
        return mean(base) + mean(own) - mean(base[: len(own)])

    def rows(self) -> Iterator[tuple[str, float, ModelOutcome]]:
        """Yield (variant, alpha, outcome): the chosen variant's alphas, then the others'."""
        for variant, outcomes in ({self.variant: self.outcomes} | self.others).items():
            for alpha, outcome in outcomes.items():
                if alpha or variant == self.variant:  # the base is the same for all
                    yield variant, alpha, outcome

    def apply(self, sparse: fx.GraphModule) -> None:
        """Set the choice in a model, which keeps how it came about: `save` writes that along."""
        added(sparse).choice = self.to_dict()
        for operator in operators(sparse).values():
            operator.set_variant(self.variant)
        set_alpha(sparse, self.alpha)

    @classmethod
    def load(cls, path: str | Path) -> AlphaSearch:
        """Return the search in a file that `save`, ``select --out`` or a report (``report.json``) wrote.

        Raises:
            ArtifactError: It is something else, or of a newer release.
        """
        whole = read_json(path, {FORMAT: VERSION, verdict.FORMAT: verdict.VERSION})
        known = whole if whole["format"] == FORMAT else whole.get("search")
        if known is None:
            raise ArtifactError(f"{path}: a report without a search for alpha")
        with parsing(path):
            return cls._from_dict(known)

    @classmethod
    def _from_dict(cls, known: Mapping[str, Any]) -> AlphaSearch:
        outcomes: dict[str, dict[float, ModelOutcome]] = {}
        for row in known["rows"]:
            outcomes.setdefault(row["variant"], {})[row["alpha"]] = ModelOutcome.from_dict(row)
        own = outcomes.pop(known["variant"])
        others = {variant: {0.0: own[0.0]} | rows for variant, rows in outcomes.items()}
        refinement = known.get("refinement")
        if refinement is not None:
            moves = tuple(
                Move(**move | {"change": move["change"] and PairedDifference(**move["change"])})
                for move in refinement["moves"]
            )
            refinement = Refinement(refinement["start"], ModelOutcome.from_dict(refinement), moves)
        threat, marks = known["threat"] and AttackSettings(**known["threat"]), tuple(known.get("marks", ()))
        return cls(known["alpha"], own, known["clean_budget"], known["variant"], others, refinement, threat, marks)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        write_json(path, self.to_dict())

    def figure(self, tradeoff: bool = False) -> Figure:
        """Return accuracy over alpha, or clean accuracy against the worst case, as a matplotlib figure."""
        from . import figures  # matplotlib takes a second to import

        return figures.tradeoff_figure(self) if tradeoff else figures.alpha_figure(self)

    def to_csv(self) -> str:
        """Return one row an alpha as CSV; accuracies and the change of the worst case are fractions."""

        def flat(row: dict) -> dict:
            first = {name: row[name] for name in ("variant", "alpha", "clean", "attacked")}
            return first | row["robust"] | {"worst case": row["worst_case"]} | row["change"]

        return as_csv([flat(row) for row in self.to_dict()["rows"]])

    def to_dict(self) -> dict:
        """Return the choice and one row an alpha as plain values; accuracies are fractions."""

        def plain(outcome: ModelOutcome) -> dict:
            return {**outcome.to_dict(), "change": self.change(outcome).to_dict()}

        rows = [{"variant": v, "alpha": a, "attacked": len(o.worst), **plain(o)} for v, a, o in self.rows()]
        found: dict = {
            "format": FORMAT,
            "version": VERSION,
            "alpha": self.alpha,
            "variant": self.variant,
            "leader": self.leader,
            "clean_budget": self.clean_budget,
            "threat": self.threat and asdict(self.threat),
            "marks": list(self.images),
            "rows": rows,
        }
        if self.refinement is not None:
            found["refinement"] = {
                "start": self.refinement.start,
                **plain(self.refinement.outcome),
                "moves": [asdict(move) for move in self.refinement.moves],
            }
        return found

    def table(self) -> Table:
        """Return the search as a rich table, in percent."""
        base = self.base
        early = any(len(outcome.worst) < len(base.worst) for _, _, outcome in self.rows())
        title = (
            f"{len(base.clean)} held-out images, {len(base.worst)} of them attacked{self.threat_in_words()}; "
            f"at most {100 * self.clean_budget:.1f} points of clean loss{_EARLY if early else ''}"
        )
        columns = ("alpha", "clean", "attacked", *base.robust, "worst\ncase", "against base", "")
        optional = ("attacked", *base.robust)
        table = new_table(*columns, optional=optional, title=title, caption=self._caption())
        table.columns[0].justify = "right"
        table.columns[-2].no_wrap = True
        rows = [
            (f"{v} {alpha:g}" if self.others and alpha else f"{alpha:g}", o, (alpha, v) == (self.uniform, self.variant))
            for v, alpha, o in self.rows()
        ]
        if self.refinement is not None and not isinstance(self.alpha, float):
            rows.append(("by site", self.refinement.outcome, True))
        for label, outcome, chosen in rows:
            masks, attacked = (outcome.clean, *outcome.robust.values(), outcome.worst), len(outcome.worst)
            clean, *robust = (f"{100 * mean(mask):.1f}" for mask in masks)
            if attacked < len(base.worst):
                robust = [f"({share})" for share in robust]
            against = "" if outcome is base else self.change(outcome).points()
            mark, style = ("chosen", "bold") if chosen else ("", None)
            table.add_row(label, clean, f"{attacked}", *robust, against, mark, style=style)
        return table

    def _caption(self) -> str | None:
        if self.refinement is None:
            return None
        taken = [f"{move.group} to {move.alpha:g}" for move in self.refinement.moves if move.taken]
        moved = ", ".join(taken) if taken else "none was better beyond noise"
        return f"Site by site from alpha {self.refinement.start:g}, {len(self.refinement.moves)} moves tried: {moved}"

    def threat_in_words(self) -> str:
        """Return norm, eps and steps, with a comma before them; nothing where they are not known."""
        return "" if self.threat is None else f", {self.threat.in_words()}"


def within_budget(base: ModelOutcome, outcome: ModelOutcome, clean_budget: float) -> bool:
    """Return whether the clean accuracy lost to the base is within the budget."""
    return mean(outcome.clean) >= mean(base.clean) - clean_budget - 1e-12


def better(before: ModelOutcome, after: ModelOutcome, significance: float) -> bool:
    """Return whether the worst case is better beyond noise: one-sided test of the paired difference."""
    change = PairedDifference.of(before.worst, after.worst)
    return change.estimate > 0 and change.p_value / 2 <= significance


def choose(
    outcomes: Mapping[tuple[float, str], ModelOutcome], clean_budget: float, significance: float
) -> tuple[float, str]:
    """Return the (alpha, variant) to take among those that were attacked on all images.

    From the smallest alpha up, one takes the place of the one chosen so far only if it is better beyond noise; the
    first is the base. Those over the clean budget are passed over.

    Args:
        outcomes: By (alpha, variant), in the order of preference, the base first.
        clean_budget: As a fraction.
    """
    (chosen, base), *rest = outcomes.items()
    incumbent = base
    for candidate, outcome in rest:
        finished = len(outcome.worst) == len(base.worst)
        if finished and within_budget(base, outcome, clean_budget) and better(incumbent, outcome, significance):
            chosen, incumbent = candidate, outcome
    return chosen
