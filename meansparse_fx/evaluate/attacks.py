"""Floor 5: one attack on one batch, from the maintained AutoAttack package, its result checked.

Knows a model that returns logits; nothing of operators or of reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from ..errors import EvaluationError

_LOGGER = logging.getLogger("meansparse_fx.attacks")

# Name -> (builder, uses gradients, fewest classes its loss needs). AutoAttack's own settings otherwise.
_BUILDERS: dict[str, tuple[Callable, bool, int]] = {
    "apgd-ce": (lambda m, s: APGDAttack(m, n_iter=s.steps, loss="ce", **_common(s), logger=_LOGGER), True, 2),
    "apgd-dlr": (lambda m, s: APGDAttack(m, n_iter=s.steps, loss="dlr", **_common(s), logger=_LOGGER), True, 3),
    "apgd-t": (
        lambda m, s: APGDAttack_targeted(
            m, n_iter=s.steps, n_target_classes=s.target_classes, **_common(s), logger=_LOGGER
        ),
        True,
        4,
    ),
    "fab-t": (
        lambda m, s: FABAttack_PT(m, n_iter=s.steps, targeted=True, n_target_classes=s.target_classes, **_common(s)),
        True,
        2,
    ),
    "square": (
        lambda m, s: SquareAttack(m, n_queries=s.queries, p_init=0.8, resc_schedule=False, **_common(s)),
        False,
        2,
    ),
}

ATTACKS = tuple(_BUILDERS)


@dataclass(frozen=True, slots=True)
class AttackSettings:
    """What an attacker may do.

    Attributes:
        eps: Radius of the ball, in the units of images in [0, 1].
        norm: ``Linf`` or ``L2``.
        steps: Iterations of a gradient attack.
        queries: Queries of the Square attack.
        target_classes: Classes a targeted attack tries.
        seed: Of the random starts.
    """

    eps: float
    norm: str = "Linf"
    steps: int = 100
    queries: int = 5000
    target_classes: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise EvaluationError(f"eps must be positive, got {self.eps}")
        if self.norm == "Linf" and self.eps > 1:
            raise EvaluationError(f"eps {self.eps:g} is more than all of [0, 1]: did you mean {self.eps:g}/255?")
        if self.norm not in ("Linf", "L2"):
            raise EvaluationError(f"norm must be Linf or L2, got {self.norm!r}")


def _common(settings: AttackSettings) -> dict:
    return {"norm": settings.norm, "eps": settings.eps, "n_restarts": 1, "seed": settings.seed, "verbose": False}


def uses_gradient(name: str) -> bool:
    """Return whether an attack's result depends on the operator's backward mode.

    Raises:
        EvaluationError: There is no attack of that name.
    """
    if name not in _BUILDERS:
        raise EvaluationError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
    return _BUILDERS[name][1]


def attack(name: str, model: nn.Module, images: Tensor, labels: Tensor, settings: AttackSettings) -> Tensor:
    """Return adversarial images ``[N, C, H, W]`` in the ball around ``images`` and in [0, 1].

    An image the attack does not break comes back unchanged or changed in vain. The caller's random state is
    left alone.

    Raises:
        EvaluationError: The attack does not exist, needs more classes, or left the ball.
    """
    uses_gradient(name)
    build, _, fewest = _BUILDERS[name]
    with torch.no_grad():
        classes = logits_of(model, images[:1]).shape[1]
    if classes < fewest:
        raise EvaluationError(f"{name} needs at least {fewest} classes, the model has {classes}")
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        adversarial = build(model, settings).perturb(images.clone(), labels.clone()).detach()
    _check_ball(name, images, adversarial, settings)
    return adversarial


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's logits ``[N, K]``, refusing anything else."""
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"expected logits [N, classes] from the model, got {shape}")
    if not logits.isfinite().all():
        raise EvaluationError("the model's logits hold NaN or inf: accuracy under attack would mean nothing")
    return logits


def _check_ball(name: str, images: Tensor, adversarial: Tensor, settings: AttackSettings) -> None:
    distance = (adversarial - images).flatten(1)
    radius = distance.abs().amax(1) if settings.norm == "Linf" else distance.norm(dim=1)
    slack = 1e-6 if settings.norm == "Linf" else 1e-5  # float32 rounding of x + eps, and of a norm over all pixels
    if radius.max() > settings.eps + slack or adversarial.min() < 0 or adversarial.max() > 1:
        raise EvaluationError(
            f"{name} left its ball: {settings.norm} distance {radius.max():.6f} with eps {settings.eps:.6f}, "
            f"values {adversarial.min():.4f} to {adversarial.max():.4f}"
        )
