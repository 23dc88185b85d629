"""Floor 5: the verb. Attack the base and the transformed model, batch by batch, and collect what is left of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..operators import get_alpha, require_transformed
from ..passes import restore
from ..progress import bar
from .attacks import AttackSettings
from .ledger import Ledger, Masks, model_identity
from .outcome import ModelOutcome
from .plan import Run, batches, correct, device_of, perturbed, plan_runs, spread
from .sanity import Check, check_balls, check_square, check_steps, check_unbounded
from .verdict import Evaluation

DEFAULT_ATTACKS = ("apgd-ce", "square")
SANITY_IMAGES = 100
OTHER = {"base": "sparse", "sparse": "base"}
_IN_WORDS = {"base": "base", "sparse": "with MeanSparse"}


def evaluate(
    sparse: fx.GraphModule,
    test: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 100,
    queries: int = 5000,
    batch_size: int = 128,
    seed: int = 0,
    skip_broken: bool = False,
    sanity_images: int = SANITY_IMAGES,
    checkpoint: str | Path | None = None,
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
        attacks: Names from `ATTACKS`, or of AutoAttack's versions: ``standard``, ``plus``, ``rand``.
        backwards: Modes of the operator's backward; ``identity`` is BPDA, the attacker who knows.
        steps: Iterations of the gradient attacks.
        queries: Queries of the Square attack.
        batch_size: For tensors; a loader brings its own.
        seed: Of the attacks.
        skip_broken: Attack only images that no attack before has broken: the same worst case for less work, but rows
            that are no longer each attack's own.
        sanity_images: Images for the checks that the attacks work at all (`Evaluation.checks`); 0 leaves out those
            that need attacks of their own.
        checkpoint: File to keep results in as they come; if it exists, go on from it. It stays: remove it when the
            result is saved. The loader must yield the same images in the same order each time. A resumed run ends as
            an uninterrupted one would, as far as the device computes the same thing twice.
        progress: Show a progress bar.

    Raises:
        StateError: The model is not transformed, or in train mode.
        EvaluationError: No images, images outside [0, 1], an attack that cannot be run or left its ball, or a
            checkpoint of another run.
    """
    require_transformed(sparse, "evaluate")
    settings = AttackSettings(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)
    runs = plan_runs(attacks, backwards, seed)
    identity = model_identity(sparse, alpha=True) | {
        "attack settings": [f"{settings}", skip_broken, sanity_images],
        "attacks or backwards": [run.name for run in runs],
    }
    ledger = Ledger(checkpoint, identity)
    comparison = _Comparison(sparse, runs, settings, ledger, skip_broken)
    with bar(progress) as display, ledger:
        task = display.add_task("attack", total=_count(test, batch_size, 2 * len(runs)), note="")
        for images, labels in batches(test, batch_size):
            comparison.meet(images, labels, sanity_images, lambda: display.advance(task))
            display.update(task, note=comparison.so_far())
        ledger.require_whole(comparison.met)
    outcomes = comparison.outcomes()
    return Evaluation(
        base=outcomes["base"],
        sparse=outcomes["sparse"],
        alpha=get_alpha(sparse),
        eps=eps,
        norm=norm,
        steps=steps,
        queries=queries,
        seed=seed,
        seconds=ledger.seconds,
        cumulative=skip_broken,
        checks=(*comparison.checks(outcomes), check_balls(comparison.made)),
    )


def _count(test: Any, batch_size: int, runs: int) -> int | None:
    """Return how many attacks on batches there will be, if the data says how many those are."""
    if isinstance(test, (tuple, list)) and len(test) == 2 and isinstance(test[0], Tensor):
        return math.ceil(len(test[0]) / batch_size) * runs
    return len(test) * runs if isinstance(test, Sized) else None


