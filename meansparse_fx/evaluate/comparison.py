"""Floor 5: the base and the transformed model under the same attacks, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..outputs import logits_of
from .batch import Batch
from .compiled import Attacked
from .ledger import Ledger, Masks
from .outcome import IN_WORDS, ModelOutcome, mean
from .plan import AttackPlan, device_of
from .probes import Probed, examine, search_planted
from .sanity import Check, check_threat, checks_of, checks_of_labels

Advance = Callable[[], object]  # called after each attack
OTHER = {"base": "sparse", "sparse": "base"}


class Comparison:
    """Both models under all runs, one batch after the other.

    Args:
        models: The base and the transformed model, by these names: ``base`` and ``sparse``.
        keep: Adversarial images of all batches stay in the ledger; otherwise those of the batch at hand.

    Attributes:
        batches: Names of those attacked.
        found, sanity: Masks by number of the batch and by model; ``found`` also has labels and number of classes, as
            ``data``.
        evidence: What broke which image, by number of the batch and by model, if kept.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        plan: AttackPlan,
        ledger: Ledger,
        keep: bool = False,
    ) -> None:
        self._models = {which: Attacked(model, plan.compile, plan.amp) for which, model in models.items()}
        self._plan, self._runs, self._settings, self._ledger = plan, plan.runs, plan.settings, ledger
        self._device, self._keep = device_of(models["sparse"]), keep
        self.found: dict[int, dict[str, Masks]] = {}
        self.sanity: dict[int, dict[str, Masks]] = {}
        self.evidence: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.batches: list[str] = []

    def attack_batch(self, batch: int, images: Tensor, labels: Tensor, sanity_images: int, advance: Advance) -> None:
        """Attack one batch, and look at the attacks themselves on its first ``sanity_images`` images."""
        name, images, labels = self._begin(batch, images, labels)
        sides = {
            which: Batch(f"{name}, {which}", attacked, self._plan, self._ledger, images, labels)
            for which, attacked in self._models.items()
        }
        for side in sides.values():
            for run in self._runs:
                if not run.started:
                    side.attack(run)
                    advance()
        before = {which: (side.broken.clone(), side.adversarial.clone()) for which, side in sides.items()}
        for which, side in sides.items():
            elsewhere, starts = before[OTHER[which]]
            if self._runs:
                side.transfer(elsewhere, starts)
            for run in self._runs:
                if run.started:
                    side.attack(run, elsewhere, starts)
                    advance()
        self.found[batch] = {which: side.masks for which, side in sides.items()}
        with torch.no_grad():
            classes = logits_of(self._models["base"].model, images[:1]).shape[1]
        self.found[batch]["data"] = {"labels": labels.cpu(), "classes": torch.tensor(classes)}
        if sanity_images > 0:
            probed = Probed(images[:sanity_images], labels[:sanity_images])
            self._examine_both(batch, lambda which: self._examine(probed, which, sides[which]))
            if batch == 0:
                for which, attacked in self._models.items():
                    plant = partial(search_planted, attacked.model, probed, self._runs, self._settings)
                    planted = self._ledger.get_or_compute(f"{name}, {which}, planted", plant)
                    self.sanity[batch][which] = {**self.sanity[batch][which], **planted}
        if self._keep:
            self.evidence[batch] = {which: side.evidence() for which, side in sides.items()}
        else:
            self._ledger.forget(name, "images")

    def _begin(self, batch: int, images: Tensor, labels: Tensor) -> tuple[str, Tensor, Tensor]:
        """Return the name of a batch, which must be what it was before, and the batch on the device."""
        name = f"batch {batch}"
        self._ledger.require_same(name, images, labels)
        self.batches.append(name)
        return name, images.to(self._device), labels.to(self._device)

    def _examine_both(self, batch: int, examine: Callable[[str], Masks]) -> None:
        self.sanity[batch] = {
            which: self._ledger.get_or_compute(f"batch {batch}, {which}, sanity", partial(examine, which))
            for which in OTHER
        }

    def _examine(self, probed: Probed, which: str, side: Batch) -> Masks:
        count = len(probed.images)
        clean, standing = side.masks["clean"][:count], ~side.broken[:count]
        return examine(self._models[which], probed, self._runs, self._settings, clean, standing)

    def so_far(self) -> str:
        """Return the worst-case accuracies so far, for the progress bar."""
        return "worst: " + ", ".join(f"{which} {mean(found.worst):.1%}" for which, found in self.outcomes().items())

    def outcomes(self) -> dict[str, ModelOutcome]:
        """Return what both models did."""
        return {which: ModelOutcome.of([masks[which] for _, masks in sorted(self.found.items())]) for which in OTHER}

    def checks(self, outcomes: dict[str, ModelOutcome]) -> list[Check]:
        """Return what the evaluation says about itself."""
        data = [masks["data"] for _, masks in sorted(self.found.items())]
        labels = torch.cat([part["labels"] for part in data])
        found = list(checks_of_labels(labels, int(data[0]["classes"]), outcomes["base"].clean))
        found += check_threat(*(outcomes[which] for which in OTHER))
        for which, words in IN_WORDS.items():
            found += checks_of(words, self.examined(which), outcomes[which], self._runs)
        return found

    def examined(self, which: str) -> Masks:
        """Return the masks of `probes` of one model, over all batches that were looked at."""
        looked = [masks[which] for _, masks in sorted(self.sanity.items())]
        return {name: torch.cat([m[name] for m in looked if name in m]) for m in looked for name in m}
