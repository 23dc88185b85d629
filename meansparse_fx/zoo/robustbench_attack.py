"""Floor 1: AutoAttack as RobustBench calls it.

RobustBench is written for the package ``autoattack``, which is on no registry; ``pyautoattack``, which is, holds the
same attacks under another signature. Imported by `robustbench_mend` alone, where ``autoattack`` is not installed.
"""

from __future__ import annotations

from typing import Any

import pyautoattack
from torch import Tensor

__all__ = ["AutoAttack"]


class AutoAttack(pyautoattack.AutoAttack):
    """AutoAttack with the arguments and the result that RobustBench's ``benchmark()`` expects; it writes no log."""

    def __init__(self, *args: Any, log_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def run_standard_evaluation(self, x_orig: Tensor, y_orig: Tensor, *, bs: int, **kwargs: Any) -> Tensor:
        """Return the adversarial images."""
        return super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, **kwargs)[0]
