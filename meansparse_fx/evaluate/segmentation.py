"""Floor 5: one model on one batch of label maps: an image counted by its pixels.

Every run attacks every image: none is broken as a whole. Labels are ``[N, H, W]``, -1 for pixels that are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..outputs import logits_of
from .batch import Batch
from .descent import IGNORED
from .ledger import Ledger, Masks
from .outcome import TRANSFER, ModelOutcome, PairedDifference, mean
from .plan import Attacked, Run
from .probes import Probed, outputs
from .sanity import Check, check_chance
from .threat import AttackSettings


class PixelBatch(Batch):
    """How many pixels of each image of a batch one model has right, and what left the fewest.

    Attributes:
        rows: ``clean`` and one a run: `counts` ``[N, 3, K]``, on the CPU.
        broken: ``[N]`` bool: all, for any of them may be worse elsewhere.
        adversarial: ``[N, C, H, W]``, of each what left the fewest pixels right.
    """

    def __init__(self, name: str, attacked: Attacked, ledger: Ledger, images: Tensor, labels: Tensor) -> None:
        super().__init__(name, attacked, ledger, images, labels, torch.zeros(len(images), dtype=torch.bool))
        self.adversarial = images.cpu()
        self._least = self._score("clean", images)
        self.rows = {"clean": self._least}

    def attack(self, run: Run, among: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Let one run attack all images."""

        def work() -> Masks:
            made = self._attacked.perturbed(run, self.images, self.labels)
            return {"counts": self._counts(made, self.labels), "images": made}

        known = self._known(run.name, work)
        self.rows[run.name] = known["counts"]
        if "images" in known:  # not of a batch that was done with before
            pair = self._least, known["counts"]
            self.adversarial = lowest(pair, (self.adversarial, known["images"]))
            self._least = lowest(pair, pair)

    def transfer(self, among: Tensor, found: Tensor) -> None:
        """Show all images as ``found`` ``[N, C, H, W]``, which left the fewest pixels of another model right."""
        both = self.rows["clean"], self._score(TRANSFER, found.to(self.images))
        self.rows[TRANSFER] = lowest(both, both)

    def _counts(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return counts(logits_of(self._attacked.model, images, labels), labels).cpu()

    def _score(self, row: str, images: Tensor) -> Tensor:
        return self._known(row, lambda: {"counts": self._counts(images, self.labels)})["counts"]

    def examine(self, count: int, planted: bool) -> Masks:
        """Return masks of `probes`, and shares of pixels that an unbounded attack and twice the steps get wrong."""
        return self._known("sanity", lambda: self._examine(Probed(self.images[:count], self.labels[:count])))

    def _examine(self, probed: Probed) -> Masks:
        plan = self._attacked.plan
        found: Masks = outputs(self._attacked.model, probed, plan.settings)
        if not plan.runs:
            return found

        def left(run: Run, settings: AttackSettings) -> Tensor:
            return accuracy(self._counts(self._attacked.perturbed(run, *probed, settings), probed.labels))

        unbounded, last = plan.settings.unbounded(probed.images[0]), plan.runs[-1]
        each = {run.backward: run for run in plan.runs}.values()
        shares = [accuracy(row[: len(probed.images)]) for row in self.rows.values()]
        again = left(replace(last, seed=last.seed + 1000), replace(plan.settings, steps=2 * plan.settings.steps))
        return {
            **found,
            "unbounded": 1 - torch.stack([left(run, unbounded) for run in each]).amin(0),
            "twice the steps": 1 - (torch.stack(shares).amin(0) - again).clamp_min(0),
        }

    def known_labels(self) -> Masks:
        """Return how many pixels of each class each image has, ``[N, K]``."""
        return {"labelled": self.rows["clean"][:, 2]}

    @staticmethod
    def check_labels(known: Masks, clean: Tensor) -> Iterable[Check]:
        """Return the check of all batches' labels, of which the base has the shares ``clean`` right."""
        labelled = known["labelled"].double()
        chance = labelled[:, labelled.sum(0).argmax()] / labelled.sum(1)
        above = PairedDifference.of(chance, clean)
        finding = (
            f"{100 * mean(clean):.1f} % of the pixels right; the commonest label alone gets {100 * mean(chance):.1f} %"
        )
        return [check_chance(above.low, above.high, len(labelled), finding)]

    @staticmethod
    def outcome(rows: dict[str, Tensor]) -> ModelOutcome:
        """Return what one model did, from the rows of all batches: shares of pixels, and mean IoU."""
        counted, shares = [*rows.values()], {row: accuracy(found) for row, found in rows.items()}
        miou = {row: mean_iou(found) for row, found in (rows | {"worst case": lowest(counted, counted)}).items()}
        return ModelOutcome(shares.pop("clean"), shares, miou)


def counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image and class how many pixels are found and labelled so, found or labelled so, and labelled so.

    Args:
        logits: ``[N, K, H, W]``.
        labels: ``[N, H, W]``.

    Returns:
        ``[N, 3, K]``: intersections, unions, labels; pixels without a label count nowhere.
    """
    n, classes = logits.shape[:2]
    found = logits.argmax(1)
    each = classes * torch.arange(n, device=labels.device).view(-1, 1, 1)

    def per_class(values: Tensor, where: Tensor) -> Tensor:
        return (each + values)[where].bincount(minlength=n * classes).view(n, classes)

    seen = labels != IGNORED
    right, labelled = per_class(labels, seen & (found == labels)), per_class(labels, seen)
    return torch.stack([right, per_class(found, seen) + labelled - right, labelled], 1)


def accuracy(counts: Tensor) -> Tensor:
    """Return the share of each image's pixels that are right, ``[N]``, from `counts`."""
    right, _, labelled = counts.sum(2).double().unbind(1)
    return right / labelled


def lowest(counts: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return each image's value ``[N, ...]`` from where its accuracy is lowest.

    Args:
        counts: What several attacks left of the same images.
        values: Of each of them, ``[N, ...]``.
    """
    least = torch.stack([accuracy(each) for each in counts]).argmin(0)
    return torch.stack(list(values))[least, torch.arange(len(least))]


def mean_iou(counts: Tensor) -> float:
    """Return the mean over classes of intersection over union, counted over all images, from `counts`.

    Classes that are neither labelled nor found count nowhere.
    """
    both, either, _ = counts.sum(0).double()
    return float((both / either)[either > 0].mean())
