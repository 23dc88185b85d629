"""Floor 5: the base and the transformed model side by side, and what may be concluded.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from rich.table import Table
from torch import Tensor

from ..artifacts import parsing, read_json, write_json
from ..tables import Tabled, as_csv, new_table, terminal_width
from .attacks import attack_kind
from .outcome import TRANSFER, ModelOutcome, PairedDifference, change, mean
from .sanity import Check
from .surrogates import surrogate
from .threat import AttackSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "meansparse_fx.evaluation", 1  # of the JSON

THREAT = ("norm", "eps", "steps", "queries", "seed")  # what of `AttackSettings` an evaluation says
_OTHER_ROWS = {TRANSFER: "the adversarial images found against the other of the two models"}  # for reports
# An interval that reaches further than this from 0 says little: the largest published gain is 4.0 points.
TELLING = 0.05


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Evaluation(Tabled):
    """The base and the transformed model under the same attacks on the same images.

    Attributes:
        base, sparse: Their outcomes.
        alpha: Of the transformed model; a mapping by site if the sites differ.
        eps, norm, steps, queries, seed: What the attacker might do.
        seconds: Wall time.
        cumulative: Each attack was run only on the images that all before it had left unbroken, so that a row counts
            the images that survive it and those above it.
        checks: Whether the evaluation itself can be trusted.
    """

    base: ModelOutcome
    sparse: ModelOutcome
    alpha: float | dict[str, float]
    eps: float
    norm: str
    steps: int
    queries: int
    seed: int
    seconds: float
    cumulative: bool = False
    checks: tuple[Check, ...] = ()

    @property
    def n_test(self) -> int:
        """Number of images."""
        return len(self.base.clean)

    @property
    def clean_change(self) -> PairedDifference:
        """Change of clean accuracy."""
        return PairedDifference.of(self.base.clean, self.sparse.clean)

    @property
    def gain(self) -> PairedDifference:
        """Change of the worst case over all attacks: what the operator buys."""
        return PairedDifference.of(self.base.worst, self.sparse.worst)

    @property
    def exact_gain(self) -> PairedDifference | None:
        """Change of the worst case over attacks by the operator's own gradient, as is usual; None without any."""
        exact = self._exact_change()
        return None if exact is None else PairedDifference.of_changes(exact)

    @property
    def masked(self) -> PairedDifference | None:
        """How much of `exact_gain` attackers who know the operator take away: the gap between the two gains."""
        exact, worst = self._exact_change(), change(self.base.worst, self.sparse.worst)
        return None if exact is None else PairedDifference.of_changes(exact - worst)

    def _exact_change(self) -> Tensor | None:
        base, sparse = (side.worst_of("/exact") for side in (self.base, self.sparse))
        return None if base is None or sparse is None else change(base, sparse)

    @property
    def warnings(self) -> list[str]:
        """The checks that failed, a sentence each."""
        return [f"{check.name}: {check.finding}." for check in self.checks if not check.passed]

    @property
    def verdict(self) -> str:
        """One plain sentence, and one more for each check that failed."""
        failed = self.warnings
        doubt = f" In doubt, {len(failed)} of the checks failed: {' '.join(failed)}" if failed else ""
        return self._conclusion() + doubt

    def _conclusion(self) -> str:
        if not self.sparse.robust:  # `evaluate` attacks nothing then
            return "Nothing compared: alpha is 0, so the model is its base."
        gain, exact, masked = self.gain, self.exact_gain, self.masked
        if not any("/" in name and not name.endswith("/exact") for name in self.sparse.robust):
            return (
                f"Not tested against attackers who know the operator: {gain.points()} points under the attacks that "
                "were run. Add other backwards: annealed, identity."
            )
        under = exact and f"{exact.points()} points under the operator's own gradient"
        gap = f"the gap of {masked.points()} is gradient masking" if masked and masked.low > 0 else ""
        if gain.low > 0 or gain.high < 0:
            kind, rest = "Gain real" if gain.low > 0 else "Loss", f" It is {under}: {gap}." if gap else ""
            return f"{kind}: worst-case accuracy {gain.points()} points under attackers who know the operator.{rest}"
        if exact and masked and exact.low > 0:
            but = f"{under}, but {gain.points()} under attackers who know it"
            if gap:
                return f"Gain masked: {but}; {gap}."
            return f"Gain not confirmed: {but}; the gap of {masked.points()} may be noise, so more images would tell."
        if max(-gain.low, gain.high) > TELLING:
            return (
                f"Too few images to tell: on {self.n_test}, worst-case accuracy {gain.points()} points, so a gain or a "
                f"loss of {100 * TELLING:g} may have been missed."
            )
        return f"No difference shown: worst-case accuracy {gain.points()} points."

    def in_words(self) -> str:
        """Return what was attacked, and how."""
        return f"{self.n_test} images, {AttackSettings(self.eps, self.norm, self.steps).in_words()}"

    def legend(self) -> dict[str, str]:
        """Return in a line each what the attacks do that were run, and, by ``/name``, the gradients that they used."""
        pairs = [name.partition("/") for name in self.sparse.robust]
        attacks = {name: _OTHER_ROWS.get(name) or attack_kind(name).summary for name, _, _ in pairs}
        return attacks | {f"/{mode}": surrogate(mode).summary for _, slash, mode in pairs if slash}

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Return the evaluation in a file that `save` or a report (``report.json``) wrote.

        Raises:
            ArtifactError: It is something else, or of a newer release.
        """
        known = read_json(path, {FORMAT: VERSION})
        with parsing(path):
            base, sparse = (ModelOutcome.from_dict(known[which]) for which in ("base", "sparse"))
            same = {name: known[name] for name in ("alpha", "seconds", "cumulative")}
            checks = tuple(Check(**check) for check in known["checks"])
            return cls(base, sparse, **same, **known["threat"], checks=checks)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        write_json(path, self.to_dict())

    def figure(self) -> Figure:
        """Return both models' accuracy under each attack, and the changes with intervals, as a matplotlib figure."""
        from .figures import evaluation_figure  # matplotlib takes a second to import

        return evaluation_figure(self)

    def to_csv(self) -> str:
        """Return `rows` as CSV; accuracies and differences are fractions."""
        rows = [
            {"row": what, "base": b, "sparse": s, **change.to_dict(), **self._mious(what)}
            for what, b, s, change in self.rows()
        ]
        return as_csv([row | {"n": self.n_test, "norm": self.norm, "eps": self.eps} for row in rows])

    def to_dict(self) -> dict:
        """Return everything as plain values; accuracies and differences are fractions."""
        differences = ("clean_change", "gain", "exact_gain", "masked")
        return {
            "format": FORMAT,
            "version": VERSION,
            "alpha": self.alpha,
            "n_test": self.n_test,
            "threat": {name: getattr(self, name) for name in THREAT},
            "cumulative": self.cumulative,
            "base": self.base.to_dict(),
            "sparse": self.sparse.to_dict(),
            **{name: (found := getattr(self, name)) and found.to_dict() for name in differences},
            "checks": [asdict(check) for check in self.checks],
            "verdict": self.verdict,
            "seconds": self.seconds,
        }

    def rows(self) -> list[tuple[str, float, float, PairedDifference]]:
        """Return (what, base accuracy, transformed accuracy, difference) for clean, each attack and the worst case."""
        pairs = [("clean", self.base.clean, self.sparse.clean)]
        pairs += [(name, self.base.robust[name], mask) for name, mask in self.sparse.robust.items()]
        pairs += [("worst case", self.base.worst, self.sparse.worst)] if self.base.robust else []
        return [(what, mean(b), mean(s), PairedDifference.of(b, s)) for what, b, s in pairs]

    def table(self) -> Table:
        """Return the comparison as a rich table, in percent, without the verdict."""
        alpha = f"{self.alpha:g}" if isinstance(self.alpha, float) else "per site"
        rows = "; each row: what survives it and all rows above" if self.cumulative else ""
        passed = sum(check.passed for check in self.checks)
        trust = f"Checks of the evaluation itself: {passed} of {len(self.checks)} passed." if self.checks else ""
        title = f"{self.in_words()}{rows}" if self.base.robust else f"{self.n_test} images, not attacked"
        columns = ["accuracy in %", "base", f"alpha {alpha}", "change, 95 % interval"]
        if self.base.miou:
            columns = [f"pixel {columns[0]}", *columns[1:], "mIoU base", f"mIoU alpha {alpha}"]
        table = new_table(*columns, title=title, caption=trust)
        for what, base, sparse, difference in self.rows():
            style = "bold" if what == "worst case" else None
            shares = [f"{100 * share:.1f}" for share in (base, sparse, *self._mious(what).values())]
            table.add_row(what, *shares[:2], difference.points(), *shares[2:], style=style)
        return table

    def _mious(self, row: str) -> dict[str, float]:
        """Return both models' mean intersection over union; nothing where labels are no maps."""
        sides = {"base_miou": self.base.miou, "sparse_miou": self.sparse.miou}
        return {name: miou[row] for name, miou in sides.items() if miou}

    def __repr__(self) -> str:
        return Tabled.__repr__(self) + "\n" + fill(self.verdict, terminal_width())
