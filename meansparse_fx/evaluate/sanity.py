"""Floor 5: can the evaluation itself be trusted? Checks that fail where an attack is blind or too weak.

Data and arithmetic; runs no model. Each finding says what was seen; where the check fails, also what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .outcome import ModelOutcome, mean, share_interval
from .plan import Run

MOST_LEFT = 0.05  # accuracy under an unbounded attack above which it did not work: half of guessing among ten classes
# What Square, or twice the steps, may break after everything: AutoAttack's own limit, and more images than tries on the
# edge come to. Of label maps the share of pixels.
MOST_MORE, IMAGES_MORE = 0.002, 3
LEAST_POWER = 0.9  # share of the planted examples that all attacks together must find
MOST_FLAT = 0.05  # share of images without a gradient, or whose logits do not follow a tiny change
LEAST_RISES = 0.8  # share of images of which a small step along the gradient raises the loss
_INCOMPLETE = "optimisation was not complete; run more steps before believing any gain"
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
    """How a mask of `probes.examine` is judged: the share of images where it is set must be in a range."""

    name: str
    seen: str  # said of the share where the mask is not set
    cure: str
    most: float  # such share

    def check(self, which: str, mask: Tensor) -> Check:
        share = 1 - mean(mask)
        finding = f"{100 * share:.1f} % of {len(mask)} images {self.seen}"
        return Check.of(f"{self.name}, {which}", share <= self.most, finding, self.cure)


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
        1 - LEAST_RISES,
    ),
    "outspoken": _Rule(
        "silent success",
        "were broken on the way and given back whole",
        "the attack finds more than it returns; keep what it meets on its way",
        0.01,
    ),
}


def checks_of(which: str, masks: Mapping[str, Tensor], outcome: ModelOutcome, runs: Sequence[Run]) -> Iterator[Check]:
    """Yield what masks of `probes` and the outcome of one model say.

    Args:
        which: The model, in words.
        masks: Of the images looked at.
    """
    for name, rule in _RULES.items():
        if len(masks.get(name, ())):
            yield rule.check(which, masks[name])
    if len(masks.get("bounded", ())):
        yield check_unbounded(which, masks["bounded"])
    planted = {name.partition("/")[2]: mask for name, mask in masks.items() if name.startswith("planted/")}
    if planted:
        yield check_power(which, planted)
    if len(masks.get("twice the steps", ())):
        yield check_steps(which, masks["twice the steps"])
    square = check_square(which, outcome, {run.name: run.backward for run in runs})
    if square is not None:
        yield square


def checks_of_labels(labels: Tensor, classes: int, clean: Tensor) -> Iterator[Check]:
    """Yield whether the labels can be the images': the base knows something of them, and they are of several classes.

    Chance is what the commonest label alone would get (the no-information rate).

    Args:
        labels: ``[N]``.
        classes: Number of logits.
        clean: ``[N]``, images that the base has right.
    """
    n, counts = len(labels), labels.flatten().unique(return_counts=True)[1]
    chance, right = int(counts.max()) / int(counts.sum()), int(clean.sum())
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
    sides = {"base": base, "with MeanSparse": sparse}
    if not base.robust or not all(mean(side.clean) for side in sides.values()):
        return
    left = [mean(side.worst) / mean(side.clean) for side in sides.values()]
    shares = ", ".join(f"{100 * share:.1f} % {which}" for which, share in zip(sides, left, strict=True))
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


def check_unbounded(which: str, left: Tensor) -> Check:
    """Judge an attack whose ball holds every image there is: it must break the model.

    Args:
        left: ``[n]``, images that survived it under every backward mode, or the shares of their pixels that did.
    """
    share = mean(left)
    pixels = "the pixels of " if left.is_floating_point() else ""
    finding = f"{100 * share:.1f} % of {pixels}{len(left)} images survive an attack that may change them into any other"
    cure = "the attack is blind here, and what other attacks leave means little; try more steps, or another"
    return Check.of(f"unbounded attack, {which}", share <= MOST_LEFT, finding, cure)


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


def check_steps(which: str, survived: Tensor) -> Check:
    """Judge whether the attacks had steps enough.

    Args:
        survived: ``[n]``, of the images that stood after all runs, those that stand after one more of twice the steps.
    """
    count = int((~survived).sum())
    passed = count < IMAGES_MORE or count / len(survived) <= MOST_MORE
    finding = f"{count} of {len(survived)} images that survived everything fall to one more run of twice the steps"
    return Check.of(f"more steps, {which}", passed, finding, _INCOMPLETE)


def check_steps_on_pixels(which: str, lower: float) -> Check:
    """Judge the same by the share of the pixels that one more run of twice the steps gets wrong."""
    finding = f"one more run of twice the steps gets {100 * lower:.2f} % more of the pixels wrong"
    return Check.of(f"more steps, {which}", lower <= MOST_MORE, finding, _INCOMPLETE)


def check_square(which: str, outcome: ModelOutcome, backwards: Mapping[str, str | None]) -> Check | None:
    """Judge whether a query attack found what gradients should have found; None where not both were run.

    Args:
        backwards: The backward mode by attack; None for the query attack.
    """
    gradient = {name: mask for name, mask in outcome.robust.items() if backwards.get(name) is not None}
    if "square" not in outcome.robust or not gradient:
        return None
    seen = ModelOutcome(outcome.clean, gradient).worst
    alone = seen & ~outcome.robust["square"]
    count, share = int(alone.sum()), mean(alone)
    passed = share <= MOST_MORE or count < IMAGES_MORE
    finding = f"{count} of {len(alone)} images fall to Square and to no gradient attack"
    cure = "the gradients are masked, or had too few steps; run stronger attacks before believing any gain"
    return Check.of(f"Square against gradients, {which}", passed, finding, cure)
