"""Floor 5: successive halving: candidates under attack on the same held-out images, the hopeless ones on few of them.

Attacks and keeps what was found; what is chosen is decided elsewhere.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..evaluate.batch import Batch
from ..evaluate.ledger import Ledger
from ..evaluate.outcome import ModelOutcome, concatenated
from ..evaluate.plan import Attacked, AttackPlan, correct, device_of
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
        self._model, self._device = Attacked(sparse, plan), device_of(sparse)
        ends = list(itertools.accumulate(len(labels) for _, labels in data))
        self.attacked = ends[-1] if attacked is None else min(attacked, ends[-1])
        needed = data[: bisect.bisect_left(ends, self.attacked) + 1]
        self._images = torch.cat([images.cpu() for images, _ in needed])[: self.attacked]
        self._labels = torch.cat([labels.cpu() for _, labels in needed])[: self.attacked]
        self._batch_size = len(data[0][1])
        self._rows: dict[str, list[dict[str, Tensor]]] = {}  # by candidate, a batch each
        for index, batch in enumerate(data):
            ledger.require_same(f"batch {index}", *batch)
        ledger.require_whole(len(data))

    def attacks_left(self, start: int, stop: int) -> int:
        """Return how many attacks on batches it takes to bring one candidate from ``start`` to ``stop`` images."""
        return len(self._plan.runs) * math.ceil((stop - start) / self._batch_size)

    def outcome(self, candidate: Candidate) -> ModelOutcome:
        """Return what a candidate did so far; at the least its clean accuracy on all images."""
        name = str(candidate)
        clean = self._ledger.get_or_compute(f"{name}, clean", lambda: {"clean": self._right(candidate)})["clean"]
        return ModelOutcome.of({**concatenated(self._rows.get(name, [])), "clean": clean})

    def attack(self, candidate: Candidate, stop: int, advance: Callable[[], object] = lambda: None) -> ModelOutcome:
        """Attack a candidate on the images up to ``stop`` that it has not seen, and return what it did so far."""
        name, clean = str(candidate), self.outcome(candidate).clean
        rows = self._rows.setdefault(name, [])
        candidate.set(self._sparse)
        for low in range(sum(len(batch["clean"]) for batch in rows), stop, self._batch_size):
            at = slice(low, min(low + self._batch_size, stop))
            images, labels = (part[at].to(self._device) for part in (self._images, self._labels))
            what = f"{name}, {at.start} to {at.stop}"
            batch = Batch(what, self._model, self._ledger, images, labels, clean[at], keep=False)
            for run in self._plan.runs:
                batch.attack(run)
                advance()
            rows.append(batch.rows)
        return self.outcome(candidate)

    def _right(self, candidate: Candidate) -> Tensor:
        candidate.set(self._sparse)
        parts = ((images.to(self._device), labels.to(self._device)) for images, labels in self._data)
        return torch.cat([correct(self._sparse, *part).cpu() for part in parts])


def rung_sizes(attacked: int, count: int, candidates: int) -> dict[int, int]:
    """Return numbers of images that double up to ``attacked``, and how many candidates each of these rungs takes.

    Example:
        >>> rung_sizes(400, 3, 7)
        {100: 7, 200: 4, 400: 3}
    """
    stops = sorted({max(1, attacked // 2**k) for k in range(count)})
    return {stop: 1 + math.ceil((candidates - 1) / 2**k) for k, stop in enumerate(stops)}


def successive_halving(
    trials: Trials,
    candidates: Sequence[Candidate],
    rungs: Iterable[int],
    clean_budget: float,
    advance: Callable[[], object],
) -> None:
    """Attack all candidates on few images, the better half of them on twice as many, and so on.

    The first candidate is the base, which goes all the way: the others are compared with it. Those over the clean
    budget are attacked on the first images only, which shows what became of them.
    """
    base, *survivors = candidates
    for stop in rungs:
        for candidate in (base, *survivors):
            trials.attack(candidate, stop, advance)
        reference = trials.outcome(base)
        allowed = [c for c in survivors if within_budget(reference, trials.outcome(c), clean_budget)]
        # sorted() is stable: of equals the earlier one stays, which is the smaller alpha.
        best_first = sorted(allowed, key=lambda c: -int(trials.outcome(c).worst.sum()))
        kept = best_first[: math.ceil(len(allowed) / 2)]
        survivors = [c for c in survivors if c in kept]
