"""Floor 5: one attack on one batch, its result checked. Most are from the maintained AutoAttack package.

Knows a model that returns logits; nothing of operators or of reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from ..arguments import items, number, whole
from ..errors import EvaluationError
from ..names import NORMS
from ..outputs import logits_of
from .descent import PGD, Adaptive, Margin, Nearest
from .pixels import LOSSES, PixelPGD
from .surrogates import WithSurrogate, surrogate, switch_backward

_LOGGER = logging.getLogger("meansparse_fx.attacks")


@dataclass(frozen=True, slots=True)
class AttackSettings:
    """What an attacker may do.

    Attributes:
        eps: Radius of the ball, in the units of images in [0, 1].
        norm: ``Linf`` or ``L2``, in any case.
        steps: Iterations of a gradient attack.
        queries: Queries of the Square attack.
        target_classes: Classes a targeted attack tries at most.
        seed: Of the random starts.
    """

    eps: float
    norm: str = "Linf"
    steps: int = 100
    queries: int = 5000
    target_classes: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        norm = {known.lower(): known for known in NORMS}.get(str(self.norm).strip().lower())
        if norm is None:
            raise EvaluationError(f"norm must be Linf or L2, got {self.norm!r}")
        read = {"eps": number(self.eps, "eps"), "norm": norm, "seed": whole(self.seed, "seed")}
        read |= {name: whole(getattr(self, name), name, least=1) for name in ("steps", "queries")}
        for name, value in read.items():
            object.__setattr__(self, name, value)
        if not self.eps > 0:
            raise EvaluationError(f"eps must be positive, got {self.eps}")
        if norm == "Linf" and self.eps > 1:
            raise EvaluationError(f"eps {self.eps:g} is more than all of [0, 1]: did you mean {self.eps:g}/255?")


class Perturber(Protocol):
    """What every attack is, once built."""

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor: ...


Build = Callable[[nn.Module, AttackSettings, int], Perturber]  # model, settings, number of classes


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

    def misfit(self, images: Tensor, logits: Tensor) -> str | None:
        """Return why it cannot attack such a model on such images, in words; None if it can."""
        if self.maps != (logits.dim() == 4):
            return "is for label maps" if self.maps else f"is for one label an image: maps have {', '.join(LOSSES)}"
        if self.squares and images.dim() != 4:
            return f"needs images [N, C, H, W], and these are {['N', *images.shape[1:]]}"
        if logits.shape[1] < self.classes:
            return f"needs at least {self.classes} classes, the model has {logits.shape[1]}"
        return None


def _apgd(loss: str, restarts: int = 1, eot: int = 1) -> Build:
    return lambda model, s, _: APGDAttack(
        model, n_iter=s.steps, loss=loss, eot_iter=eot, **_common(s, restarts), logger=_LOGGER
    )


def _apgd_margin(model: nn.Module, s: AttackSettings, _: int) -> Margin:
    return Margin(model, n_iter=s.steps, loss="dlr", **_common(s), logger=_LOGGER)


def _apgd_targeted(model: nn.Module, s: AttackSettings, classes: int) -> Perturber:
    targets = min(s.target_classes, classes - 1)
    return APGDAttack_targeted(model, n_iter=s.steps, n_target_classes=targets, **_common(s), logger=_LOGGER)


def _fab(targeted: bool, restarts: int = 1) -> Build:
    def build(model: nn.Module, s: AttackSettings, classes: int) -> Perturber:
        targets = min(s.target_classes, classes - 1)
        return FABAttack_PT(model, n_iter=s.steps, targeted=targeted, n_target_classes=targets, **_common(s, restarts))

    return build


def _adaptive(power: int) -> Build:
    return lambda model, s, _: Adaptive(model, s.norm, s.eps, s.steps, s.seed, power)


def _pixel_pgd(loss: str) -> Build:
    return lambda model, s, _: PixelPGD(model, s.norm, s.eps, s.steps, s.seed, loss)


def _common(s: AttackSettings, restarts: int = 1) -> dict:
    return {"norm": s.norm, "eps": s.eps, "n_restarts": restarts, "seed": s.seed, "verbose": False}


_KINDS: dict[str, AttackKind] = {
    "apgd-ce": AttackKind(_apgd("ce"), "gradient ascent on cross-entropy with a step size that adapts (AutoAttack)"),
    "apgd-nearest": AttackKind(
        lambda model, s, _: Nearest(model, n_iter=s.steps, loss="ce", **_common(s), logger=_LOGGER),
        "apgd-ce of five times the steps, then eight more on the eighth of the images that came nearest to being "
        "broken, by turns on margin and cross-entropy",
        longer=5,
    ),
    "apgd-dlr": AttackKind(_apgd("dlr"), "apgd-ce on the difference-of-logits ratio (AutoAttack)", classes=3),
    "apgd-margin": AttackKind(
        _apgd_margin, "the same on the difference between the largest wrong logit and the right one, whatever its scale"
    ),
    "apgd-t": AttackKind(_apgd_targeted, "the same towards each of the nearest wrong classes (AutoAttack)", classes=4),
    "fab": AttackKind(
        _fab(False, 5), "steps to the nearest decision boundary, 5 restarts (AutoAttack plus)", several_gradients=True
    ),
    "fab-t": AttackKind(
        _fab(True), "steps to the boundary of each of the nearest wrong classes (AutoAttack)", several_gradients=True
    ),
    "square": AttackKind(
        lambda model, s, _: SquareAttack(model, n_queries=s.queries, p_init=0.8, resc_schedule=False, **_common(s)),
        "random search by queries; needs no gradient, so none can be masked",
        gradient=False,
        squares=True,
    ),
    "pgd": AttackKind(
        lambda model, s, _: PGD(model, s.norm, s.eps, s.steps, s.seed),
        "gradient ascent on cross-entropy in steps of eps / 8 (the paper's PGD)",
    ),
    "adaptive-1-1": AttackKind(
        _adaptive(1),
        "PGD that also leaves features in the operators' bands where they are (the paper's equation 8)",
        reads_graph=True,
    ),
    "adaptive-2-2": AttackKind(
        _adaptive(2), "the same with squared changes of features (equation 8)", reads_graph=True
    ),
    "apgd-ce-r5": AttackKind(_apgd("ce", restarts=5), "apgd-ce with 5 restarts (AutoAttack plus)"),
    "apgd-dlr-r5": AttackKind(_apgd("dlr", restarts=5), "apgd-dlr with 5 restarts (AutoAttack plus)", classes=3),
    "apgd-ce-eot20": AttackKind(
        _apgd("ce", eot=20), "apgd-ce on the mean of 20 gradients (AutoAttack rand)", repeats=20
    ),
    "apgd-dlr-eot20": AttackKind(
        _apgd("dlr", eot=20), "apgd-dlr on the mean of 20 gradients (AutoAttack rand)", classes=3, repeats=20
    ),
    "apgd-start": AttackKind(
        _apgd_margin, "apgd-margin started at the adversarial images found against the other model", started=True
    ),
    **{name: AttackKind(_pixel_pgd(name), f"pgd on {does}", maps=True) for name, (_, does) in LOSSES.items()},
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
    settings = replace(settings, steps=row.longer * settings.steps)
    with torch.no_grad():
        logits = logits_of(model, images, labels)  # of all: compilers make another program for a batch of one
    if (misfit := row.misfit(images, logits)) is not None:
        raise EvaluationError(f"{name} {misfit}")
    if backward is not None:
        chosen, gradients = surrogate(backward), settings.steps + 1  # APGD looks at its start, too
        if not row.reads_graph:
            model = WithSurrogate(model, chosen, gradients, row.repeats)
        elif len(chosen.modes) == 1:
            switch_backward(model, *chosen.modes[0])
        else:
            raise EvaluationError(f"{name} reads the model's graph and takes one backward mode, not {backward}")
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        built = row.build(model, settings, logits.shape[1])
        if row.started:
            assert isinstance(built, Margin)
            assert starts is not None
            adversarial = built.perturb_from(starts, images, labels)
        else:
            adversarial = built.perturb(images.clone(), labels.clone())
    adversarial = adversarial.detach()
    check_ball(name, images, adversarial, settings)
    return adversarial


def check_ball(name: str, images: Tensor, adversarial: Tensor, settings: AttackSettings) -> None:
    """Raise EvaluationError unless all of ``adversarial`` is in [0, 1] and in the balls around ``images``."""
    distance = (adversarial - images).flatten(1)
    radius = distance.abs().amax(1) if settings.norm == "Linf" else distance.norm(dim=1)
    slack = 1e-6 if settings.norm == "Linf" else 1e-5  # float32 rounding of x + eps, and of a norm over all pixels
    # Written so that NaN fails, too.
    if not (radius.max() <= settings.eps + slack and adversarial.min() >= 0 and adversarial.max() <= 1):
        raise EvaluationError(
            f"{name} left its ball: {settings.norm} distance {radius.max():.6f} with eps {settings.eps:.6f}, "
            f"values {adversarial.min():.4f} to {adversarial.max():.4f}"
        )
