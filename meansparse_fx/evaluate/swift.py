"""Floor 5: a model as attacks may run it faster: compiled, or in lower precision. What counts is checked without it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .attacks import kind
from .plan import Run


class Swift(nn.Module):
    """A model that returns the same logits sooner, to rounding.

    Args:
        model: Any; its operators stay its own, so that its switches work.
        compile: Run it through torch.compile, for any number of images; each backward mode is one program.
        amp: Autocast to this dtype; logits come back in float32.
    """

    def __init__(self, model: nn.Module, compile: bool, amp: torch.dtype | None) -> None:
        super().__init__()
        self.run = torch.compile(model, dynamic=True) if compile else model
        self._amp = amp

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[N, K]`` of images ``[N, C, H, W]``."""
        with torch.autocast(images.device.type, self._amp, enabled=self._amp is not None):
            return self.run(images).float()


class Attacked:
    """The models of one evaluation as attacks meet them.

    Args:
        models: By name.
        compile, amp: See `Swift`; without either attacks meet the models themselves.
    """

    def __init__(self, models: Mapping[str, nn.Module], compile: bool, amp: torch.dtype | None) -> None:
        self._models = models
        fast = compile or amp is not None
        self._swift = {name: Swift(model, compile, amp) if fast else model for name, model in models.items()}

    def by(self, run: Run, which: str) -> nn.Module:
        """Return what ``run`` attacks: the model itself where the attack reads its graph."""
        return (self._models if kind(run.attack).reads_graph else self._swift)[which]
