"""Floor 5: a closer look at the attacks themselves, on a few images: what `sanity` judges.

Runs models and attacks; every mask is over the images that are right to begin with. The failures looked for are those
of Carlini et al. (2019), Pintor et al. (2022) and AutoAttack's flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..operators import switched
from .descent import margin
from .ledger import Masks
from .plan import Attacked, Run, correct, perturbed
from .planted import IMAGES, nearest, plant
from .surrogates import surrogate, switch_backward
from .threat import AttackSettings

STEP = 0.1  # of eps: a step along the gradient must raise the loss
TINY = 1e-3  # of eps: a change that must change the logits
SAME = 1e-4  # of the largest logit: two passes may differ by a device's rounding


class Probed(NamedTuple):
    """The images to look at, ``[n, C, H, W]`` and ``[n]``."""

    images: Tensor
    labels: Tensor

    def at(self, mask: Tensor) -> Probed:
        """Return those where ``mask`` ``[n]`` is set."""
        return Probed(*(part[mask.to(part.device)] for part in self))


def examine(attacked: Attacked, probed: Probed, clean: Tensor, unbroken: Tensor) -> Masks:
    """Return masks by name, True where an image shows nothing amiss.

    Args:
        clean: ``[n]``, right as they are.
        unbroken: ``[n]``, right after all runs.
    """
    model, settings, right = attacked.model, attacked.plan.settings, probed.at(clean)
    gradient = [run for run in attacked.plan.runs if run.backward is not None and not run.kind.started]
    found = outputs(model, right, settings)
    if not gradient or not len(right.images):
        return found
    found |= _gradients(model, right, gradient, settings)
    unbounded = settings.unbounded(right.images[0])
    left = torch.ones(len(right.images), dtype=torch.bool)
    # One for each backward, on what those before it left.
    for run in {run.backward: replace(run, attack="apgd-ce") for run in gradient}.values():
        these = right.at(left)
        left[left.clone()] = correct(model, attacked.perturbed(run, *these, unbounded), these.labels).cpu()
    found["unbounded"] = ~left
    return found | _longer_run(attacked, probed.at(unbroken), gradient[-1])


def search_planted(attacked: Attacked, probed: Probed) -> Masks:
    """Return for each run, and for random search, where it missed what was planted; nothing if nothing can be."""
    settings = attacked.plan.settings
    runs = [run for run in attacked.plan.runs if not (run.kind.started or run.kind.reads_graph)]
    if not isinstance(attacked.model, fx.GraphModule) or not any(run.backward for run in runs):
        return {}
    planted = plant(attacked.model, probed.images[:IMAGES], settings)
    if planted is None:
        return {}
    settings = replace(settings, target_classes=1)  # one alone is there to be found
    found: dict[str, Tensor] = {"planted/random search": planted.random}
    for run in runs:
        made = perturbed(planted.model, run, planted.images, planted.labels, settings)
        found[f"planted/{run.name}"] = correct(planted.model, made, planted.labels)
    return found


@torch.no_grad()
def outputs(model: nn.Module, right: Probed, settings: AttackSettings) -> dict[str, Tensor]:
    """Return which images' logits are the same twice, no probabilities, and follow a tiny change."""
    images = right.images
    if not len(images):
        return {}
    raw = model(images)
    first, second = raw.flatten(1), model(images).flatten(1)
    largest = first.abs().amax(1).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.rand(images.shape, generator=generator).sub(0.5).sign().to(images)
    moved = model((images + TINY * settings.eps * noise).clamp(0, 1)).flatten(1)
    sums = raw.sum(1).reshape(len(images), -1)  # of each image, or of each of its pixels
    probabilities = (first >= 0).all(1) & ((sums - 1).abs() < 1e-3).all(1)
    return {
        "repeatable": (first - second).abs().amax(1) <= SAME * largest,
        "logits": ~probabilities,
        "continuous": (moved != first).any(1),
    }


def _gradients(model: nn.Module, right: Probed, runs: Sequence[Run], settings: AttackSettings) -> dict[str, Tensor]:
    """Return for which images cross-entropy has a gradient, and a step along the margin's raises the margin."""
    modes = dict.fromkeys(mode for run in runs for mode in surrogate(run.backward or "exact").modes)
    slope, rises = (torch.zeros(len(right.images), dtype=torch.bool) for _ in range(2))
    with switched(model):
        for mode in modes:
            switch_backward(model, *mode)
            x = right.images.clone().requires_grad_()
            with torch.enable_grad():
                logits = model(x)
                before = margin(logits, right.labels)
                entropy = F.cross_entropy(logits, right.labels, reduction="none")
            slope |= _gradient(entropy, x).flatten(1).abs().amax(1).gt(0).cpu()
            along = settings.steepest(_gradient(before, x))
            with torch.no_grad():
                after = margin(model((right.images + STEP * settings.eps * along).clamp(0, 1)), right.labels)
            rises |= (after > before).cpu()
    return {"slope": slope, "rises": rises}


def _longer_run(attacked: Attacked, left: Probed, run: Run) -> dict[str, Tensor]:
    """Return which images survive one more run of twice the steps, and of which it returned all that it had broken."""
    settings, target = attacked.plan.settings, attacked.target_of(run)
    watched = target if run.kind.reads_graph else _Watched(target, left)
    again, longer = replace(run, seed=run.seed + 1000), replace(settings, steps=2 * settings.steps)
    survived = correct(attacked.model, perturbed(watched, again, *left, longer), left.labels).cpu()
    found = {"twice the steps": survived}
    if isinstance(watched, _Watched):
        found["silent success"] = ~(watched.seen.cpu() & survived)
    return found


class _Watched(nn.Module):
    """A model that notes which images it got wrong on the way."""

    def __init__(self, model: nn.Module, known: Probed) -> None:
        super().__init__()
        self.model, self._known = model, known
        self.seen = torch.zeros(len(known.images), dtype=torch.bool, device=known.images.device)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        rows = nearest(images.detach(), self._known.images)
        wrong = logits.detach().argmax(1) != self._known.labels[rows]
        self.seen[rows[wrong]] = True
        return logits


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()
