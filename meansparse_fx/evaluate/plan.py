"""Floor 5: which attacks are run, in which order, and one of them on one batch.

Knows attacks and the switches on operators; keeps no results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import items
from ..errors import EvaluationError
from ..operators import operators, switched
from ..outputs import logits_of
from .attacks import attack, attack_kind, expand
from .surrogates import surrogate
from .threat import AttackSettings


@dataclass(frozen=True, slots=True)
class Run:
    """One attack under one surrogate of the operator's gradient.

    Attributes:
        attack: Name of the attack.
        backward: Name of the surrogate, see `surrogates`; None for an attack without gradients.
        seed: Of its random start; every run has its own, so that two runs are two tries on the base as well.
    """

    attack: str
    backward: str | None
    seed: int

    @property
    def name(self) -> str:
        return self.attack if self.backward is None else f"{self.attack}/{self.backward}"

    @property
    def started(self) -> bool:
        """Whether it begins at images found against the other model."""
        return attack_kind(self.attack).started


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """Which attacks are run, in their order, and how.

    Attributes:
        full_rows: Every run attacks all images, also those broken before it.
        compile, amp: How attacks meet a model; see `compiled`.
    """

    runs: Sequence[Run]
    settings: AttackSettings
    full_rows: bool = False
    compile: bool | str | None = False
    amp: torch.dtype | None = None

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for results to be of this plan, by what it is in words."""
        how = {"full_rows": self.full_rows, "compile": self.compile, "amp": str(self.amp)}
        runs = [run.name for run in self.runs]
        return {"attack settings": asdict(self.settings) | how, "attacks or backwards": runs}


def plan_runs(attacks: Sequence[str], backwards: Sequence[str], seed: int) -> list[Run]:
    """Return the runs in their order.

    The operator's own gradient comes first: what survives it is known, whatever those who know leave of it. Attacks
    without gradients come after those with, and those that start at the other model's adversarial images last.

    Args:
        attacks: Names of attacks, each with its backward (``apgd-ce/annealed``) or, without one, to be run under each
            of ``backwards``; or of lists of such names.
        backwards: Of attacks that have none of their own.
        seed: Of the first; the others count on.
    """
    found: dict[tuple[str, str | None], None] = {}
    named = [name.partition("/") for name in expand(attacks)]
    for mode in map(str, items(backwards)):
        surrogate(mode)
        found |= {(name, mode): None for name, slash, _ in named if not slash and attack_kind(name).gradient}
    for name, slash, own in named:
        if slash:
            surrogate(own)
        if slash and not attack_kind(name).gradient:
            raise EvaluationError(f"{name} uses no gradient, so it has no backward: write {name}, not {name}/{own}")
        if slash or not attack_kind(name).gradient:
            found[name, own or None] = None
    if not found:
        raise EvaluationError("no attack asked for: give at least one, and for gradient attacks a backward")
    order = sorted(found, key=lambda pair: (attack_kind(pair[0]).started, pair[1] != "exact", pair[1] is None))
    return [Run(name, mode, seed + i) for i, (name, mode) in enumerate(order)]


def fitting(
    runs: Sequence[Run],
    attacks: Sequence[str],
    settings: AttackSettings,
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
) -> list[Run]:
    """Return the runs that can attack a model on such images; of lists of attacks the others are left out.

    Args:
        attacks: What was asked for; what is named there itself has to fit.
        labels: Theirs; only their being maps matters.

    Raises:
        EvaluationError: A named one cannot, or none can.
    """
    named = {name.partition("/")[0] for name in map(str, items(attacks))}
    images = images[:2].to(next(itertools.chain(model.parameters(), model.buffers()), images).device)
    with torch.no_grad():
        logits = logits_of(model, images, None if labels is None else labels[:2])
    misfits = {run: attack_kind(run.attack).misfit(images, logits, settings.norm) for run in runs}
    for run, misfit in misfits.items():
        if misfit is not None and (run.attack in named or all(misfits.values())):
            raise EvaluationError(f"{run.attack} {misfit}")
    return [run for run in runs if misfits[run] is None]


def perturbed(
    model: nn.Module,
    run: Run,
    images: Tensor,
    labels: Tensor,
    settings: AttackSettings,
    starts: Tensor | None = None,
) -> Tensor:
    """Return what ``run`` makes of ``images``; the operators' switches are put back."""
    with switched(model):
        return attack(run.attack, model, images, labels, replace(settings, seed=run.seed), run.backward, starts)


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
