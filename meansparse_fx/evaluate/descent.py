"""Floor 5: projected gradient ascent, plain and as the paper's adaptive attack (appendix A.4, equation 8).

    max over delta   CE(f(x + delta), y) - lambda * sum_i || m_i * (z_i - z_i^delta) ||_p^q

z_i are the inputs of the operators, m_i the masks of their bands on the clean image: the attacker keeps the
operators from changing what they do. Of label maps every pixel counts: labels ``[N, H, W]``, `IGNORED` where a pixel is
left out. Knows a model's graph; nothing of other attacks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, fx, nn

from ..passes.reveal import reveal
from .threat import AttackSettings, norm_per_image, per_image

# The paper does not say which lambda it took. These are tried one after the other on the images still unbroken, each
# divided by the number of features the operators see, so that they mean the same for a small network and a large one.
# Larger ones only weaken the attack: of 100 bundled images at alpha 0.35, 50 steps of PGD left 86, equation 8 with
# p = 1 left 85, 86, 90 and 94 at 0.1, 1, 10 and 100.
PENALTIES = (0.1, 0.3, 1.0)
STEP = 1 / 8  # of eps: the paper's 1/255 for its 8/255
PIXEL_START = 1 / 2  # of eps, the first step on label maps
IGNORED = -1  # label of a pixel that is left out

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images, labels -> logits [N, K], loss [N]


class PGD:
    """Gradient ascent on cross-entropy from a random start, keeping the last image that fools the model.

    Args:
        settings: The ball, the steps, and the seed of the random start.
    """

    def __init__(self, model: nn.Module, settings: AttackSettings) -> None:
        self._model, self._settings = model, settings

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images; those not broken come back as they were."""
        torch.manual_seed(self._settings.seed)
        return self._ascend(images, labels, self._cross_entropy)

    def _cross_entropy(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._model(x)
        return logits, F.cross_entropy(logits, labels, reduction="none")

    def _ascend(self, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        best = images.clone()
        settings = self._settings
        x = settings.project(images, images + self._start(images))
        for _ in range(settings.steps):
            x.requires_grad_()
            with torch.enable_grad():
                logits, losses = loss(x, labels)
                (gradient,) = torch.autograd.grad(losses.sum(), x)
            best = self._keep(best, x.detach(), logits, labels)
            x = settings.project(images, x.detach() + STEP * settings.eps * self._direction(gradient))
        with torch.no_grad():
            return self._keep(best, x, loss(x, labels)[0], labels)

    def _keep(self, best: Tensor, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.where(per_image(logits.argmax(1) != labels, x), x, best)

    def _start(self, images: Tensor) -> Tensor:
        # Drawn on the CPU, so that a seed means the same start on every device.
        if self._settings.norm == "Linf":
            return self._settings.eps * (2 * torch.rand(images.shape) - 1).to(images)
        delta = torch.randn(images.shape).to(images)
        return self._settings.eps * delta / norm_per_image(delta)

    def _direction(self, gradient: Tensor) -> Tensor:
        return self._settings.steepest(gradient)


class Adaptive(PGD):
    """PGD on equation 8; on a base, which has no operators, PGD alone.

    Args:
        power: p and q of the penalty, equal in the paper: 1 or 2.
    """

    def __init__(self, model: nn.Module, settings: AttackSettings, power: int) -> None:
        assert isinstance(model, fx.GraphModule)  # `evaluate` takes nothing else
        super().__init__(model, settings)
        self._revealed, self._power = reveal(model), power

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images; those not broken under any weight of the penalty come back as they were."""
        torch.manual_seed(self._settings.seed)
        best = images.clone()
        unbroken = torch.arange(len(images), device=images.device)
        for weight in PENALTIES:
            x, y = images[unbroken], labels[unbroken]
            found = self._ascend(x, y, self._penalised(x, weight))
            best[unbroken] = found
            unbroken = unbroken[(found == x).flatten(1).all(1)]
            if not len(unbroken):
                break
        return best

    def _penalised(self, images: Tensor, weight: float) -> Loss:
        with torch.no_grad():
            _, clean = self._revealed(images)
        features = sum(z[0].numel() for z, _ in clean.values())

        def loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits, seen = self._revealed(x)
            value = F.cross_entropy(logits, labels, reduction="none")
            for site, (z, mask) in clean.items():
                change = ((z - seen[site][0]) * mask).flatten(1)
                value = value - weight / features * change.abs().pow(self._power).sum(1)
            return logits, value

        return loss


class Margin(APGDAttack):
    """APGD on the logits' margin: what its base calls the loss ``dlr``, without the division."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the `margin` of logits x and labels y."""
        return margin(x, y)

    def perturb_from(self, starts: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images ``[N, C, H, W]``, begun at ``starts``; those not broken as they were."""
        self.init_hyperparam(images)
        _, robust, _, found = self.attack_single_run(images.clone(), labels.clone(), x_init=starts)
        return torch.where(per_image(robust.bool(), images), images, found)


class Nearest(Margin):
    """One descent on all images, then several on those whose margin came nearest to zero: few of the others ever break.

    Of 263 test images that three shorter runs left of docs/paper.md's ReLU and GELU networks at alpha 0.4, twenty
    longer runs broke 12, each 0 to 4 of them. By the margin after 100 steps on cross-entropy 11 of them were in the
    nearest eighth.
    """

    FRACTION, MORE = 8, 8  # an eighth of the images, eight times: the cost of one descent on all

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images ``[N, C, H, W]``; those not broken as they were."""
        torch.manual_seed(self.seed)
        self.init_hyperparam(images)
        found, attacked = images.clone(), torch.arange(len(images), device=images.device)
        for turn in range(1 + self.MORE):
            self.loss = ("ce", "dlr")[turn % 2]
            x, y = images[attacked], labels[attacked]
            best, robust, _, adversarial = self.attack_single_run(x.clone(), y.clone())
            broken = robust == 0
            found[attacked[broken]] = adversarial[broken]
            again = ~broken
            if turn == 0:
                with torch.no_grad():
                    margins = margin(self.model(best), y).masked_fill(broken, -torch.inf)
                nearest = margins.topk(math.ceil(len(images) / self.FRACTION)).values
                again &= margins >= nearest[-1]
            attacked = attacked[again]
            if not len(attacked):
                break
        return found


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest wrong logit less the right one, ``[N]``, of logits ``[N, K]`` and labels ``[N]``."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def _jensen_shannon(entropy: Tensor, right: Tensor, done: float) -> Tensor:
    p = (-entropy).exp()  # of the label: the divergence depends on nothing else
    return math.log(2) - (p * entropy + (1 + p) * p.log1p()) / 2


PixelLoss = Callable[[Tensor, Tensor, float], Tensor]  # cross-entropy, right [N, H, W], share of steps done
# What a pixel that is wrong already may still pull: of plain cross-entropy it takes most of the gradient.
PIXEL_LOSSES: dict[str, tuple[PixelLoss, str]] = {
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


class PixelPGD(PGD):
    """Gradient ascent from a random start, keeping of each image what leaves the fewest pixels right.

    Steps shrink from eps / 2 to 0 along a cosine: they have to serve many pixels, not to bring one logit past another.
    """

    def __init__(self, model: nn.Module, settings: AttackSettings, loss: str) -> None:
        super().__init__(model, settings)
        self._loss = PIXEL_LOSSES[loss][0]

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
        return super()._direction(gradient) * (PIXEL_START / STEP * (1 + math.cos(math.pi * self._done)) / 2)

    def _keep(self, best: Tensor, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        now = _right(logits, labels)
        lower, self._least = now < self._least, torch.minimum(now, self._least)
        return torch.where(per_image(lower, x), x, best)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many pixels of each image are right, ``[N]``."""
    return (logits.argmax(1) == labels).flatten(1).sum(1)
