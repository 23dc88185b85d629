"""Floor 1: AutoAttack as RobustBench calls it.

RobustBench is written for the package ``autoattack``, which is on no registry; ``pyautoattack``, which is, holds the
same attacks under another signature. Imported by `robustbench_mend` alone, where ``autoattack`` is not installed.
"""

from __future__ import annotations

from pathlib import Path

import pyautoattack
import torch
from torch import Tensor, nn

__all__ = ["AutoAttack"]


class AutoAttack(pyautoattack.AutoAttack):
    """AutoAttack with the arguments and the result that RobustBench's ``benchmark()`` expects.

    Args:
        log_path: Where ``autoattack`` would write its log; taken, and nothing is written.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str,
        eps: float,
        version: str,
        device: torch.device | str,
        log_path: str | None = None,
    ) -> None:
        super().__init__(model, norm=norm, eps=eps, version=version, device=device)

    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, *, bs: int, state_path: Path | None = None
    ) -> Tensor:
        """Return the adversarial images."""
        adversarial, _ = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
        return adversarial
