"""Floor 5: were the statistics measured on this model, on images such as these, and on none of these?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from ..errors import EvaluationError
from ..operators import TRAINED, added, was_trained
from ..seen import SHARED, known_share
from .sanity import Check
from .threat import AttackSettings

_SLACK = 1e-3  # beyond [0, 1], of resizing and rounding
_NARROWER = 4  # times, a range that no other sample of the same images has


def require_units(sparse: fx.GraphModule) -> None:
    """Raise EvaluationError if calibration saw images in other units than [0, 1]: the statistics fit no others."""
    for low, high in _ranges(sparse):
        if float(low) < -_SLACK or float(high) > 1 + _SLACK:
            raise EvaluationError(
                f"the statistics were measured on images from {low} to {high}, and attacks need [0, 1]: calibrate on "
                "images in [0, 1], with the normalisation in the model"
            )


def check_calibration(sparse: fx.GraphModule, images: Tensor, marks: Tensor) -> Iterator[Check]:
    """Yield whether calibration saw these weights, images like these and none of these; nothing if it is unknown.

    Args:
        sparse: The model, with its statistics.
        images: The first batch, in [0, 1].
        marks: ``[N]``, of all images: see `seen.image_marks`.
    """
    calibrated = added(sparse).statistics
    if calibrated is None:
        return
    differences = [f"{TRAINED}: calibrate again"] if was_trained(sparse) else []
    for shape in calibrated.metadata.get("image_shape", "").split(" + "):
        if shape and shape != (own := "x".join(map(str, images.shape[1:]))):
            differences.append(f"calibrated on images {shape}, and these are {own}")
    for _, high in _ranges(sparse):
        if float(high) * _NARROWER < (greatest := float(images.max())):
            differences.append(f"calibrated on images up to {high}, and these go up to {greatest:g}: divided twice?")
    finding, share = "calibrated on images of the same size and range", known_share(calibrated.marks, marks)
    if count := round(len(marks) * share):
        words = f"{count} of these images were calibrated on"
        if share > SHARED:
            differences.append(f"{words}: use others (--skip)")
        finding += f"; {words}"
    yield Check("calibration data", not differences, "; ".join(differences) or finding)


def check_distinct(marks: Tensor) -> Check:
    """Return whether each image is there once, by their marks ``[N]``; a share of `SHARED` may be repeated."""
    repeated = len(marks) - len(marks.unique())
    finding = f"{repeated} of {len(marks)} images equal another of them"
    cure = "what counts twice makes intervals too narrow; leave repetitions out"
    return Check.of("distinct images", repeated <= SHARED * len(marks), finding, cure)


def checks_of_choice(choice: Mapping[str, Any] | None, settings: AttackSettings, marks: Tensor) -> Iterator[Check]:
    """Yield whether the search that looked for alpha, if it is known, faced the same threat, on other images.

    Args:
        choice: As `select_alpha` leaves it in the model, whichever alpha is set.
        settings: Of this evaluation.
        marks: ``[N]``, of its images; a share of `SHARED` may be the same.
    """
    if choice is None or not choice["threat"]:
        return
    threat = choice["threat"]
    same = threat["norm"] == settings.norm and math.isclose(threat["eps"], settings.eps)
    finding = f"alpha was looked for under {threat['norm']} eps {threat['eps']:.4g}"
    if not same:
        finding += (
            f", and this is {settings.norm} eps {settings.eps:.4g}: what is best under one need not be under the other"
        )
    yield Check("threat of the choice", same, finding)
    known = {*choice.get("marks", ())}
    if not known:  # of a search that kept none
        return
    count = sum(mark in known for mark in hexadecimal(marks))
    finding = f"{count} of {len(marks)} images were used to choose alpha"
    cure = "too good a gain on them; evaluate on others"
    yield Check.of("unseen images", count <= SHARED * len(marks), finding, cure)


def hexadecimal(marks: Tensor) -> list[str]:
    """Return marks of images as JSON keeps them, without loss."""
    return [f"{mark % 2**64:016x}" for mark in marks.tolist()]


def _ranges(sparse: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """Yield least and greatest value of the images that were calibrated on, as written, for each part of them."""
    calibrated = added(sparse).statistics
    for written in [] if calibrated is None else calibrated.metadata.get("input_range", "").split(" + "):
        low, between, high = written.partition(" to ")
        if between:
            yield low, high
