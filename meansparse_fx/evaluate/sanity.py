"""Floor 5: can the evaluation itself be trusted? Checks that fail where an attack is blind or too weak.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .outcome import ModelOutcome, PairedDifference, mean

MOST_LEFT = 0.05  # accuracy under an unbounded attack above which it did not work: half of guessing among ten classes
# What Square alone may break: AutoAttack's own limit, and more images than tries on the edge come to.
MOST_BY_SQUARE, IMAGES_BY_SQUARE = 0.002, 3


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

    def to_dict(self) -> dict:
        """Return the fields by name."""
        return {"name": self.name, "passed": self.passed, "finding": self.finding}


def check_unbounded(which: str, left: Tensor, blank: Tensor) -> Check:
    """Judge an attack whose ball holds every image there is: it must break the model.

    Args:
        which: The model.
        left: ``[n]``, images that survived it under every backward mode.
        blank: ``[n]``, those of them that the model has no gradient for: nothing for an attack to follow.
    """
    share = mean(left)
    finding = f"{100 * share:.1f} % of {len(left)} images survive an attack that may change them into any other"
    if share > MOST_LEFT and 2 * int(blank.sum()) > int(left.sum()):
        finding += (
            f"; for {int(blank.sum())} of them the gradient is lost in the model itself, zero with respect to every "
            "pixel: rounding, a step, detach or no_grad. Give that a backward (torch.autograd.Function), or attack "
            "without gradients"
        )
    elif share > MOST_LEFT:
        finding += ": the attack is blind here, and what other attacks leave means little; try more steps, or another"
    return Check(f"unbounded attack, {which}", share <= MOST_LEFT, finding)


def check_steps(which: str, run: str, fewer: Tensor, more: Tensor) -> Check:
    """Judge whether more steps help the attacker, or at least not the defender.

    Args:
        which: The model.
        run: The attack.
        fewer: ``[n]``, images that survived half of the steps.
        more: ``[n]``, images that survived all of them.
    """
    change = PairedDifference.of(fewer, more)
    passed = change.low <= 0
    finding = f"with twice the steps accuracy under {run} changes by {change.points()} points on {len(more)} images"
    if not passed:
        finding += ": steps that help the defender mean an attack that does not work"
    elif change.high < 0:
        finding += ": still falling, so more steps would find more"
    return Check(f"more steps, {which}", passed, finding)


def check_square(which: str, outcome: ModelOutcome, backwards: Mapping[str, str | None]) -> Check | None:
    """Judge whether a query attack found what gradients should have found; None where not both were run.

    Args:
        which: The model.
        outcome: What it did.
        backwards: The backward mode by attack; None for the query attack.
    """
    gradient = {name: mask for name, mask in outcome.robust.items() if backwards.get(name) is not None}
    if "square" not in outcome.robust or not gradient:
        return None
    seen = ModelOutcome(outcome.clean, gradient).worst
    alone = seen & ~outcome.robust["square"]
    count, share = int(alone.sum()), mean(alone)
    passed = share <= MOST_BY_SQUARE or count < IMAGES_BY_SQUARE
    finding = f"{count} of {len(alone)} images fall to Square and to no gradient attack"
    if not passed:
        finding += ": the gradients are masked, or had too few steps; run stronger attacks before believing any gain"
    return Check(f"Square against gradients, {which}", passed, finding)


def check_balls(images: int) -> Check:
    """Report the check that every adversarial image went through: one that fails it is an error at once."""
    return Check("inside the ball", True, f"all {images:,} adversarial images are within eps and in [0, 1]")
