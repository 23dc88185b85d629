"""Floor 5: successive halving: candidates under attack on the same held-out images, the hopeless ones on few of them.

Attacks and keeps what was found; what is chosen is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..evaluate.attacks import AttackSettings
from ..evaluate.compiled import Attacked
from ..evaluate.ledger import Ledger
from ..evaluate.outcome import ModelOutcome
from ..evaluate.plan import Run, correct, device_of, perturbed
from ..operators import operators, set_alpha
from .result import within_budget

Alpha = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of the operators.

    Attributes:
        alpha: One for all sites, or by site.
    """

    alpha: Alpha
    variant: str = "mean"

    def __str__(self) -> str:
        if not isinstance(self.alpha, Mapping):
            return f"{self.variant} {self.alpha!r}"
        written = json.dumps(dict(self.alpha), sort_keys=True).encode()
        return f"{self.variant} {hashlib.blake2b(written, digest_size=16).hexdigest()}"

    def set(self, sparse: fx.GraphModule) -> None:
        """Make the model this candidate."""
        for operator in operators(sparse).values():
            operator.set_variant(self.variant)
        set_alpha(sparse, self.alpha)


class Trials:
    """A model, the images it is tried on, and what its settings did so far.

    Args:
        sparse: The model; its alphas and variants are changed.
        data: Batches of (images, labels) on any device.
        attacked: Number of images to attack, the first ones; None for all.
        runs, settings: The attacks.
        full_rows: Every run attacks all images, also those broken before it.
        compile, amp: How attacks run the model; see `evaluate.compiled`.
    """

    def __init__(
        self,
        sparse: fx.GraphModule,
        data: Sequence[tuple[Tensor, Tensor]],
        attacked: int | None,
        runs: Sequence[Run],
        settings: AttackSettings,
        ledger: Ledger,
        full_rows: bool = False,
        compile: bool | str | None = False,
        amp: torch.dtype | None = None,
    ) -> None:
        self._sparse, self._data, self._runs, self._settings = sparse, data, runs, settings
        self._ledger, self._full_rows = ledger, full_rows
        self._attacked = Attacked({"sparse": sparse}, compile, amp)
        self._device = device_of(sparse)
        count = sum(len(labels) for _, labels in data)
        self.attacked = count if attacked is None else min(attacked, count)
        needed = _batches_with(data, self.attacked)
        self._images, self._labels = (torch.cat(parts)[: self.attacked] for parts in zip(*needed, strict=True))
        self._batch_size = len(data[0][1])
        self._robust: dict[str, dict[str, Tensor]] = {}
        for index, (images, labels) in enumerate(data):
            ledger.require_same(f"batch {index}", images, labels)
        ledger.require_whole([f"batch {index}" for index in range(len(data))])

    def attacks_left(self, start: int, stop: int) -> int:
        """Return how many attacks on batches it takes to bring one candidate from ``start`` to ``stop`` images."""
        return len(self._runs) * math.ceil((stop - start) / self._batch_size)

    def outcome(self, candidate: Candidate) -> ModelOutcome:
        """Return what a candidate did so far; at the least its clean accuracy on all images."""
        name = str(candidate)
        kept = self._ledger.get_or_compute(f"{name}, clean", lambda: {"clean": self._right(candidate)})
        return ModelOutcome(kept["clean"], self._robust.get(name, {}))

    def attack(self, candidate: Candidate, stop: int, advance: Callable[[], object]) -> ModelOutcome:
        """Attack a candidate on the images up to ``stop`` that it has not seen, and return what it did so far."""
        name = str(candidate)
        clean = self.outcome(candidate).clean
        robust = self._robust.setdefault(name, {run.name: torch.zeros(0, dtype=torch.bool) for run in self._runs})
        start = len(robust[self._runs[0].name])
        for low in range(start, stop, self._batch_size):
            high = min(low + self._batch_size, stop)
            standing = clean[low:high]
            for run in self._runs:
                survived = self._survivors(candidate, run, low, high, standing)
                robust[run.name] = torch.cat([robust[run.name], survived])
                if not self._full_rows:
                    standing = survived
                advance()
        return self.outcome(candidate)

    def _right(self, candidate: Candidate) -> Tensor:
        candidate.set(self._sparse)
        parts = ((images.to(self._device), labels.to(self._device)) for images, labels in self._data)
        return torch.cat([correct(self._sparse, *part).cpu() for part in parts])

    def _survivors(self, candidate: Candidate, run: Run, low: int, high: int, standing: Tensor) -> Tensor:
        def work() -> dict[str, Tensor]:
            candidate.set(self._sparse)
            target = standing.to(self._device)
            images, labels = (part[low:high].to(self._device)[target] for part in (self._images, self._labels))
            found = perturbed(self._attacked.by(run, "sparse"), run, images, labels, self._settings)
            return {"survived": torch.zeros_like(target).masked_scatter(target, correct(self._sparse, found, labels))}

        return self._ledger.get_or_compute(f"{candidate}, {low} to {high}, {run.name}", work)["survived"]


def rung_sizes(attacked: int, count: int) -> list[int]:
    """Return numbers of images that double up to ``attacked``.

    Example:
        >>> rung_sizes(400, 3)
        [100, 200, 400]
    """
    return sorted({max(1, attacked // 2**k) for k in range(count)})


def successive_halving(
    trials: Trials,
    candidates: Sequence[Candidate],
    rungs: Sequence[int],
    clean_budget: float,
    advance: Callable[[], object],
) -> None:
    """Attack all candidates on few images, the better half of them on twice as many, and so on.

    The first candidate is the base, which goes all the way: the others are compared with it. Those over the clean
    budget are attacked on the first images only, which shows what became of them.
    """
    base, *standing = candidates
    for stop in rungs:
        for candidate in (base, *standing):
            trials.attack(candidate, stop, advance)
        reference = trials.outcome(base)
        allowed = [c for c in standing if within_budget(reference, trials.outcome(c), clean_budget)]
        # sorted() is stable: of equals the earlier one stays, which is the smaller alpha.
        ranked = sorted(allowed, key=lambda c: -int(trials.outcome(c).worst.sum()))
        kept = ranked[: math.ceil(len(ranked) / 2)]
        standing = [c for c in standing if c in kept]


def candidates_per_rung(candidates: int, rungs: Sequence[int]) -> list[int]:
    """Return how many candidates are attacked on each rung's new images, at the most.

    Example:
        >>> candidates_per_rung(7, [100, 200, 400])
        [7, 4, 3]
    """
    found, standing = [], candidates - 1
    for _ in rungs:
        found.append(1 + standing)
        standing = math.ceil(standing / 2)
    return found


def _batches_with(data: Sequence[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches, those that hold the first ``count`` images."""
    found, held = [], 0
    for batch in data:
        if held >= count:
            break
        found.append((batch[0].cpu(), batch[1].cpu()))
        held += len(batch[1])
    return found
