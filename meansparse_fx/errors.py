"""Floor 1: the error types, and what raises them at a site. Every message says what, where (the site) and what to do.

Imports nothing of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MeanSparseError(Exception):
    """Base of every error this package raises about a model, a file or an argument."""


class CaptureError(MeanSparseError):
    """The model could not be turned into a graph that computes the same thing."""


class SiteError(MeanSparseError):
    """A site is missing, ambiguous or unsafe to rewrite: none found, unknown channel axis, live view."""


class StateError(MeanSparseError):
    """The model is in the wrong state: train mode, already transformed, not transformed, not calibrated."""


class StatisticsError(MeanSparseError):
    """Statistics do not fit: another model's, missing or extra sites, wrong channel counts, non-finite values."""


class CalibrationError(MeanSparseError):
    """Calibration cannot go on: empty loader, NaN or inf in a site's input."""


class ArtifactError(MeanSparseError):
    """A file is truncated, foreign, or of a format version this release does not read."""


class WriteError(ArtifactError, OSError):
    """A file cannot be written: no space, no permission, a directory in its place. Says where a result is kept."""


class EvaluationError(MeanSparseError):
    """An attack or an evaluation cannot be run as asked, or its result failed a sanity check."""


class DataError(CalibrationError, EvaluationError):
    """Images or labels cannot be used as they are: names the first that cannot, and what to do.

    The verbs share the intake of data, so this is an error of whichever was called.
    """


class ArgumentError(MeanSparseError, ValueError):
    """An argument has a value, or a form, that is not taken."""


class ModelError(MeanSparseError):
    """A model cannot be built as asked: unknown name, file without the function, weights that do not fit."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its type if it says nothing.

    Example:
        >>> first_line(RuntimeError("no such device\\nCompile with ...")), first_line(AssertionError())
        ('no such device', 'AssertionError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_dims(site: str, x: Tensor, dims: int | None) -> None:
    """Raise SiteError unless a site's input has as many dimensions as it was found with: channels are counted there.

    Args:
        dims: None takes any number.
    """
    if dims not in (None, x.dim()):
        raise SiteError(
            f"{site}: an input of {x.dim()} dimensions, {list(x.shape)}, where the example images gave {dims}: "
            "give batches [N, ...], one image as image.unsqueeze(0)"
        )
