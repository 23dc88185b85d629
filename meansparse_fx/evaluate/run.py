"""Floor 5: run attacks on the base and on the transformed model, and collect the outcome."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import EvaluationError
from ..nn import MeanSparse
from ..operators import get_alpha, operators, require_transformed, switched
from ..passes import restore
from ..progress import bar
from .attacks import AttackSettings, attack, logits_of, uses_gradient
from .outcome import Evaluation, ModelOutcome


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
    """Return every attack under every backward mode; an attack without gradients once."""
    modes = [(a, b) for a in attacks for b in (backwards if uses_gradient(a) else (None,))]
    if not modes:
        raise EvaluationError("no attack asked for: give at least one")
    return [Run(a, b, seed + i) for i, (a, b) in enumerate(modes)]


def attack_batch(
    model: nn.Module, images: Tensor, labels: Tensor, runs: Sequence[Run], settings: AttackSettings
) -> Iterator[tuple[Run, Tensor, Tensor]]:
    """Yield each run with its adversarial images and the mask ``[N]`` of those still classified correctly."""
    with switched(model):
        for run in runs:
            for operator in model.modules():
                if isinstance(operator, MeanSparse) and run.backward is not None:
                    operator.set_backward(run.backward, operator.steepness)
            adversarial = attack(run.attack, model, images, labels, replace(settings, seed=run.seed))
            yield run, adversarial, correct(model, adversarial, labels)


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mask ``[N]`` of images classified correctly."""
    with torch.no_grad():
        return logits_of(model, images).argmax(1) == labels


def evaluate(
    sparse: fx.GraphModule,
    test: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = ("apgd-ce",),
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 100,
    queries: int = 5000,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Return how the transformed model and its base stand up to the same attacks on the same images.

    Gradient attacks are run once for each backward mode; the base, which has no operator, gets as many tries
    from other random starts. Each model also meets the images found against the other (``transfer``). The
    worst case counts an image only if it survives everything.

    Args:
        sparse: A transformed model in eval mode.
        test: ``(images, labels)`` tensors, or a loader of such batches: images ``[N, C, H, W]`` in [0, 1],
            labels ``[N]``. They should be images that neither calibration nor the choice of alpha saw.
        eps: Radius of the ball, in the units of the images.
        norm: ``Linf`` or ``L2``.
        attacks: Names from `ATTACKS`.
        backwards: Modes of the operator's backward; ``identity`` is BPDA, the attacker who knows.
        steps: Iterations of the gradient attacks.
        queries: Queries of the Square attack.
        batch_size: For tensors; a loader brings its own.
        seed: Of the attacks.
        progress: Show a progress bar.

    Raises:
        StateError: The model is not transformed, or in train mode.
        EvaluationError: No images, images outside [0, 1], or an attack that cannot be run or left its ball.
    """
    require_transformed(sparse, "evaluate")
    settings = AttackSettings(eps=eps, norm=norm, steps=steps, queries=queries)
    runs = plan_runs(attacks, backwards, seed)
    models = {"base": restore(sparse), "sparse": sparse}
    start = time.perf_counter()
    found: dict[str, list[dict[str, Tensor]]] = {"base": [], "sparse": []}
    data = list(batches(test, batch_size, next(iter(operators(sparse).values())).mean.device))
    with bar(progress) as display:
        task = display.add_task("attack", total=len(data) * len(runs) * 2, note="")
        for images, labels in data:
            adversarial: dict[str, list[Tensor]] = {"base": [], "sparse": []}
            masks: dict[str, dict[str, Tensor]] = {}
            for which, model in models.items():
                masks[which] = {"clean": correct(model, images, labels)}
                for run, perturbed, survived in attack_batch(model, images, labels, runs, settings):
                    adversarial[which].append(perturbed)
                    masks[which][run.name] = survived & masks[which]["clean"]
                    display.advance(task)
            for which, other in (("base", "sparse"), ("sparse", "base")):
                survived = masks[which]["clean"].clone()
                for perturbed in adversarial[other]:
                    survived &= correct(models[which], perturbed, labels)
                masks[which]["transfer"] = survived
                found[which].append({name: mask.cpu() for name, mask in masks[which].items()})
    base, transformed = (outcome(found[which]) for which in ("base", "sparse"))
    return Evaluation(
        base, transformed, get_alpha(sparse), eps, norm, steps, queries, seed, time.perf_counter() - start
    )


def outcome(masks: Sequence[dict[str, Tensor]]) -> ModelOutcome:
    """Return one outcome from the masks of successive batches, each with ``clean`` and the runs' names."""
    joined = {name: torch.cat([m[name] for m in masks]) for name in masks[0]}
    clean = joined.pop("clean")
    return ModelOutcome(clean, joined)


def batches(test: Iterable[Any] | tuple[Tensor, Tensor], batch_size: int, device: torch.device):
    """Yield (images, labels) on ``device``, checked.

    Raises:
        EvaluationError: There are none, or images are not in [0, 1].
    """
    if isinstance(test, (tuple, list)) and len(test) == 2 and all(isinstance(t, Tensor) for t in test):
        test = zip(test[0].split(batch_size), test[1].split(batch_size), strict=True)
    empty = True
    for batch in test:
        if not (isinstance(batch, (tuple, list)) and len(batch) >= 2):
            raise EvaluationError("the loader must yield (images, labels) batches")
        images, labels = batch[0].to(device), batch[1].to(device)
        if len(images) == 0:
            continue
        if images.min() < 0 or images.max() > 1:
            raise EvaluationError(
                f"images must be in [0, 1] (found {images.min():.3f} to {images.max():.3f}): eps has no meaning "
                "otherwise; put the normalisation into the model"
            )
        empty = False
        yield images, labels
    if empty:
        raise EvaluationError("no images to evaluate on")
