"""Floor 5: successive halving: candidates under attack on the same held-out images, the hopeless ones on few of them.

Attacks and keeps what was found; what is chosen is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..evaluate.batch import Batch
from ..evaluate.compiled import Attacked
from ..evaluate.ledger import Ledger
from ..evaluate.outcome import ModelOutcome
from ..evaluate.plan import AttackPlan, correct, device_of
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
    """

    def __init__(
        self,
        sparse: fx.GraphModule,
        data: Sequence[tuple[Tensor, Tensor]],
        attacked: int | None,
        plan: AttackPlan,
        ledger: Ledger,
    ) -> None:
        self._sparse, self._data, self._plan, self._ledger = sparse, data, plan, ledger
        self._model, self._device = Attacked(sparse, plan.compile, plan.amp), device_of(sparse)
        count = sum(len(labels) for _, labels in data)
        self.attacked = count if attacked is None else min(attacked, count)
        ends = itertools.accumulate(len(labels) for _, labels in data)
        needed = [batch for batch, end in zip(data, ends, strict=True) if end - len(batch[1]) < self.attacked]
        self._images, self._labels = (
            torch.cat([p.cpu() for p in parts])[: self.attacked] for parts in zip(*needed, strict=True)
        )
        self._batch_size = len(data[0][1])
        self._masks: dict[str, list[dict[str, Tensor]]] = {}  # by candidate, a batch each
        for index, (images, labels) in enumerate(data):
            ledger.require_same(f"batch {index}", images, labels)
        ledger.require_whole([f"batch {index}" for index in range(len(data))])

    def attacks_left(self, start: int, stop: int) -> int:
        """Return how many attacks on batches it takes to bring one candidate from ``start`` to ``stop`` images."""
        return len(self._plan.runs) * math.ceil((stop - start) / self._batch_size)

    def outcome(self, candidate: Candidate) -> ModelOutcome:
        """Return what a candidate did so far; at the least its clean accuracy on all images."""
        name = str(candidate)
        clean = self._ledger.get_or_compute(f"{name}, clean", lambda: {"clean": self._right(candidate)})["clean"]
        met = self._masks.get(name)
        return ModelOutcome(clean, ModelOutcome.of(met).robust if met else {})

    def attack(self, candidate: Candidate, stop: int, advance: Callable[[], object]) -> ModelOutcome:
        """Attack a candidate on the images up to ``stop`` that it has not seen, and return what it did so far."""
        name, clean = str(candidate), self.outcome(candidate).clean
        met = self._masks.setdefault(name, [])
        candidate.set(self._sparse)
        for low in range(sum(len(masks["clean"]) for masks in met), stop, self._batch_size):
            at = slice(low, min(low + self._batch_size, stop))
            images, labels = (part[at].to(self._device) for part in (self._images, self._labels))
            what = f"{name}, {at.start} to {at.stop}"
            batch = Batch(what, self._model, self._plan, self._ledger, images, labels, clean[at], keep=False)
            for run in self._plan.runs:
                batch.attack(run)
                advance()
            met.append(batch.masks)
        return self.outcome(candidate)

    def _right(self, candidate: Candidate) -> Tensor:
        candidate.set(self._sparse)
        parts = ((images.to(self._device), labels.to(self._device)) for images, labels in self._data)
        return torch.cat([correct(self._sparse, *part).cpu() for part in parts])


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
