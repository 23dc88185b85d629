"""Floor 3: some of what a base model computes, kept to tell it from others: equal weights may serve another function.

Numbers alone; `operators.answers` asks the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answers:
    """Some elements of a base model's outputs for two images of a fixed pattern.

    Attributes:
        shape: Of one of the images.
        values: The elements.
        exact: Computed on a CPU, in float32 or wider.
    """

    shape: tuple[int, ...]
    values: tuple[float, ...]
    exact: bool

    @classmethod
    def read(cls, held: Mapping[str, Any] | None) -> Answers | None:
        """Return what a file keeps of them; None if it keeps none."""
        if held is None:
            return None
        return cls(tuple(map(int, held["shape"])), tuple(map(float, held["values"])), bool(held["exact"]))

    @classmethod
    def same(cls, held: Mapping[str, Any] | None, answers: Answers | None) -> bool:
        """Return whether what a file keeps are these answers, to rounding; or both are none."""
        known = cls.read(held)
        return known is answers or (known is not None and answers is not None and known.agree(answers))

    def agree(self, other: Answers) -> bool:
        """Return whether both are one function's: to rounding, which TF32 and half precision make large."""
        rounding = 1e-3 if self.exact and other.exact else 3e-2
        most = rounding * max(map(abs, self.values))
        return len(self.values) == len(other.values) and all(
            abs(a - b) <= most for a, b in zip(self.values, other.values, strict=True)
        )
