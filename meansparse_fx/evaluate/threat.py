"""Floor 5: what an attacker may do: the ball around each image, by its norm, and for how long. Runs no model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

from torch import Tensor

from ..arguments import number, whole
from ..errors import EvaluationError
from ..names import NORMS

# Change of all values at once, of [0, 1], that turns any image into plain gray (Linf), or most of them (L2, where the
# usual eps of 2 on MNIST allows 0.07).
WIDE = {"Linf": 0.5, "L2": 0.25}


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

    def in_words(self) -> str:
        """Return what a table's title says: norm, eps and steps."""
        return f"{self.norm} eps {self.eps:.4g}, {self.steps} steps"

    def unbounded(self, image: Tensor) -> AttackSettings:
        """Return the same for a ball that holds every image of the form of ``image``, whichever is its centre."""
        return replace(self, eps=1.0 if self.norm == "Linf" else math.sqrt(image.numel()))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of length 1 in which a function of this gradient ``[N, ...]`` rises most."""
        return gradient.sign() if self.norm == "Linf" else gradient / norm_per_image(gradient)

    def project(self, images: Tensor, x: Tensor) -> Tensor:
        """Return ``x`` moved into the balls around ``images``, and into [0, 1]."""
        delta = x - images
        if self.norm == "Linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / norm_per_image(delta)).clamp_max(1)
        return (images + delta).clamp(0, 1)

    def require_in_ball(self, name: str, images: Tensor, adversarial: Tensor) -> None:
        """Raise EvaluationError unless all of ``adversarial`` is in [0, 1] and in the balls around ``images``."""
        distance = (adversarial - images).flatten(1)
        radius = distance.abs().amax(1) if self.norm == "Linf" else distance.norm(dim=1)
        slack = 1e-6 if self.norm == "Linf" else 1e-5  # float32 rounding of x + eps, and of a norm over all pixels
        # Written so that NaN fails, too.
        if not (radius.max() <= self.eps + slack and adversarial.min() >= 0 and adversarial.max() <= 1):
            raise EvaluationError(
                f"{name} left its ball: {self.norm} distance {radius.max():.6f} with eps {self.eps:.6f}, "
                f"values {adversarial.min():.4f} to {adversarial.max():.4f}"
            )

    def warn_if_wide(self, images: Tensor) -> None:
        """Warn, before attacks cost anything, where each value of ``images`` may change by more than `WIDE`."""
        each = self.eps if self.norm == "Linf" else self.eps / math.sqrt(images[0].numel())
        if images.dim() == 4 and each > WIDE[self.norm]:
            warnings.warn(
                f"{self.norm} eps {self.eps:g} lets every value of an image change by {each:.2g} of [0, 1]: did you "
                f"mean {self.eps:g}/255?",
                stacklevel=3,
            )


def norm_per_image(x: Tensor) -> Tensor:
    """Return each image's L2 norm, shaped to broadcast, never zero."""
    return per_image(x.flatten(1).norm(dim=1).clamp_min(1e-12), x)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Return values ``[N]``, shaped to broadcast over images ``[N, ...]``."""
    return values.view(-1, *[1] * (images.dim() - 1))
