"""Floor 5: label maps: how many pixels a model has right, and ascent on losses that make it get them wrong.

Labels are ``[N, H, W]``, -1 for pixels that are left out. Knows models that return logits ``[N, K, H, W]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .descent import PGD, STEP
from .threat import AttackSettings, per_image

IGNORED = -1
START = 1 / 2  # of eps, the first step


def counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image and class how many pixels are found and labelled so, found or labelled so, and labelled so.

    Args:
        logits: ``[N, K, H, W]``.
        labels: ``[N, H, W]``.

    Returns:
        ``[N, 3, K]``: intersections, unions, labels; pixels without a label count nowhere.
    """
    (n, classes), found = logits.shape[:2], logits.argmax(1)
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


def _jensen_shannon(entropy: Tensor, right: Tensor, done: float) -> Tensor:
    p = (-entropy).exp()  # of the label: the divergence depends on nothing else
    return math.log(2) - (p * entropy + (1 + p) * p.log1p()) / 2


Loss = Callable[[Tensor, Tensor, float], Tensor]  # cross-entropy, right [N, H, W], share of steps done -> [N, H, W]

# What a pixel that is wrong already may still pull: of plain cross-entropy it takes most of the gradient.
LOSSES: dict[str, tuple[Loss, str]] = {
    "pgd-masked": (
        lambda entropy, right, done: entropy * right,
        "cross-entropy of the pixels that are still right (Croce, Singh and Hein, 2024)",
    ),
    "pgd-balanced": (
        lambda entropy, right, done: entropy * torch.where(right, 1 - done / 2, done / 2),
        "cross-entropy, first of right pixels, in the end of right and wrong ones alike (SegPGD; Gu et al., 2022)",
    ),
    "pgd-js": (
        _jensen_shannon,
        "the Jensen-Shannon divergence from the labels, which is bounded at every pixel (Croce, Singh and Hein, 2024)",
    ),
}
DEFAULT_RUNS = (
    *(f"pgd-masked/{mode}" for mode in ("exact", "identity", "annealed")),
    "pgd-balanced/annealed",
    "pgd-js/annealed",
)


class PixelPGD(PGD):
    """Gradient ascent from a random start, keeping of each image what leaves the fewest pixels right.

    Steps shrink from eps / 2 to 0 along a cosine: they have to serve many pixels, not to bring one logit past another.
    """

    def __init__(self, model: nn.Module, settings: AttackSettings, loss: str) -> None:
        super().__init__(model, settings)
        self._loss = LOSSES[loss][0]

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images; those that nothing lowered come back as they were."""
        torch.manual_seed(self._settings.seed)
        step = itertools.count()

        def loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits, self._done = self._model(x), next(step) / self._settings.steps
            entropy = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
            right = logits.detach().argmax(1) == labels
            return logits, self._loss(entropy, right, self._done).flatten(1).sum(1)

        with torch.no_grad():
            self._least = _right(self._model(images), labels)
        return self._ascend(images, labels, loss)

    def _direction(self, gradient: Tensor) -> Tensor:
        # Of 32 images of docs/segmentation.md, its network trained for 150 steps, annealed: 20 steps of eps / 8 left
        # 88.0 to 88.2 % of the pixels right, these 86.9 to 87.1 %; 60 steps 86.8 to 87.2 %, and 86.3 to 86.6 %.
        return super()._direction(gradient) * (START / STEP * (1 + math.cos(math.pi * self._done)) / 2)

    def _keep(self, best: Tensor, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        now = _right(logits, labels)
        lower, self._least = now < self._least, torch.minimum(now, self._least)
        return torch.where(per_image(lower, x), x, best)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many pixels of each image are right, ``[N]``."""
    return (logits.argmax(1) == labels).flatten(1).sum(1)
