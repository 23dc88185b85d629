"""Floor 1: arguments that may be given in more than one form, and names in messages. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def items(given: Any) -> tuple[Any, ...]:
    """Return what was given where several are meant: a string or a number is one item, never its letters.

    Example:
        >>> items("layer1"), items(["layer1", "layer2"]), items(0.2)
        (('layer1',), ('layer1', 'layer2'), (0.2,))
    """
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)


def number(given: Any, what: str) -> float:
    """Return a number, as Python, NumPy or torch have it, or written as ``0.1`` or ``8/255``.

    Raises:
        ValueError: It is none; ``what`` it should be is said.

    Example:
        >>> number("8/255", "eps") == 8 / 255
        True
    """
    try:
        numerator, _, denominator = given.partition("/") if isinstance(given, str) else (given, "", "")
        return float(numerator) / float(denominator or 1)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{what} must be a number, got {given!r}") from error


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of the names, sorted, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
