"""Floor 1: arguments that may be given in more than one form, and names in messages. Imports errors only."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    import torch

_LARGEST = (2 - 2**-23) * 2.0**127  # float32
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def items(given: Any) -> tuple[Any, ...]:
    """Return what was given where several are meant: a string or a number is one item, never its letters."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    several = several and getattr(given, "ndim", None) != 0  # an array of no dimension is a number
    return tuple(given) if several else (given,)


def number(given: Any, what: str) -> float:
    """Return a number as Python, NumPy or torch have it, or as ``0.1`` or ``8/255``; else ArgumentError of ``what``."""
    if getattr(given, "requires_grad", False):
        raise ArgumentError(f"{what} must be a number, and no gradient would reach this tensor: give its .item()")
    try:
        if isinstance(given, bool):
            raise TypeError
        numerator, _, denominator = given.partition("/") if isinstance(given, str) else (given, "", "")
        found = float(numerator) / float(denominator or 1)
        if str(getattr(given, "dtype", "")).endswith("float32"):  # six digits are what float32 keeps of any decimal
            short = float(f"{found:.6g}")
            return short if struct.pack("f", short) == struct.pack("f", found) else found
        return found
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{what} must be a number, got {given!r}") from error


def half_width(given: Any, what: str) -> float:
    """Return a band's half width, in any form that `number` takes; ArgumentError if ``what`` is none."""
    found = number(given, what)
    if not 0 <= found <= _LARGEST:
        raise ArgumentError(f"{what} must be finite and not negative, in float32, got {found}")
    return found


def half_widths(given: Any) -> float | dict[str, float]:
    """Return what `half_width` makes of the one alpha of all sites, or of each value of a mapping."""
    if isinstance(given, Mapping):
        return {str(key): half_width(value, f"{key}: alpha") for key, value in given.items()}
    return half_width(number(given, "alpha for all sites (for each its own: a mapping from site name)"), "alpha")


def whole(given: Any, what: str, least: int | None = None) -> int:
    """Return a whole number, ``least`` or more, in any form that `number` takes; ArgumentError if ``what`` is none."""
    found = number(given, what)
    if not found.is_integer() or (least is not None and found < least):
        from_ = "" if least is None else f" from {least}"
        raise ArgumentError(f"{what} must be a whole number{from_}, got {given!r}")
    digits = isinstance(given, str) and given.lstrip("+-").isdecimal()
    return int(given) if digits or isinstance(given, int) else int(found)  # all of them: a float holds 15


def autocast_dtype(given: Any) -> torch.dtype | None:
    """Return the dtype to autocast to, float16 or bfloat16: torch's own, or its name."""
    import torch  # the command line reads the other arguments without it

    name = str(given).removeprefix("torch.")
    found = None if given is None else getattr(torch, _SHORT_DTYPES.get(name, name), None)
    if given is not None and found not in (torch.float16, torch.bfloat16):
        raise ArgumentError(f"amp must be torch.bfloat16 or torch.float16, or None, got {given!r}")
    return found


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of the names, sorted, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
