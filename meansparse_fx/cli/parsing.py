"""Floor 6: what a user types, turned into values; a typing error is a usage error with an example."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from ..arguments import number
from ..names import ATTACK_NAMES, IMAGENET, SOURCES, SPECS, SURROGATES


def fraction(text: str) -> float:
    """Return a number written as ``0.1`` or as ``8/255``."""
    try:
        value = number(text, "it")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{text!r} is not a number from 0, such as 0.1 or 8/255")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Return comma-separated numbers."""
    return tuple(map(fraction, text.split(",")))


def name_or_position(text: str) -> str | int:
    """Return a whole number as one, other text as it is."""
    return int(text) if text.lstrip("-").isdecimal() else text


def shape(text: str) -> tuple[int, ...]:
    """Return the shape written as ``3,224,224``."""
    found = text.replace("x", ",").split(",")
    if not all(n.isdecimal() and int(n) for n in found):
        raise typer.BadParameter(f"{text!r} is not a shape such as 3,224,224")
    return tuple(map(int, found))


def normalisation(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations: ``imagenet``, or written as ``0.5,0.5,0.5/0.25,0.25,0.25``."""
    if text == "imagenet":
        return IMAGENET
    try:
        mean, std = (tuple(float(n) for n in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean = std = ()
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise typer.BadParameter(f"{text!r} is neither 'imagenet' nor MEAN/STD such as 0.5,0.5,0.5/0.2,0.2,0.2")
    return mean, std


def name(known: Iterable[str]) -> Callable[[str], str]:
    """Return a parser of one name out of ``known``, in any case."""

    def parse(text: str) -> str:
        if (found := {one.lower(): one for one in known}.get(text.lower())) is None:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(known)}")
        return found

    return parse


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names out of ``known``."""
    return lambda text: _names(text, known)


def _names(text: str, known: Iterable[str], others: str = "(?!)", hint: str = "") -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    for part in found:
        if part not in known and not re.fullmatch(others, part):
            raise typer.BadParameter(f"{part!r} is none of {', '.join(known)}{hint}")
    return found


def backwards(text: str) -> tuple[str, ...]:
    """Return comma-separated names of surrogates: ``exact,smooth-3``."""
    return _names(text, SURROGATES, r"smooth-[0-9]*\.?[0-9]+", ", or smooth-STEEPNESS")


def attacks(text: str) -> tuple[str, ...]:
    """Return comma-separated names of attacks, some with their backward: ``apgd-ce/annealed,square``."""
    found = tuple(part.strip() for part in text.split(","))
    for attack, slash, backward in (part.partition("/") for part in found):
        _names(attack, ATTACK_NAMES)
        if slash:
            backwards(backward)
    return found


def model(text: str) -> str:
    """Return what names a model, if it can name one."""
    source, _, rest = text.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise typer.BadParameter(f"{source}: no such file")
    if not (text == "bundled" or (rest and (source in SOURCES or source.endswith(".py")))):
        raise typer.BadParameter(f"{text!r} names no model; expected {SPECS}")
    return text
