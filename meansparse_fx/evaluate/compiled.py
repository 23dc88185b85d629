"""Floor 5: a model as attacks may run it faster: compiled, or in lower precision. What counts is checked without it."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EvaluationError
from .attacks import attack_kind
from .plan import Run


def compile_mode(compile: bool | str | None) -> str | None:
    """Return the mode of torch.compile that is asked for: True is ``default``; None for False and None.

    Raises:
        EvaluationError: torch has no such mode.
    """
    modes = torch._inductor.list_mode_options()
    if isinstance(compile, str) and compile not in modes:
        raise EvaluationError(f"torch.compile has no mode {compile!r}: one of {', '.join(modes)}, or True or False")
    return ("default" if compile is True else compile) or None


def padded(count: int) -> int:
    """Return how many images a batch of ``count`` is filled up to: four sizes between a power of two and the next.

    Example:
        >>> [padded(count) for count in (1, 2, 5, 17, 100, 113, 128)]
        [2, 2, 6, 20, 112, 128, 128]
    """
    unit = 2 ** max(1, (count - 1).bit_length() - 3)
    return -(-count // unit) * unit


class FastModel(nn.Module):
    """A model that returns the same logits sooner, to rounding.

    A program serves every number of images from two on, and one kind of backward; another alpha or steepness compiles
    nothing. Where the mode records CUDA graphs, one a number of images, batches are padded: images that are left out
    once they are broken then soon record nothing anew.

    Args:
        model: Any; its operators stay its own, so that its switches work.
        mode: Of torch.compile; None does not compile.
        amp: Autocast to this dtype; logits come back in float32.
    """

    def __init__(self, model: nn.Module, mode: str | None, amp: torch.dtype | None) -> None:
        super().__init__()
        self.run = model if mode is None else torch.compile(model, dynamic=True, mode=mode)
        self._amp = amp
        self._graphs = mode is not None and bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[N, K]`` of images ``[N, C, H, W]``."""
        count = len(images)
        rows = (padded(count) if self._graphs else max(2, count)) - count
        if rows or self._graphs:  # a recorded graph overwrites what it returned; the padding's gradient is a copy
            images = F.pad(images, (0,) * (2 * images.dim() - 1) + (rows,))
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        gradient = torch.is_grad_enabled() and images.requires_grad  # otherwise one program, whoever asks
        low = torch.autocast(images.device.type, self._amp, enabled=self._amp is not None)
        with warnings.catch_warnings(), low, torch.set_grad_enabled(gradient):
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks
            logits = self.run(images)[:count].float()
        return logits.clone() if self._graphs else logits


class Attacked:
    """A model as attacks meet it.

    Args:
        model: What counts: an attack has found only what this is wrong on.
        compile: False, True or a mode, see `compile_mode`.
        amp: See `FastModel`; without either attacks meet the model itself.
    """

    def __init__(self, model: nn.Module, compile: bool | str | None = False, amp: torch.dtype | None = None) -> None:
        mode = compile_mode(compile)
        self.model, self._compiled = model, mode is not None
        self._fast = model if mode is None and amp is None else FastModel(model, mode, amp)

    def by(self, run: Run) -> nn.Module:
        """Return what ``run`` attacks: the model itself where the attack needs it."""
        row = attack_kind(run.attack)
        itself = row.reads_graph or (self._compiled and row.several_gradients)
        return self.model if itself else self._fast
