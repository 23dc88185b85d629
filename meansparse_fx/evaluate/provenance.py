"""Floor 5: were the statistics measured on images such as these, and not on these themselves? Runs no model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ..data import part_of
from ..errors import EvaluationError
from ..operators import added
from ..statistics import overlap
from .sanity import Check

_SLACK = 1e-3  # beyond [0, 1], of resizing and rounding
_NARROWER = 4  # times, a range that no other sample of the same images has


def check_calibration(sparse: fx.GraphModule, data: Any, images: Tensor) -> Check | None:
    """Return how the images that calibration saw differ from these; None where nothing is known of them.

    Args:
        images: Its first batch, in [0, 1].

    Raises:
        EvaluationError: They were in other units, so that the statistics fit no image here.
    """
    calibrated = added(sparse).statistics
    if calibrated is None:
        return None
    differences = []
    for shape in calibrated.metadata.get("image_shape", "").split(" + "):
        if shape and shape != (own := "x".join(map(str, images.shape[1:]))):
            differences.append(f"calibrated on images {shape}, and these are {own}")
    for written in calibrated.metadata.get("input_range", "").split(" + "):
        low, _, high = written.partition(" to ")
        if not high:
            continue
        if float(low) < -_SLACK or float(high) > 1 + _SLACK:
            raise EvaluationError(
                f"the statistics were measured on images from {low} to {high}, and attacks need [0, 1]: calibrate on "
                "images in [0, 1], with the normalisation in the model"
            )
        if float(high) * _NARROWER < (greatest := float(images.max())):
            differences.append(f"calibrated on images up to {high}, and these go up to {greatest:g}: divided twice?")
    part = part_of(data)
    if part is not None and (shared := overlap(calibrated.seen, [part])) is not None:
        differences.append(f"{len(shared)} of these images were calibrated on: use others (--skip)")
    finding = "; ".join(differences) or "calibrated on images of the same size and range"
    return Check("calibration data", not differences, finding)
