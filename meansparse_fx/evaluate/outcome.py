"""Floor 5: what an evaluation found, image by image, and what may be concluded from it.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table
from torch import Tensor

from ..tables import as_text


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two accuracies on the same images, as fractions.

    Attributes:
        estimate: Second accuracy less the first.
        low, high: 95 % interval, by bootstrap over images.
        p_value: Exact two-sided McNemar test of "no difference".
    """

    estimate: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, resamples: int = 10_000, seed: int = 0) -> PairedDifference:
        """Return the difference ``after - before`` of two ``[N]`` masks of images classified correctly."""
        n = len(before)
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        # Resampling images resamples the three outcomes gained, lost, same.
        draws = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], resamples)
        low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
        discordant = gained + lost
        tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
        return cls((gained - lost) / n, float(low), float(high), min(1.0, 2 * tail))

    def points(self) -> str:
        """Return the difference in percentage points with its interval."""
        return f"{100 * self.estimate:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutcome:
    """Which images one model classifies correctly.

    Attributes:
        clean: ``[N]`` bool, on the images as they are.
        robust: Attack (``name/backward``) to ``[n]`` bool, correct before and after it; n < N if only the first
            n images were attacked.
    """

    clean: Tensor
    robust: dict[str, Tensor] = field(default_factory=dict)

    @property
    def worst(self) -> Tensor:
        """``[n]`` bool: correct under everything that was run."""
        worst = self.clean[: min((len(m) for m in self.robust.values()), default=None)].clone()
        for survived in self.robust.values():
            worst &= survived
        return worst

    def to_dict(self) -> dict:
        """Return accuracies as fractions: clean, robust by attack, worst_case."""
        return {
            "clean": _mean(self.clean),
            "robust": {name: _mean(mask) for name, mask in self.robust.items()},
            "worst_case": _mean(self.worst),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The base and the transformed model under the same attacks on the same images.

    Attributes:
        base, sparse: Their outcomes.
        alpha: Of the transformed model; a mapping by site if the sites differ.
        eps, norm, steps, queries, seed: What the attacker might do.
        seconds: Wall time.
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
    def exact_gain(self) -> PairedDifference:
        """Change of the worst case over the attacks that use the operator's own gradient: what is usually reported."""
        return PairedDifference.of(*(_worst_of(o, "/exact") for o in (self.base, self.sparse)))

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        gain = self.gain
        if not any(name.endswith(("/identity", "/smooth")) for name in self.sparse.robust):
            return (
                f"Not tested against attackers who know the operator: {gain.points()} points under the attacks that "
                "were run. Add the identity backward."
            )
        if gain.low > 0:
            return f"Gain real: worst-case accuracy {gain.points()} points under attackers who know the operator."
        if gain.high < 0:
            return f"Loss: worst-case accuracy {gain.points()} points under attackers who know the operator."
        if self.exact_gain.low > 0:
            return (
                f"Gain masked: {self.exact_gain.points()} points under the operator's own gradient, but "
                f"{gain.points()} under attackers who know it."
            )
        return f"No difference shown: worst-case accuracy {gain.points()} points."

    def to_dict(self) -> dict:
        """Return everything as plain values; accuracies and differences are fractions."""
        differences = {"clean_change": self.clean_change, "gain": self.gain, "exact_gain": self.exact_gain}
        return {
            "alpha": self.alpha,
            "n_test": self.n_test,
            "threat": {k: getattr(self, k) for k in ("norm", "eps", "steps", "queries", "seed")},
            "base": self.base.to_dict(),
            "sparse": self.sparse.to_dict(),
            **{
                name: {"estimate": d.estimate, "low": d.low, "high": d.high, "p_value": d.p_value}
                for name, d in differences.items()
            },
            "verdict": self.verdict,
            "seconds": self.seconds,
        }

    def rows(self) -> list[tuple[str, float, float, PairedDifference]]:
        """Return (what, base accuracy, transformed accuracy, difference) for clean, each attack and the worst case."""
        pairs = [("clean", self.base.clean, self.sparse.clean)]
        pairs += [(name, self.base.robust[name], mask) for name, mask in self.sparse.robust.items()]
        pairs += [("worst case", self.base.worst, self.sparse.worst)]
        return [(what, _mean(b), _mean(s), PairedDifference.of(b, s)) for what, b, s in pairs]

    def table(self) -> Table:
        """Return the comparison as a rich table, in percent."""
        alpha = f"{self.alpha:g}" if isinstance(self.alpha, float) else "per site"
        table = Table(
            title=f"{self.n_test} images, {self.norm} eps {self.eps:.4g}, {self.steps} steps",
            title_justify="left",
            caption=self.verdict,
            caption_justify="left",
            show_edge=False,
            pad_edge=False,
        )
        table.add_column("accuracy in %")
        for column in ("base", f"alpha {alpha}", "change, 95 % interval"):
            table.add_column(column, justify="right")
        for what, base, sparse, difference in self.rows():
            style = "bold" if what == "worst case" else None
            table.add_row(what, f"{100 * base:.1f}", f"{100 * sparse:.1f}", difference.points(), style=style)
        return table

    def __str__(self) -> str:
        return as_text(self.table(), width=110)


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean())


def _worst_of(outcome: ModelOutcome, suffix: str) -> Tensor:
    return ModelOutcome(outcome.clean, {k: v for k, v in outcome.robust.items() if k.endswith(suffix)}).worst
