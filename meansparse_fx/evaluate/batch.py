"""Floor 5: one model on one batch of images, attack after attack: which images survive, and what broke the others.

The search for alpha looks at one a candidate, `evaluate` compares two, batch after batch. Results are kept in a ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..outputs import logits_of
from .ledger import Ledger, Masks
from .outcome import IN_WORDS, TRANSFER, ModelOutcome, concatenated, mean
from .plan import Attacked, AttackPlan, Run, correct, device_of
from .probes import Probed, examine, search_planted
from .sanity import Check, check_threat, checks_of, checks_of_labels

OTHER = {"base": "sparse", "sparse": "base"}


class Batch:
    """Which images of a batch one model has right, and what broke the others.

    Args:
        name: What the results are called in the ledger, ``batch 3, base``.
        attacked: The model.
        images, labels: On its device.
        clean: ``[N]`` bool, images that are right as they are; None asks the model.
        keep: The ledger keeps the adversarial images, too.

    Attributes:
        rows: ``clean`` and one an attack: correct after it; on the CPU.
        broken: ``[N]`` bool: wrong on the image itself or on one made of it.
        adversarial: ``[N, C, H, W]``, the first that broke each; the image itself where none did.
    """

    outcome: Callable[[dict[str, Tensor]], ModelOutcome] = staticmethod(ModelOutcome.of)  # of all batches' rows

    def __init__(
        self,
        name: str,
        attacked: Attacked,
        ledger: Ledger,
        images: Tensor,
        labels: Tensor,
        clean: Tensor | None = None,
        keep: bool = True,
    ) -> None:
        self._name, self._attacked, self._ledger, self._keep = name, attacked, ledger, keep
        self.images, self.labels, self.adversarial = images, labels, images.clone()
        if clean is None:
            clean = self._known("clean", lambda: {"clean": correct(attacked.model, images, labels)})["clean"]
        self.rows: dict[str, Tensor] = {"clean": clean}
        self.broken, self._by = ~clean, torch.where(clean, -1, 0)

    def attack(self, run: Run, among: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Let one run attack what is unbroken, or what of it is ``among`` ``[N]``, from ``starts`` ``[N, C, H, W]``."""

        def make(at: Tensor) -> Tensor:
            begin = () if starts is None else (starts[at],)
            return self._attacked.perturbed(run, self.images[at], self.labels[at], None, *begin)

        self._record(run.name, among, make)

    def transfer(self, among: Tensor, found: Tensor) -> None:
        """Try the images ``found`` ``[N, C, H, W]``, which broke another model, where ``among`` ``[N]`` is unbroken."""
        self._record(TRANSFER, among, lambda at: found[at])

    def _known(self, piece: str, work: Callable[[], Masks]) -> Masks:
        return self._ledger.get_or_compute(f"{self._name}, {piece}", work)

    def _record(self, name: str, among: Tensor | None, make: Callable[[Tensor], Tensor]) -> None:
        """Note which images survive what ``make`` makes of those at a mask ``[N]``, as a row of this name."""
        counted = self.rows["clean"] if self._attacked.plan.full_rows else ~self.broken
        target = counted if among is None else counted & among
        device = self.images.device

        def work() -> Masks:
            at = target.to(device)
            made = make(at)
            right = correct(self._attacked.model, made, self.labels[at])
            survived = {"survived": torch.zeros_like(at).masked_scatter(at, right)}
            first = ~right & ~self.broken.to(device)[at]
            return survived | ({"images": made[first]} if self._keep else {})

        known = self._known(name, work)
        newly = target & ~known["survived"] & ~self.broken
        self.rows[name] = known["survived"] | (counted & ~target)
        self.broken = self.broken | newly
        self._by[newly] = len(self.rows) - 1
        if "images" in known:  # not of a batch that was done with before
            self.adversarial[newly.to(device)] = known["images"].to(self.images)

    def examine(self, count: int, planted: bool) -> Masks:
        """Return what `probes` see on the first ``count`` images, with examples ``planted`` there or without."""
        probed = Probed(self.images[:count], self.labels[:count])
        clean, unbroken = self.rows["clean"][:count], ~self.broken[:count]
        found = self._known("sanity", lambda: examine(self._attacked, probed, clean, unbroken))
        if not planted:
            return found
        return {**found, **self._known("planted", lambda: search_planted(self._attacked, probed))}

    def evidence(self) -> Masks:
        """Return the batch, its adversarial images, and the number of the row that broke each: 0 clean, -1 none."""
        batch = {"images": self.images.cpu(), "labels": self.labels.cpu()}
        return batch | {"adversarial": self.adversarial.cpu(), "broken_by": self._by}

    def known_labels(self) -> Masks:
        """Return what `check_labels` wants to know of the batch."""
        with torch.no_grad():
            classes = logits_of(self._attacked.model, self.images[:1]).shape[1]
        return {"labels": self.labels.cpu(), "classes": torch.tensor([classes])}

    @staticmethod
    def check_labels(known: Masks, clean: Tensor) -> Iterable[Check]:
        """Return the checks of all batches' labels, of which the base has ``clean`` right."""
        return checks_of_labels(known["labels"], int(known["classes"][0]), clean)


