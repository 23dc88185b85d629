"""Floor 5: can the evaluation itself be trusted? Checks that fail where an attack is blind or too weak.

Data and arithmetic; runs no model. Each finding says what was seen; where the check fails, also what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .outcome import IN_WORDS, ModelOutcome, mean, share_interval
from .plan import Run

MOST_LEFT = 0.05  # accuracy under an unbounded attack above which it did not work: half of guessing among ten classes
# What Square, or twice the steps, may break after everything: AutoAttack's own limit, and more images than tries on the
# edge come to. Of label maps the share of pixels.
MOST_MORE, FEW_MORE = 0.002, 2
LEAST_POWER = 0.9  # share of the planted examples that all attacks together must find
MOST_FLAT = 0.05  # share of images without a gradient, or whose logits do not follow a tiny change
MOST_STUCK = 0.2  # share of images of which no small step along the gradient raises the loss
MOST_EXTREME = 0.01  # share of the right images that must fall, and that must stand, of one of the models
FEW = 50  # images that say too little about labels to convict them, unless the base is shown to be below chance


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that holds of every sound evaluation, and whether it held here.

    Attributes:
        name: What was looked at.
        passed: Whether it is as it should be.
        finding: What was found, in a sentence.
    """

    name: str
    passed: bool
    finding: str

    @classmethod
    def of(cls, name: str, passed: bool, finding: str, cure: str) -> Check:
        """Return the check, its finding with what to do where it failed."""
        return cls(name, passed, finding if passed else f"{finding}: {cure}")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a mask of `probes` is judged: of few images may it not be set.

    Attributes:
        name: Of the check.
        seen: Said of the images where it is not set.
        cure: What to do if these are too many.
        most: Such share of them is not.
        few: So many images are not either, whatever their share.
    """

    name: str
    seen: str
    cure: str
    most: float
    few: int = 0

    def check(self, which: str, mask: Tensor) -> Check:
        """Return the check of ``[n]`` images, or of the shares of their pixels."""
        if mask.is_floating_point():
            share = 1 - mean(mask)
            passed, amount = share <= self.most, f"{100 * share:.2f} % of the pixels"
        else:
            count = int((~mask).sum())
            passed, amount = count <= self.few or count / len(mask) <= self.most, f"{count}"
        return Check.of(f"{self.name}, {which}", passed, f"{amount} of {len(mask)} images {self.seen}", self.cure)


_RULES = {
    "repeatable": _Rule(
        "repeatable outputs",
        "have other logits when they are shown again",
        "the model is randomised, and what broke it once may not do so again; average gradients (attacks "
        "apgd-ce-eot20, apgd-dlr-eot20), or fix its seed",
        0.0,
    ),
    "logits": _Rule(
        "logits",
        "have outputs that are probabilities",
        "losses of logits are flat there; take the softmax out of the model, or return its logarithm",
        MOST_FLAT,
    ),
    "continuous": _Rule(
        "continuous outputs",
        "have the same logits after a tiny change",
        "inputs or logits are quantised, so gradients say little; attack the model without the rounding",
        MOST_FLAT,
    ),
    "slope": _Rule(
        "gradient of cross-entropy",
        "have a gradient of exactly zero under every backward",
        "lost in the model itself (rounding, a step, detach, no_grad), which then needs a backward "
        "(torch.autograd.Function) or attacks without gradients; or underflown from large logits: divide them, or rely "
        "on apgd-margin and apgd-t alone, which do not depend on their scale",
        MOST_FLAT,
    ),
    "rises": _Rule(
        "ascent",
        "have no larger loss after a small step along the gradient",
        "the gradient does not point where the loss grows; attack through a surrogate of what hides it",
        MOST_STUCK,
    ),
    "silent success": _Rule(
        "silent success",
        "were broken on the way and given back whole",
        "the attack finds more than it returns; keep what it meets on its way",
        0.01,
    ),
    "unbounded": _Rule(
        "unbounded attack",
        "survive an attack that may change them into any other",
        "the attack is blind here, and what other attacks leave means little; try more steps, or another",
        MOST_LEFT,
    ),
    "twice the steps": _Rule(
        "more steps",
        "that survived everything fall to one more run of twice the steps",
        "optimisation was not complete; run more steps before believing any gain",
        MOST_MORE,
        FEW_MORE,
    ),
    "square": _Rule(
        "Square against gradients",
        "fall to Square and to no gradient attack",
        "the gradients are masked, or had too few steps; run stronger attacks before believing any gain",
        MOST_MORE,
        FEW_MORE,
    ),
}


def checks_of(which: str, masks: Mapping[str, Tensor], outcome: ModelOutcome, runs: Sequence[Run]) -> Iterator[Check]:
    """Yield what masks of `probes` and the outcome of one model say.

    Args:
        which: The model, in words.
        masks: Of the images looked at.
    """
    # Not those that start at images which Square may have found.
    gradient = {run.name: outcome.robust[run.name] for run in runs if run.backward is not None and not run.kind.started}
    if gradient and "square" in outcome.robust:
        left = ModelOutcome(outcome.clean, gradient).worst
        masks = {**masks, "square": ~left | outcome.robust["square"]}
    for name, rule in _RULES.items():
        if len(masks.get(name, ())):
            yield rule.check(which, masks[name])
    planted = {name.partition("/")[2]: mask for name, mask in masks.items() if name.startswith("planted/")}
    if planted:
        yield check_power(which, planted)


def checks_of_labels(labels: Tensor, classes: int, clean: Tensor) -> Iterator[Check]:
    """Yield whether the labels can be the images': the base knows something of them, and they are of several classes.

    Chance is what the commonest label alone would get (the no-information rate).

    Args:
        labels: ``[N]``.
        classes: Number of logits.
        clean: ``[N]``, images that the base has right.
    """
    n, right = len(labels), int(clean.sum())
    _, counts = labels.flatten().unique(return_counts=True)
    chance = int(counts.max()) / int(counts.sum())
    low, high = share_interval(right, n) if len(counts) > 1 else (math.inf, math.inf)  # one class is its own chance
    finding = f"{right} of {n} images right; their commonest label alone would get {100 * chance:.1f} %"
    yield check_chance(low - chance, high - chance, n, finding)
    # As many of these as n images of equally frequent classes would show; half of them will do.
    passed = n < FEW or len(counts) >= max(2, classes * (1 - (1 - 1 / classes) ** n) / 2)
    finding = f"{len(counts)} of {classes} classes among {n} images"
    cure = "the result is of these alone; were the images sorted by class? Draw them from all"
    yield Check.of("classes seen", passed, finding, cure)


def check_threat(base: ModelOutcome, sparse: ModelOutcome) -> Iterator[Check]:
    """Yield whether the threat can tell two models apart: one that nearly all or no images withstand tells nothing."""
    if not base.robust or not all(mean(side.clean) for side in (base, sparse)):
        return
    left = [mean(side.worst) / mean(side.clean) for side in (base, sparse)]
    shares = ", ".join(f"{100 * share:.1f} % {words}" for words, share in zip(IN_WORDS.values(), left, strict=True))
    finding = f"of what is right without an attack, the worst case leaves {shares}"
    strong, weak = max(left) < MOST_EXTREME, min(left) > 1 - MOST_EXTREME
    cure = "too weak a threat to tell; give a larger eps, or stronger attacks"
    if strong:
        cure = "too strong a threat to tell the two apart; give a smaller eps (8/255, not 8)"
    yield Check.of("threat", not (strong or weak), finding, cure)


def check_chance(low: float, high: float, n: int, finding: str) -> Check:
    """Judge whether the base knows anything of the labels.

    Args:
        low, high: Interval of its accuracy above what the commonest label alone would get.
        n: Images. Of few the interval must leave out everything above chance, of many all that is not.
    """
    cure = "no trained weights, shifted labels, another order of classes, or no normalisation? Look at a few"
    return Check.of("base above chance", (high if n < FEW else low) > 0, finding, cure)


def check_power(which: str, missed: Mapping[str, Tensor]) -> Check:
    """Judge whether the attacks find what was planted (Zimmermann et al., 2022).

    Args:
        missed: ``[n]`` by run, and by ``random search``: planted examples not found.
    """
    runs = {name: mask for name, mask in missed.items() if name != "random search"}
    count = len(next(iter(runs.values())))
    together = ModelOutcome(next(iter(runs.values())), runs).worst
    share = 1 - mean(together)
    each = ", ".join(f"{name} {100 * (1 - mean(mask)):.0f} %" for name, mask in runs.items())
    finding = (
        f"{count - int(together.sum())} of {count} planted adversarial examples found ({each}; random search "
        f"{100 * (1 - mean(missed['random search'])):.0f} %)"
    )
    cure = "as large a share of the real ones may be missed; try more steps, or another attack"
    return Check.of(f"planted examples, {which}", share >= LEAST_POWER, finding, cure)
