"""Floor 4: what a transformed model keeps of how it was made, and whether it still is that model. Changes no graph."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..held_parts import HeldParts
from ..nn import MeanSparse
from ..rewrite import PREFIX
from ..sites import Placement, SitePlan
from ..statistics import Statistics, fingerprint

_SHOWN = 3


class Added(nn.Module):
    """Holds what was added to a model, and how: here, because copies and pickles of a GraphModule keep its modules.

    Attributes:
        plan: The model's sites.
        placement: By which they were chosen, without its predicate, which need not be picklable.
        fuse: As `transform` was given it.
        statistics: That the operators were given last; they may have got others since, from a state_dict.
        choice: Of alpha, by a search: as `AlphaSearch.to_dict` returns it.
        shape: Of one of the example images, if they were floats.
        frozen: What stays as it is in eval mode, in words; `train` says so once.
        held: What has to stay as it was.
        operators: All of them.
        reloaded: A state_dict without the operators was loaded since they got their statistics.
    """

    def __init__(self, plan: SitePlan) -> None:
        super().__init__()
        self.plan = plan.without_nodes()
        self.placement = Placement()
        self.fuse = "activation"
        self.statistics: Statistics | None = None
        self.choice: dict[str, Any] | None = None
        self.shape: tuple[int, ...] | None = None
        self.frozen: tuple[str, ...] = ()
        self.held = HeldParts()
        self.operators: list[MeanSparse] = []
        self._writes = 0
        self.reloaded = False
        self._watched: list[tuple[nn.Module, str, Tensor]] = []  # owner, its parameter's or buffer's path, value
        self.register_load_state_dict_post_hook(_note_loaded)

    def watch(self, model: nn.Module, names: Iterable[str]) -> None:
        """Let load_state_dict refuse other values of parameters and buffers whose values answered the model."""
        for path in names:
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            self._watched.append((module, path, getattr(module, name).detach().clone()))

    def check(self, model: nn.Module) -> None:
        """Raise StateError if the model that this belongs to is another than was transformed; every call of it asks."""
        self.held.check(model)
        if not torch.compiler.is_compiling():  # which would compile anew for each count
            self._check_writes()
        if self.reloaded and any(own.calibrated for own in self.operators):
            if torch.compiler.is_compiling() or self._measured_on() != _fingerprint(model):
                raise StateError(
                    "a state_dict was loaded that lacks the operators' statistics, which were measured on other "
                    "weights: calibrate the model again"
                )
            self.reloaded = False

    def _measured_on(self) -> str | None:
        """Return the fingerprint of the weights that the statistics are of; None if a state_dict brought them."""
        known = self.statistics
        if known is None or not all(own.name in known and own.holds(known[own.name]) for own in self.operators):
            return None
        return known.fingerprint

    def _check_writes(self) -> None:
        """Raise StateError if an operator's buffers were written to past what sets them."""
        writes = sum([operator.count_writes() for operator in self.operators])
        if writes != self._writes:
            for operator in self.operators:
                operator.check_written()
            self._writes = writes

    def train(self, mode: bool = True) -> Added:
        """Set the mode as every module does."""
        if mode and self.frozen:
            more = f" and {len(self.frozen) - _SHOWN} more" if len(self.frozen) > _SHOWN else ""
            warnings.warn(
                f"the graph was traced in eval mode: dropout, stochastic depth and whatever else depends on train mode "
                f"stays off in {', '.join(self.frozen[:_SHOWN])}{more}. To train with it, train the base model, and "
                "transform that afterwards",
                stacklevel=3,
            )
            self.frozen = ()
        return super().train(mode)


def _fingerprint(model: nn.Module) -> str:
    if "torch._dynamo" not in sys.modules:
        return fingerprint(model)
    # Dynamo, which gave up a call of the model, goes on to compile what that calls.
    return torch.compiler.disable(fingerprint)(model)


def _note_loaded(added: Added, keys: Any) -> None:
    # Loaded as a part of a wrapper, the model has keys behind the wrapper's.
    added.reloaded = any(PREFIX in key.split(".") for key in keys.missing_keys)
    for module, path, value in added._watched:
        held = getattr(module, path.rpartition(".")[2], None)
        if held is not None and not held.is_meta and not torch.equal(held.to(value), value):
            raise StateError(
                f"forward makes a number or a branch of {path}, and the graph holds for the value it had: load the "
                "weights into the base model and transform that"
            )
