"""Floor 5: one attack on one batch, its result checked. Most are from the maintained AutoAttack package.

Knows a model that returns logits; nothing of operators or of reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from ..arguments import items
from ..errors import EvaluationError
from ..outputs import logits_of
from ..state import kept_random_state
from .descent import PGD, PIXEL_LOSSES, Adaptive, Margin, Nearest, PixelPGD
from .surrogates import WithSurrogate, surrogate, switch_backward
from .threat import AttackSettings

_LOGGER = logging.getLogger("meansparse_fx.attacks")


class Perturber(Protocol):
    """What every attack is, once built."""

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor: ...


Build = Callable[[nn.Module, AttackSettings], Perturber]


@dataclass(frozen=True, slots=True)
class AttackKind:
    """One row of the table.

    Attributes:
        summary: What it does, for reports.
        gradient: It uses gradients, so its result depends on the operator's backward mode.
        classes: Fewest that its loss needs.
        reads_graph: It needs the transformed model itself, not a wrapper around it.
        several_gradients: It takes several of one pass, which a compiled program refuses: its backward reuses memory.
        repeats: Gradients taken for one step.
        longer: Times the steps that are asked for.
        started: It starts at the images that were found against the other model, not at random.
        squares: It changes squares of images.
        maps: It is for label maps ``[N, H, W]``, and only for them.
    """

    build: Build
    summary: str
    gradient: bool = True
    classes: int = 2
    reads_graph: bool = False
    several_gradients: bool = False
    repeats: int = 1
    longer: int = 1
    started: bool = False
    squares: bool = False
    maps: bool = False

    def misfit(self, images: Tensor, logits: Tensor, norm: str) -> str | None:
        """Return why it cannot attack such a model on such images, in words; None if it can."""
        if self.maps != (logits.dim() == 4):
            others = f"is for one label an image: maps have {', '.join(PIXEL_LOSSES)}"
            return "is for label maps" if self.maps else others
        if self.squares and images.dim() != 4:
            return f"needs images [N, C, H, W], and these are {['N', *images.shape[1:]]}"
        if self.squares and norm == "L2" and images.shape[2] < 5:  # it begins with five squares, one above the other
            return f"needs images of 5 rows of pixels or more for L2, and these have {images.shape[2]}"
        if logits.shape[1] < self.classes:
            return f"needs at least {self.classes} classes, the model has {logits.shape[1]}"
        return None


def _common(s: AttackSettings) -> dict[str, Any]:
    return {"norm": s.norm, "eps": s.eps, "seed": s.seed, "verbose": False}


def _apgd(loss: str, kind: type[APGDAttack] = APGDAttack, **options: int) -> Build:
    return lambda model, s: kind(model, n_iter=s.steps, loss=loss, **_common(s), **options, logger=_LOGGER)


def _apgd_targeted(model: nn.Module, s: AttackSettings) -> Perturber:
    targets = s.target_classes
    return APGDAttack_targeted(model, n_iter=s.steps, n_target_classes=targets, **_common(s), logger=_LOGGER)


def _fab(targeted: bool, restarts: int) -> Build:
    return lambda model, s: FABAttack_PT(
        model, n_iter=s.steps, n_restarts=restarts, targeted=targeted, n_target_classes=s.target_classes, **_common(s)
    )


def _square(model: nn.Module, s: AttackSettings) -> Perturber:
    return SquareAttack(model, n_queries=s.queries, p_init=0.8, resc_schedule=False, **_common(s))


def _pgd(kind: Callable[..., PGD], *options: Any) -> Build:
    return lambda model, s: kind(model, s, *options)


_KINDS: dict[str, AttackKind] = {
    "apgd-ce": AttackKind(_apgd("ce"), "gradient ascent on cross-entropy with a step size that adapts (AutoAttack)"),
    "apgd-nearest": AttackKind(
        _apgd("ce", Nearest),
        "apgd-ce of five times the steps, then eight more on the eighth of the images that came nearest to being "
        "broken, by turns on margin and cross-entropy",
        longer=5,
    ),
    "apgd-dlr": AttackKind(_apgd("dlr"), "apgd-ce on the difference-of-logits ratio (AutoAttack)", classes=3),
    "apgd-margin": AttackKind(
        _apgd("dlr", Margin),
        "apgd-ce on the difference between the largest wrong logit and the right one, whatever its scale",
    ),
    "apgd-t": AttackKind(_apgd_targeted, "apgd-ce towards each of the nearest wrong classes (AutoAttack)", classes=4),
    "fab": AttackKind(
        _fab(False, 5), "steps to the nearest decision boundary, 5 restarts (AutoAttack plus)", several_gradients=True
    ),
    "fab-t": AttackKind(
        _fab(True, 1), "steps to the boundary of each of the nearest wrong classes (AutoAttack)", several_gradients=True
    ),
    "square": AttackKind(
        _square, "random search by queries; needs no gradient, so none can be masked", gradient=False, squares=True
    ),
    "pgd": AttackKind(_pgd(PGD), "gradient ascent on cross-entropy in steps of eps / 8 (the paper's PGD)"),
    "adaptive-1-1": AttackKind(
        _pgd(Adaptive, 1),
        "PGD that also leaves features in the operators' bands where they are (the paper's equation 8)",
        reads_graph=True,
    ),
    "adaptive-2-2": AttackKind(
        _pgd(Adaptive, 2), "adaptive-1-1 with squared changes of features (equation 8)", reads_graph=True
    ),
    "apgd-ce-r5": AttackKind(_apgd("ce", n_restarts=5), "apgd-ce with 5 restarts (AutoAttack plus)"),
    "apgd-dlr-r5": AttackKind(_apgd("dlr", n_restarts=5), "apgd-dlr with 5 restarts (AutoAttack plus)", classes=3),
    "apgd-ce-eot20": AttackKind(
        _apgd("ce", eot_iter=20), "apgd-ce on the mean of 20 gradients (AutoAttack rand)", repeats=20
    ),
    "apgd-dlr-eot20": AttackKind(
        _apgd("dlr", eot_iter=20), "apgd-dlr on the mean of 20 gradients (AutoAttack rand)", classes=3, repeats=20
    ),
    "apgd-start": AttackKind(
        _apgd("dlr", Margin),
        "apgd-margin started at the adversarial images found against the other model",
        started=True,
    ),
    **{name: AttackKind(_pgd(PixelPGD, name), f"pgd on {does}", maps=True) for name, (_, does) in PIXEL_LOSSES.items()},
}
ATTACKS = tuple(name for name, row in _KINDS.items() if not row.maps)

# Lists of attacks: our default, the cheapest finder first; and AutoAttack's versions, which with 100 steps and 5000
# queries are AutoAttack itself.
VERSIONS: dict[str, tuple[str, ...]] = {
    "adaptive": (
        "apgd-ce/exact",
        "apgd-ce/identity",
        "apgd-margin/annealed",
        "apgd-nearest/annealed",
        "apgd-t/annealed",
        "square",
        "apgd-start/annealed",
    ),
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce-r5", "apgd-dlr-r5", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce-eot20", "apgd-dlr-eot20"),
}
# The default for label maps.
MAP_RUNS = (
    *(f"pgd-masked/{mode}" for mode in ("exact", "identity", "annealed")),
    "pgd-balanced/annealed",
    "pgd-js/annealed",
)
NAMES = (*_KINDS, *VERSIONS)


def attack_kind(name: str) -> AttackKind:
    """Return the row of an attack.

    Raises:
        EvaluationError: There is no attack of that name.
    """
    if name not in _KINDS:
        raise EvaluationError(f"unknown attack {name!r}: expected one of {', '.join(NAMES)}")
    return _KINDS[name]


def expand(names: Sequence[str]) -> list[str]:
    """Return attacks for names of attacks and of lists of them, each once.

    Example:
        >>> expand(["standard", "pgd", "square"])
        ['apgd-ce', 'apgd-t', 'fab-t', 'square', 'pgd']
    """
    return list(dict.fromkeys(attack for name in map(str, items(names)) for attack in VERSIONS.get(name, (name,))))


def attack(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: AttackSettings,
    backward: str | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Return adversarial images ``[N, C, H, W]`` in the ball around ``images`` and in [0, 1].

    An image the attack does not break comes back unchanged or changed in vain. The caller's random state is
    left alone; the operators' backward modes are not: see `operators.switched`.

    Args:
        images, labels: ``[N, C, H, W]`` and ``[N]``, or label maps.
        backward: The surrogate of the operators' gradient, see `surrogates`; None takes it as it is set.
        starts: ``[N, C, H, W]`` in the ball, where an attack begins that is `started`.

    Raises:
        EvaluationError: The attack or the backward does not exist, needs more classes, or left the ball.
    """
    row = attack_kind(name)
    if not len(images):
        return images
    with torch.no_grad():
        logits = logits_of(model, images, labels)  # of all: compilers make another program for a batch of one
    if (misfit := row.misfit(images, logits, settings.norm)) is not None:
        raise EvaluationError(f"{name} {misfit}")
    targets = min(settings.target_classes, logits.shape[1] - 1)
    settings = replace(settings, steps=row.longer * settings.steps, target_classes=targets)
    if backward is not None:
        chosen, gradients = surrogate(backward), settings.steps + 1  # APGD looks at its start, too
        if not row.reads_graph:
            model = WithSurrogate(model, chosen, gradients, row.repeats)
        elif len(chosen.modes) == 1:
            switch_backward(model, *chosen.modes[0])
        else:
            raise EvaluationError(f"{name} reads the model's graph and takes one backward mode, not {backward}")
    with kept_random_state(images.device):
        built = row.build(model, settings)
        if row.started:
            assert isinstance(built, Margin)
            assert starts is not None
            adversarial = built.perturb_from(starts, images, labels)
        else:
            adversarial = built.perturb(images.clone(), labels.clone())
    adversarial = adversarial.detach()
    settings.require_in_ball(name, images, adversarial)
    return adversarial