class _Comparison:
    """Both models under all runs, one batch after the other.

    Attributes:
        met: Names of the batches met.
        made: Adversarial images made.
    """

    def __init__(
        self, sparse: fx.GraphModule, runs: Sequence[Run], settings: AttackSettings, ledger: Ledger, skip_broken: bool
    ) -> None:
        self._models: dict[str, nn.Module] = {"base": restore(sparse), "sparse": sparse}
        self._runs, self._settings, self._ledger, self._skip_broken = runs, settings, ledger, skip_broken
        self._device = device_of(sparse)
        self._found: dict[str, list[Masks]] = {"base": [], "sparse": []}
        self._sanity: dict[str, list[Masks]] = {"base": [], "sparse": []}
        self._looked_at = 0
        self.met: list[str] = []
        self.made = 0

    def meet(self, images: Tensor, labels: Tensor, sanity_images: int, advance: Any) -> None:
        """Attack one batch."""
        name = f"batch {len(self.met)}"
        self._ledger.require_same(name, images, labels)
        self.met.append(name)
        images, labels = images.to(self._device), labels.to(self._device)
        masks: dict[str, dict[str, Tensor]] = {}
        crossed: dict[str, Tensor] = {}  # still right after all that was found against the other model
        for which in OTHER:
            masks[which], crossed[OTHER[which]] = self._attack(name, which, images, labels, advance)
        for which, own in masks.items():
            standing = torch.stack(list(own.values())).all(0) if self._skip_broken else own["clean"]
            own["transfer"] = crossed[which] & standing
            self._found[which].append(own)
        if (left := sanity_images - self._looked_at) > 0:
            self._looked_at += len(images[:left])
            for which in OTHER:
                clean = masks[which]["clean"][:left]
                self._sanity[which].append(self._examine(name, which, images[:left], labels[:left], clean))

    def _attack(
        self, name: str, which: str, images: Tensor, labels: Tensor, advance: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return one model's masks of a batch, and that of the images on which the other is right to the end."""
        model, other = self._models[which], self._models[OTHER[which]]
        clean = self._ledger.recall(f"{name}, {which}, clean", lambda: {"clean": correct(model, images, labels)})
        masks, crossed = dict(clean), torch.ones_like(clean["clean"])
        standing = clean["clean"]
        for run in self._runs:

            def work(run: Run = run, target: Tensor = standing) -> Masks:
                target = target.to(self._device)
                x, y = images[target], labels[target]
                found = perturbed(model, run, x, y, self._settings)
                return {
                    "survived": spread(target, correct(model, found, y), False),
                    "crossed": spread(target, correct(other, found, y), True),
                }

            result = self._ledger.recall(f"{name}, {which}, {run.name}", work)
            masks[run.name] = result["survived"]
            crossed = crossed & result["crossed"]
            self.made += int(standing.sum())
            if self._skip_broken:
                standing = result["survived"]
            advance()
        return masks, crossed

    def _examine(self, name: str, which: str, images: Tensor, labels: Tensor, clean: Tensor) -> Masks:
        """Return what survives an unbounded attack, and the first gradient run with half of its steps."""
        model, settings = self._models[which], self._settings
        largest = 1.0 if settings.norm == "Linf" else math.sqrt(images[0].numel())
        gradient = [run for run in self._runs if run.backward is not None]
        # One run for each backward; without operators they are all the same.
        unbounded = {
            run.backward: replace(run, attack="apgd-ce") for run in gradient[: None if which == "sparse" else 1]
        }

        def left(run: Run, allowed: AttackSettings) -> Tensor:
            target = clean.to(self._device)
            found = perturbed(model, run, images[target], labels[target], allowed)
            return spread(target, correct(model, found, labels[target]), False)

        def work() -> Masks:
            masks: dict[str, Tensor] = {}
            for run in unbounded.values():
                survived = left(run, replace(settings, eps=largest))
                masks["unbounded"] = masks.get("unbounded", survived) & survived
            if gradient and settings.steps > 1:
                masks["half the steps"] = left(gradient[0], replace(settings, steps=settings.steps // 2))
            return masks

        return self._ledger.recall(f"{name}, {which}, sanity", work)

    def so_far(self) -> str:
        """Return the worst-case accuracies so far, for the progress bar."""
        shares = {which: float(o.worst.double().mean()) for which, o in self.outcomes().items()}
        return f"worst case so far: base {shares['base']:.1%}, with MeanSparse {shares['sparse']:.1%}"

    def outcomes(self) -> dict[str, ModelOutcome]:
        """Return what both models did."""
        return {which: outcome(self._found[which]) for which in OTHER}

    def checks(self, outcomes: dict[str, ModelOutcome]) -> list[Check]:
        """Return what the evaluation says about itself."""
        found: list[Check | None] = []
        backwards = {run.name: run.backward for run in self._runs}
        first = next((run.name for run in self._runs if run.backward is not None), None)
        for which, looked in self._sanity.items():
            words = _IN_WORDS[which]
            if looked and "unbounded" in looked[0]:
                found.append(check_unbounded(words, torch.cat([m["unbounded"] for m in looked])))
            if looked and "half the steps" in looked[0]:
                fewer = torch.cat([m["half the steps"] for m in looked])
                found.append(check_steps(words, str(first), fewer, outcomes[which].robust[str(first)][: len(fewer)]))
            found.append(check_square(words, outcomes[which], backwards))
        return [check for check in found if check is not None]


def outcome(masks: Sequence[Masks]) -> ModelOutcome:
    """Return one outcome from the masks of successive batches, each with ``clean`` and the runs' names."""
    joined = {name: torch.cat([m[name] for m in masks]) for name in masks[0]}
    clean = joined.pop("clean")
    return ModelOutcome(clean, joined)
