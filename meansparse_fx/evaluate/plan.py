"""Floor 5: which attacks are run, in which order, and on what: the model as it is, compiled, or in lower precision.

What counts is what the model itself is wrong on. Knows attacks and the switches on operators; keeps no results.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import items
from ..errors import EvaluationError
from ..operators import operators, switched
from ..outputs import logits_of
from .attacks import AttackKind, attack, attack_kind, expand
from .surrogates import surrogate
from .threat import AttackSettings


@dataclass(frozen=True, slots=True)
class Run:
    """One attack under one surrogate of the operator's gradient.

    Attributes:
        attack: Name of the attack.
        backward: Name of the surrogate, see `surrogates`; None for an attack without gradients.
        seed: Of its random start; every run has its own, so that two runs are two tries on the base as well.
    """

    attack: str
    backward: str | None
    seed: int

    @property
    def name(self) -> str:
        return self.attack if self.backward is None else f"{self.attack}/{self.backward}"

    @property
    def kind(self) -> AttackKind:
        """What the table says of the attack."""
        return attack_kind(self.attack)


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """Which attacks are run, in their order, and how.

    Attributes:
        full_rows: Every run attacks all images, also those broken before it.
        compile, amp: What of the model is attacked; see `compile_mode` and `FastModel`.
    """

    runs: Sequence[Run]
    settings: AttackSettings
    full_rows: bool = False
    compile: bool | str | None = False
    amp: torch.dtype | None = None

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for results to be of this plan, by what it is in words."""
        how = {"full_rows": self.full_rows, "compile": self.compile, "amp": str(self.amp)}
        runs = [run.name for run in self.runs]
        return {"attack settings": asdict(self.settings) | how, "attacks or backwards": runs}


def plan_runs(attacks: Sequence[str], backwards: Sequence[str], seed: int) -> list[Run]:
    """Return the runs in their order.

    The operator's own gradient comes first: what survives it is known, whatever those who know leave of it. Attacks
    without gradients come after those with, and those that start at the other model's adversarial images last.

    Args:
        attacks: Names of attacks, each with its backward (``apgd-ce/annealed``) or, without one, to be run under each
            of ``backwards``; or of lists of such names.
        backwards: Of attacks that have none of their own.
        seed: Of the first; the others count on.
    """
    modes, named = [*map(str, items(backwards))], [name.partition("/") for name in expand(attacks)]
    gradient = {name: attack_kind(name).gradient for name, _, _ in named}
    for mode in (*modes, *(own for _, slash, own in named if slash)):
        surrogate(mode)
    for name, slash, own in named:
        if slash and not gradient[name]:
            raise EvaluationError(f"{name} uses no gradient, so it has no backward: write {name}, not {name}/{own}")
    found = [(name, mode) for mode in modes for name, slash, _ in named if gradient[name] and not slash]
    found += [(name, own) for name, slash, own in named if slash or not gradient[name]]
    if not found:
        raise EvaluationError("no attack asked for: give at least one, and for gradient attacks a backward")
    order = sorted(dict.fromkeys(found), key=lambda run: (attack_kind(run[0]).started, run[1] != "exact", not run[1]))
    return [Run(name, mode or None, seed + i) for i, (name, mode) in enumerate(order)]


def fitting(
    runs: Sequence[Run],
    attacks: Sequence[str],
    settings: AttackSettings,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
) -> list[Run]:
    """Return the runs that can attack a model on such images; of lists of attacks the others are left out.

    Args:
        attacks: What was asked for; what is named there itself has to fit.
        labels: Theirs; only their being maps matters.

    Raises:
        EvaluationError: A named one cannot, or none can; or torch's defaults are others than the attacks'.
    """
    if (torch.get_default_dtype(), torch.get_default_device().type) != (torch.float32, "cpu"):
        raise EvaluationError(
            "attacks compute in float32 and draw on the CPU: torch.set_default_dtype(torch.float32) and "
            "torch.set_default_device(None) before this, and give model and images their device by .to(device)"
        )
    named = {name.partition("/")[0] for name in map(str, items(attacks))}
    images = images[:2].to(next(itertools.chain(model.parameters(), model.buffers()), images).device)
    with torch.no_grad():
        logits = logits_of(model, images, labels)
    misfits = {run: run.kind.misfit(images, logits, settings.norm) for run in runs}
    for run, misfit in misfits.items():
        if misfit is not None and (run.attack in named or all(misfits.values())):
            raise EvaluationError(f"{run.attack} {misfit}")
    return [run for run in runs if misfits[run] is None]


def perturbed(
    model: nn.Module,
    run: Run,
    images: Tensor,
    labels: Tensor,
    settings: AttackSettings,
    starts: Tensor | None = None,
) -> Tensor:
    """Return what ``run`` makes of ``images``; the operators' switches are put back."""
    with switched(model):
        return attack(run.attack, model, images, labels, replace(settings, seed=run.seed), run.backward, starts)


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
    """A model under the attacks of a plan.

    Attributes:
        model: What counts: an attack has found only what this is wrong on.
        plan: Says whether it is attacked compiled or in lower precision; see `FastModel`.
    """

    def __init__(self, model: nn.Module, plan: AttackPlan) -> None:
        mode = compile_mode(plan.compile)
        self.model, self.plan, self._compiled = model, plan, mode is not None
        self._fast = model if mode is None and plan.amp is None else FastModel(model, mode, plan.amp)

    def target_of(self, run: Run) -> nn.Module:
        """Return what ``run`` attacks: the model itself where the attack needs it."""
        itself = run.kind.reads_graph or (self._compiled and run.kind.several_gradients)
        return self.model if itself else self._fast

    def perturbed(
        self, run: Run, images: Tensor, labels: Tensor, settings: AttackSettings | None = None, *starts: Tensor
    ) -> Tensor:
        """Return what ``run`` makes of ``images``, with the plan's settings or others."""
        return perturbed(self.target_of(run), run, images, labels, settings or self.plan.settings, *starts)


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mask ``[N]`` of images classified correctly."""
    if not len(images):
        return torch.zeros(0, dtype=torch.bool, device=images.device)
    with torch.no_grad():
        return logits_of(model, images).argmax(1) == labels


def device_of(sparse: nn.Module) -> torch.device:
    """Return the device of a transformed model."""
    statistics = next(iter(operators(sparse).values())).mean
    assert isinstance(statistics, Tensor)
    return statistics.device
