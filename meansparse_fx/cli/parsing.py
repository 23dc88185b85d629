"""Floor 6: what a user types, turned into values; a typing error is a usage error with an example."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import typer

from ..errors import EvaluationError
from ..evaluate.plan import plan_runs
from ..evaluate.surrogates import surrogate
from ..zoo import IMAGENET


def fraction(text: str) -> float:
    """Return a number written as ``0.1`` or as ``8/255``."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{text!r} is not a number from 0, such as 0.1 or 8/255")
    return value


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # that autocast knows


def dtype(text: str) -> torch.dtype:
    """Return the dtype of a name in `DTYPES`."""
    if text not in DTYPES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(DTYPES)}")
    return DTYPES[text]


def numbers(text: str) -> tuple[float, ...]:
    """Return comma-separated numbers."""
    return tuple(fraction(part) for part in text.split(","))


def shape(text: str) -> tuple[int, ...]:
    """Return the shape written as ``3,224,224``."""
    try:
        found = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is not a shape such as 3,224,224")
    return found


def normalisation(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations: ``imagenet``, or written as ``0.5,0.5,0.5/0.25,0.25,0.25``."""
    if text == "imagenet":
        return IMAGENET
    try:
        mean, std = (tuple(float(n) for n in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean = std = ()
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise typer.BadParameter(f"{text!r} is neither 'imagenet' nor MEANS/DEVIATIONS such as 0.5,0.5,0.5/0.2,0.2,0.2")
    return mean, std


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names out of ``known``."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return parse


def attacks(text: str) -> tuple[str, ...]:
    """Return comma-separated names of attacks, some with their backward: ``apgd-ce/annealed,square``."""
    found = tuple(name.strip() for name in text.split(","))
    try:
        plan_runs(found, ("exact",), 0)
    except EvaluationError as error:
        raise typer.BadParameter(str(error)) from error
    return found


def backwards(text: str) -> tuple[str, ...]:
    """Return comma-separated names of surrogates: ``exact,smooth-3``."""
    found = tuple(name.strip() for name in text.split(","))
    try:
        for name in found:
            surrogate(name)
    except EvaluationError as error:
        raise typer.BadParameter(str(error)) from error
    return found
