"""Floor 5: the base and the transformed model under the same attacks, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..outputs import logits_of
from .attacks import AttackSettings
from .compiled import Attacked
from .ledger import Ledger, Masks
from .outcome import ModelOutcome
from .plan import Run, correct, device_of, perturbed
from .probes import Probed, examine, search_planted
from .sanity import Check, check_threat, checks_of, checks_of_labels

Advance = Callable[[], object]  # called after each attack
OTHER = {"base": "sparse", "sparse": "base"}
IN_WORDS = {"base": "base", "sparse": "with MeanSparse"}
TRANSFER = "transfer"


class Comparison:
    """Both models under all runs, one batch after the other.

    Args:
        models: The base and the transformed model, by these names: ``base`` and ``sparse``.
        full_rows: Every run attacks all images, also those broken before it.
        compile, amp: How attacks meet the models; see `compiled`.
        keep: Adversarial images of all batches stay in the ledger; otherwise those of the batch at hand.

    Attributes:
        batches: Names of those attacked.
        found, sanity: Masks by number of the batch and by model; ``found`` also has labels and number of classes, as
            ``data``.
        evidence: What broke which image, by number of the batch and by model, if kept.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        runs: Sequence[Run],
        settings: AttackSettings,
        ledger: Ledger,
        full_rows: bool,
        compile: bool | str | None,
        amp: torch.dtype | None,
        keep: bool = False,
    ) -> None:
        self._models, self._attacked = models, Attacked(models, compile, amp)
        self._runs, self._settings, self._ledger, self._full_rows = runs, settings, ledger, full_rows
        self._device, self._keep = device_of(models["sparse"]), keep
        self.found: dict[int, dict[str, Masks]] = {}
        self.sanity: dict[int, dict[str, Masks]] = {}
        self.evidence: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.batches: list[str] = []

    def attack_batch(self, batch: int, images: Tensor, labels: Tensor, sanity_images: int, advance: Advance) -> None:
        """Attack one batch, and look at the attacks themselves on its first ``sanity_images`` images."""
        name, images, labels = self._begin(batch, images, labels)
        sides = {which: self._clean(name, which, images, labels) for which in OTHER}
        for which, side in sides.items():
            for run in self._runs:
                if not run.started:
                    self._attack(side, run, which, advance)
        before = {which: (side.broken.clone(), side.adversarial.clone()) for which, side in sides.items()}
        for which, side in sides.items():
            elsewhere, starts = before[OTHER[which]]
            if self._runs:
                self._transfer(side, which, elsewhere, starts)
            for run in self._runs:
                if run.started:
                    self._attack(side, run, which, advance, elsewhere, starts)
        self.found[batch] = {which: side.masks for which, side in sides.items()}
        with torch.no_grad():
            classes = logits_of(self._models["base"], images[:1]).shape[1]
        self.found[batch]["data"] = {"labels": labels.cpu(), "classes": torch.tensor(classes)}
        if sanity_images > 0:
            probed = Probed(images[:sanity_images], labels[:sanity_images])
            self._examine_both(batch, lambda which: self._examine(probed, which, sides[which]))
            if batch == 0:
                for which, model in self._models.items():
                    plant = partial(search_planted, model, probed, self._runs, self._settings)
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

    def _clean(self, name: str, which: str, images: Tensor, labels: Tensor) -> _Side:
        masks = self._ledger.get_or_compute(
            f"{name}, {which}, clean", lambda: {"clean": correct(self._models[which], images, labels)}
        )
        return _Side(f"{name}, {which}", images, labels, masks["clean"], self._full_rows)

    def _attack(
        self,
        side: _Side,
        run: Run,
        which: str,
        advance: Advance,
        among: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        """Let one run attack what stands of one model, or of ``among`` from ``starts``."""
        target = side.target if among is None else side.target & among

        def work() -> Tensor:
            at = target.to(self._device)
            begin = None if starts is None else starts[at]
            return perturbed(
                self._attacked.by(run, which), run, side.images[at], side.labels[at], self._settings, begin
            )

        self._survivors(side, run.name, which, target, work)
        advance()

    def _transfer(self, side: _Side, which: str, among: Tensor, found: Tensor) -> None:
        """Show one model what broke the other."""
        target = side.target & among
        self._survivors(side, TRANSFER, which, target, lambda: found[target.to(self._device)])

    def _survivors(self, side: _Side, name: str, which: str, target: Tensor, make: Callable[[], Tensor]) -> None:
        def work() -> Masks:
            at = target.to(self._device)
            made = make()
            right = correct(self._models[which], made, side.labels[at])
            first = ~right & ~side.broken.to(self._device)[at]
            return {"survived": torch.zeros_like(at).masked_scatter(at, right), "images": made[first]}

        known = self._ledger.get_or_compute(f"{side.name}, {name}", work)
        side.add(name, target, known)

    def _examine(self, probed: Probed, which: str, side: _Side) -> Masks:
        count = len(probed.images)
        return examine(
            self._models[which], self._attacked, which, probed, self._runs, self._settings,
            side.masks["clean"][:count], ~side.broken[:count],
        )  # fmt: skip

    def so_far(self) -> str:
        """Return the worst-case accuracies so far, for the progress bar."""
        shares = {which: float(o.worst.double().mean()) for which, o in self.outcomes().items()}
        return f"worst: base {shares['base']:.1%}, sparse {shares['sparse']:.1%}"

    def outcomes(self) -> dict[str, ModelOutcome]:
        """Return what both models did."""
        return {which: outcome([masks[which] for _, masks in sorted(self.found.items())]) for which in OTHER}

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


class _Side:
    """One model and one batch: which images stand, and what broke the others.

    Attributes:
        images, labels: The batch, on the model's device.
        masks: ``clean`` and one a run, on the CPU.
        broken: ``[N]`` bool: wrong on the image itself or on one made of it.
        adversarial: ``[N, C, H, W]``, the first that broke each; the image itself where none did.
    """

    def __init__(self, name: str, images: Tensor, labels: Tensor, clean: Tensor, full_rows: bool) -> None:
        self.name, self.images, self.labels = name, images, labels
        self.masks: dict[str, Tensor] = {"clean": clean}
        self.broken, self.adversarial = ~clean, images.clone()
        self._by = torch.where(clean, -1, 0)
        self._full_rows = full_rows

    @property
    def target(self) -> Tensor:
        """``[N]`` bool, the images to attack."""
        return self.masks["clean"] if self._full_rows else ~self.broken

    def add(self, name: str, target: Tensor, known: Masks) -> None:
        """Take over what a run found among the images it attacked; it leaves alone the others that stood."""
        newly = target & ~known["survived"] & ~self.broken
        standing = self.target
        self.masks[name] = known["survived"] | (standing & ~target)
        self.broken = self.broken | newly
        self._by[newly] = len(self.masks) - 1
        if "images" in known:  # not of a batch that was done with before
            self.adversarial[newly.to(self.images.device)] = known["images"].to(self.images)

    def evidence(self) -> dict[str, Tensor]:
        """Return the batch, its adversarial images, and the number of the row that broke each: 0 clean, -1 none."""
        batch = {"images": self.images.cpu(), "labels": self.labels.cpu()}
        return batch | {"adversarial": self.adversarial.cpu(), "broken_by": self._by}


def outcome(masks: Sequence[Masks]) -> ModelOutcome:
    """Return one outcome from the masks of successive batches, each with ``clean`` and the runs' names."""
    joined = {name: torch.cat([m[name] for m in masks]) for name in masks[0]}
    clean = joined.pop("clean")
    return ModelOutcome(clean, joined)
