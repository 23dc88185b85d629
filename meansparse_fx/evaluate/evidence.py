"""Floor 5: adversarial images on disk, and the check by whoever doubts them: no attack is run, the models are asked.

A file holds the images as they were, their labels, and for each model the adversarial image of each (the image itself
where nothing broke it) and what broke it. It says what was attacked, so that another model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .. import artifacts
from ..artifacts import typed_tensor
from ..errors import EvaluationError
from ..operators import operators, require_transformed, set_alpha
from ..outputs import Logits
from ..passes import restore, returning_logits
from ..statistics import fingerprint
from .outcome import IN_WORDS
from .plan import correct, device_of
from .threat import AttackSettings

FORMAT, VERSION = "meansparse_fx.adversarial", "2"
BATCH = 256
_HEADER = ("rows", "eps", "norm", "weights", "alpha", "switches")


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Adversarial images of a base and of the transformed model.

    Attributes:
        images, labels: ``[N, C, H, W]`` in [0, 1] and ``[N]``.
        adversarial: By model, ``base`` and ``sparse``: ``[N, C, H, W]``.
        broken_by: By model: ``[N]``, an index into ``rows``, or -1 where nothing broke the image.
        rows: ``clean``, and the attacks in their order.
        eps, norm: The ball.
        weights: Fingerprint of each model.
        alpha: Of the transformed model.
        switches: Of its operators, by site: see `MeanSparse.switches`.
    """

    images: Tensor
    labels: Tensor
    adversarial: Mapping[str, Tensor]
    broken_by: Mapping[str, Tensor]
    rows: tuple[str, ...]
    eps: float
    norm: str
    weights: Mapping[str, str]
    alpha: float | Mapping[str, float]
    switches: Mapping[str, Mapping[str, Any]]

    def save(self, path: str | Path) -> None:
        """Write the file."""
        tensors = {"images": self.images, "labels": self.labels}
        for which in IN_WORDS:
            tensors |= {f"{which}.images": self.adversarial[which], f"{which}.broken_by": self.broken_by[which]}
        header = {name: getattr(self, name) for name in _HEADER}
        artifacts.write(path, FORMAT, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read a file.

        Raises:
            ArtifactError: It is truncated or of another kind.
        """
        header, tensors = artifacts.read(path, FORMAT, VERSION, "a file of adversarial images")
        with artifacts.parsing(path):
            get, shape = partial(typed_tensor, tensors), tensors["images"].shape
            pixels, numbers = (torch.float32, shape), (torch.int64, shape[:1])
            names = (*header["rows"], *(header["weights"][which] for which in IN_WORDS))
            if len(shape) < 2 or not all(isinstance(name, str) for name in names):
                raise ValueError("images without pixels, or rows and weights without names")
            return cls(
                get("images", *pixels),
                get("labels", *numbers),
                {which: get(f"{which}.images", *pixels) for which in IN_WORDS},
                {which: get(f"{which}.broken_by", *numbers) for which in IN_WORDS},
                tuple(header["rows"]),
                *(header[name] for name in _HEADER[1:]),
            )


@dataclass(frozen=True, slots=True)
class Verification:
    """What the models say of a file's images.

    Attributes:
        images: How many.
        broken: By model, on how many of its adversarial images it is wrong.
        claimed: By model, on how many the file says it is.
        by: By model, how many images each row broke.
    """

    images: int
    broken: dict[str, int]
    claimed: dict[str, int]
    by: dict[str, dict[str, int]]

    @property
    def holds(self) -> bool:
        """Whether each model is wrong on as many images as the file says."""
        return self.broken == self.claimed

    def __str__(self) -> str:
        lines = []
        for which, words in IN_WORDS.items():
            left = 100 * (1 - self.broken[which] / self.images)
            by = ", ".join(f"{row} {count}" for row, count in self.by[which].items() if count)
            lines.append(
                f"{words}: wrong on {self.broken[which]} of {self.images} images, {self.claimed[which]} claimed; "
                f"accuracy at most {left:.1f} % (broken by: {by})"
            )
        return "\n".join([*lines, "The file holds." if self.holds else "The file does not hold for this model."])


def verify(
    path: str | Path, sparse: fx.GraphModule, base: fx.GraphModule | None = None, logits: Logits = None
) -> Verification:
    """Return what a transformed model and its base say of the images that `evaluate` kept: nothing is attacked.

    Args:
        path: Of the file that ``evaluate(..., save_adversarial=path)`` wrote.
        sparse: The transformed model with its statistics; alpha and switches are those of the file, and put into it.
        base, logits: As `evaluate` was given them.

    Raises:
        StateError: The model is not transformed.
        EvaluationError: It has other weights or operators at other sites, or an image is not in its ball.
        ArtifactError: The file is truncated or of another kind.
    """
    require_transformed(sparse, "verify")
    found, device = Evidence.load(path), device_of(sparse)
    models = {"base": restore(sparse) if base is None else base, "sparse": sparse}
    for which, model in models.items():
        if fingerprint(model) != found.weights[which]:
            raise EvaluationError(f"{path}: adversarial images of another model, the weights of the {which} differ")
    models = {which: returning_logits(model, logits) for which, model in models.items()}
    with artifacts.parsing(path):
        own = operators(sparse)
        if differing := sorted(own.keys() ^ found.switches.keys()):
            where = "here" if differing[0] in own else "there"
            raise EvaluationError(
                f"{path}: adversarial images of a model with operators at other sites, {differing[0]} has one {where} "
                "only: take the same placement, or the settings that were evaluated"
            )
        for name, operator in own.items():
            operator.set_switches(found.switches[name])
        set_alpha(sparse, found.alpha)
        settings = AttackSettings(found.eps, found.norm)
    broken, by = {}, {}
    for which, model in models.items():
        settings.require_in_ball(f"{path}, {which}", found.images, found.adversarial[which])
        parts = zip(found.adversarial[which].split(BATCH), found.labels.split(BATCH), strict=True)
        broken[which] = sum(int((~correct(model, x.to(device), y.to(device))).sum()) for x, y in parts)
        by[which] = {row: int((found.broken_by[which] == i).sum()) for i, row in enumerate(found.rows)}
    claimed = {which: int((row >= 0).sum()) for which, row in found.broken_by.items()}
    return Verification(len(found.labels), broken, claimed, by)


def external_evaluation(path: str | Path, which: str = "sparse") -> dict[str, Any]:
    """Return what RobustBench's external evaluations ask for: all images, adversarial where one was found.

    Args:
        path: Of the file that `evaluate` wrote.
        which: ``base`` or ``sparse``.

    Returns:
        ``x_adv`` ``[N, C, H, W]``, ``y`` ``[N]``, ``eps``, ``norm``: for ``torch.save``.
    """
    found = Evidence.load(path)
    return {"x_adv": found.adversarial[which], "y": found.labels, "eps": found.eps, "norm": found.norm}
