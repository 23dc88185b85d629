"""Floor 5: the base and the transformed model under the same attacks, one batch after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ..passes import restore
from .attacks import AttackSettings
from .ledger import Ledger, Masks
from .outcome import ModelOutcome
from .plan import Run, correct, device_of, perturbed, spread, without_gradient
from .sanity import Check, check_square, check_steps, check_unbounded
from .swift import Attacked

Advance = Callable[[], object]  # called after each attack
OTHER = {"base": "sparse", "sparse": "base"}
_IN_WORDS = {"base": "base", "sparse": "with MeanSparse"}


class Comparison:
    """Both models under all runs, one batch after the other.

    Attributes:
        met: Names of the batches met.
        found, sanity: Masks by number of the batch and by model.
        made: Adversarial images made.
    """

    def __init__(
        self,
        sparse: fx.GraphModule,
        runs: Sequence[Run],
        settings: AttackSettings,
        ledger: Ledger,
        skip_broken: bool,
        compile: bool,
        amp: torch.dtype | None,
    ) -> None:
        self._models: dict[str, nn.Module] = {"base": restore(sparse), "sparse": sparse}
        self._attacked = Attacked(self._models, compile, amp)
        self._runs, self._settings, self._ledger, self._skip_broken = runs, settings, ledger, skip_broken
        self._device = device_of(sparse)
        self.found: dict[int, dict[str, Masks]] = {}
        self.sanity: dict[int, dict[str, Masks]] = {}
        self.met: list[str] = []
        self.made = 0

    def meet(self, batch: int, images: Tensor, labels: Tensor, sanity_images: int, advance: Advance) -> None:
        """Attack one batch, and look at the attacks themselves on its first ``sanity_images`` images."""
        name = f"batch {batch}"
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
        self.found[batch] = dict(masks)
        if sanity_images > 0:
            first = slice(sanity_images)
            self.sanity[batch] = {
                which: self._examine(name, which, images[first], labels[first], masks[which]["clean"][first])
                for which in OTHER
            }

    def _attack(
        self, name: str, which: str, images: Tensor, labels: Tensor, advance: Advance
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
                found = perturbed(self._attacked.by(run, which), run, x, y, self._settings)
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
            found = perturbed(self._attacked.by(run, which), run, images[target], labels[target], allowed)
            return spread(target, correct(model, found, labels[target]), False)

        def work() -> Masks:
            masks: dict[str, Tensor] = {}
            for run in unbounded.values():
                survived = left(run, replace(settings, eps=largest))
                masks["unbounded"] = masks.get("unbounded", survived) & survived
                blank = (
                    spread(survived, without_gradient(model, run, images[survived]), False)
                    if survived.any()
                    else survived
                )
                masks["no gradient"] = masks.get("no gradient", blank) & blank
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
        return {which: outcome([masks[which] for _, masks in sorted(self.found.items())]) for which in OTHER}

    def checks(self, outcomes: dict[str, ModelOutcome]) -> list[Check]:
        """Return what the evaluation says about itself."""
        found: list[Check | None] = []
        backwards = {run.name: run.backward for run in self._runs}
        first = next((run.name for run in self._runs if run.backward is not None), None)
        for which, words in _IN_WORDS.items():
            looked = [masks[which] for _, masks in sorted(self.sanity.items())]
            if looked and "unbounded" in looked[0]:
                left, blank = (torch.cat([m[key] for m in looked]) for key in ("unbounded", "no gradient"))
                found.append(check_unbounded(words, left, blank))
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