class Comparison:
    """Both models under all runs, one batch after the other.

    Args:
        models: The base and the transformed model, by these names: ``base`` and ``sparse``.
        kind: How images are counted: `Batch`, or `PixelBatch` for label maps.
        keep: Adversarial images of all batches stay in the ledger; otherwise those of the batch at hand.

    Attributes:
        found: By number of the batch: tensors by name, for ``base rows``, ``base sanity`` and, if kept, ``base
            evidence``, the same of ``sparse``, and ``labels``. See `Batch`.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        plan: AttackPlan,
        ledger: Ledger,
        kind: type[Batch] = Batch,
        keep: bool = False,
    ) -> None:
        self._models = {which: Attacked(model, plan) for which, model in models.items()}
        self._plan, self._ledger, self._kind, self._keep = plan, ledger, kind, keep
        self._device = device_of(models["sparse"])
        self.found: dict[int, dict[str, Masks]] = {}

    def attack_batch(
        self, index: int, images: Tensor, labels: Tensor, sanity_images: int, advance: Callable[[], object]
    ) -> None:
        """Attack one batch, and look at the attacks themselves on its first ``sanity_images`` images."""
        name = f"batch {index}"
        self._ledger.require_same(name, images, labels)
        images, labels = images.to(self._device), labels.to(self._device)
        sides = {
            which: self._kind(f"{name}, {which}", attacked, self._ledger, images, labels)
            for which, attacked in self._models.items()
        }

        def attack(side: Batch, runs: Iterable[Run], *start: Tensor) -> None:
            for run in runs:
                side.attack(run, *start)
                advance()

        for side in sides.values():
            attack(side, [run for run in self._plan.runs if not run.kind.started])
        before = {which: (side.broken.clone(), side.adversarial.clone()) for which, side in sides.items()}
        found = {"labels": sides["base"].known_labels()}
        for which, side in sides.items():
            elsewhere = before[OTHER[which]]
            if self._plan.runs:
                side.transfer(*elsewhere)
            attack(side, [run for run in self._plan.runs if run.kind.started], *elsewhere)
            found[f"{which} rows"] = side.rows
            if sanity_images > 0:
                found[f"{which} sanity"] = side.examine(sanity_images, planted=index == 0)
            if self._keep:
                found[f"{which} evidence"] = side.evidence()
        self.found[index] = found
        if not self._keep:
            self._ledger.forget(name, "images")

    def joined(self, what: str) -> dict[str, Tensor]:
        """Return the tensors of all batches that `found` has under a name."""
        return concatenated([found[what] for _, found in sorted(self.found.items()) if what in found])

    def so_far(self) -> str:
        """Return the worst-case accuracies so far, for the progress bar."""
        return "worst: " + ", ".join(f"{which} {mean(found.worst):.1%}" for which, found in self.outcomes().items())

    def outcomes(self) -> dict[str, ModelOutcome]:
        """Return what both models did."""
        return {which: self._kind.outcome(self.joined(f"{which} rows")) for which in OTHER}

    def checks(self, outcomes: Mapping[str, ModelOutcome]) -> list[Check]:
        """Return what the evaluation says about itself."""
        found = [*self._kind.check_labels(self.joined("labels"), outcomes["base"].clean)]
        found += check_threat(*(outcomes[which] for which in OTHER))
        for which, words in IN_WORDS.items():
            found += checks_of(words, self.joined(f"{which} sanity"), outcomes[which], self._plan.runs)
        return found
