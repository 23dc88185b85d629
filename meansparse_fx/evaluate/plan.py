"""Floor 5: which attacks are run, in which order, and one of them on one batch.

Knows attacks and the switches on operators; keeps no results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..nn import MeanSparse
from ..operators import operators, switched
from .attacks import AttackSettings, attack, expand, kind, logits_of


@dataclass(frozen=True, slots=True)
class Run:
    """One attack under one backward mode of the operator.

    Attributes:
        attack: Name of the attack.
        backward: ``exact``, ``identity`` or ``smooth``; None for an attack without gradients.
        seed: Of its random start; every run has its own, so that two runs are two tries on the base as well.
    """

    attack: str
    backward: str | None
    seed: int

    @property
    def name(self) -> str:
        return self.attack if self.backward is None else f"{self.attack}/{self.backward}"


def plan_runs(attacks: Sequence[str], backwards: Sequence[str], seed: int) -> list[Run]:
    """Return every attack under every backward mode; an attack without gradients once, at the end.

    The operator's own gradient comes first: what survives it is known, whatever those who know leave of it.
    """
    kinds = {name: kind(name) for name in expand(attacks)}
    modes = sorted(dict.fromkeys(backwards), key=lambda mode: mode != "exact")
    found: list[tuple[str, str | None]] = [(a, mode) for mode in modes for a, row in kinds.items() if row.gradient]
    found += [(a, None) for a, row in kinds.items() if not row.gradient]
    if not found:
        raise EvaluationError("no attack asked for: give at least one, and for gradient attacks a backward")
    return [Run(a, mode, seed + i) for i, (a, mode) in enumerate(found)]


def perturbed(model: nn.Module, run: Run, images: Tensor, labels: Tensor, settings: AttackSettings) -> Tensor:
    """Return what ``run`` makes of ``images``; the operators' switches are put back."""
    with switched(model):
        for operator in model.modules():
            if isinstance(operator, MeanSparse) and run.backward is not None:
                operator.set_backward(run.backward, operator.backward_steepness)
        return attack(run.attack, model, images, labels, replace(settings, seed=run.seed))


def without_gradient(model: nn.Module, run: Run, images: Tensor) -> Tensor:
    """Return the mask ``[N]`` of images with respect to which the logits have no gradient under the run's backward."""
    with switched(model), torch.enable_grad():
        for operator in model.modules():
            if isinstance(operator, MeanSparse) and run.backward is not None:
                operator.set_backward(run.backward, operator.steepness)
        images = images.detach().clone().requires_grad_()
        logits = logits_of(model, images)
        weights = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), images)
    return (gradient == 0).flatten(1).all(1)


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mask ``[N]`` of images classified correctly."""
    if not len(images):
        return torch.zeros(0, dtype=torch.bool, device=images.device)
    with torch.no_grad():
        return logits_of(model, images).argmax(1) == labels


def device_of(sparse: nn.Module) -> torch.device:
    """Return the device of a transformed model."""
    statistics = next(iter(operators(sparse).values())).mean
    assert isinstance(statistics, Tensor)
    return statistics.device


def spread(mask: Tensor, values: Tensor, elsewhere: bool) -> Tensor:
    """Return ``values`` where ``mask`` ``[N]`` is set, in its order, and ``elsewhere`` in the other places."""
    whole = torch.full_like(mask, elsewhere)
    whole[mask] = values
    return whole
