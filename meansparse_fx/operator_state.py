"""Floor 3: what an operator holds, and what of it a state_dict, a file of settings and a user change.

Knows one site; nothing of graphs, and nothing of what is computed with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .arguments import half_width, number
from .errors import ArgumentError, SiteError, StateError
from .kernels.reference import BACKWARDS, VARIANTS
from .published import PublishedOperator
from .statistics import ChannelStatistics

_VECTORS = ("mean", "std", "alpha", "centre", "threshold")
CENTRES = ("channel", "zero", "layer")


class OperatorState(nn.Module):
    """Statistics, alpha and switches of one site, and the centre and threshold that follow from them.

    Its state_dict holds all that decides the operator's function: statistics, alpha, and as extra state, which is JSON
    in a tensor of bytes, the `switches`.

    Args:
        name: The site's name, for messages.
        channels: Number of channels C.

    Attributes:
        mean, std: ``[C]``, the site's statistics; std is NaN until calibrated.
        alpha: Scalar. Change it with `set_alpha`, which also renews the threshold.
        centre, threshold: ``[C]``, what the kernel reads: derived from the above, so not in the state_dict.
            Always float32, or float64 in a float64 model. A negative threshold switches a channel off.
        strict: The band is open, as published checkpoints have it: values at distance alpha * std stay.
        variant, backward, steepness, backward_steepness: See `kernels.records.Options`.
        gate_steepness: Scalar, backward_steepness as compiled programs read it: another one compiles nothing anew.
    """

    mean: Tensor
    std: Tensor
    alpha: Tensor
    centre: Tensor
    threshold: Tensor
    gate_steepness: Tensor
    _written: int

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.name = name
        self.channels = channels
        self.strict = False
        self.variant, self.centre_mode, self.backward = "mean", "channel", "exact"
        self.steepness = self.backward_steepness = 10.0
        self._given_alpha = 0.0  # as the caller wrote it, which the buffer rounds to float32
        zeros = torch.zeros(channels, dtype=torch.float32, device="cpu")  # whatever the defaults are
        self.register_buffer("mean", zeros)
        self.register_buffer("std", zeros.new_full((channels,), math.nan))
        self.register_buffer("alpha", zeros.new_zeros(()))
        self.register_buffer("centre", zeros.clone(), persistent=False)
        self.register_buffer("threshold", zeros.new_full((channels,), -1.0), persistent=False)
        self.register_buffer("gate_steepness", zeros.new_full((), 10.0), persistent=False)
        self._refresh()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("strict", "centre_mode") and "_written" in self.__dict__:
            self._refresh()

    @property
    def calibrated(self) -> bool:
        """Whether the site has statistics."""
        return bool(self.std.isfinite().all())

    def set_statistics(self, statistics: ChannelStatistics) -> None:
        """Take over mean and std (population) of a calibration."""
        self.mean.copy_(statistics.mean)
        self.std.copy_(statistics.std)
        self._refresh()

    def holds(self, statistics: ChannelStatistics) -> bool:
        """Return whether mean and std are those of a calibration."""
        pairs = ((self.mean, statistics.mean), (self.std, statistics.std))
        return all(torch.equal(own.cpu(), given.cpu().to(own.dtype)) for own, given in pairs)

    def take_over(self, published: PublishedOperator) -> None:
        """Become the same function as a published operator: its statistics, its alpha, its open band."""
        if len(published.mean) != self.channels:
            raise SiteError(
                f"{self.name}: the published operator has {len(published.mean)} channels, its input {self.channels} at "
                f"dim {self.channel_dim}"
            )
        self.strict = True
        if published.variance.any():  # all zero: never calibrated
            self.mean.copy_(published.mean)
            self.std.copy_(published.variance.sqrt())
        self.set_alpha(published.alpha)

    def set_alpha(self, alpha: float) -> None:
        """Set the half width of the band in standard deviations; 0 switches the operator off."""
        alpha = half_width(alpha, f"{self.name}: alpha")
        if alpha > 0 and not self.calibrated:
            raise StateError(f"{self.name}: alpha {alpha} asked for, but the site has no statistics: calibrate first")
        self.alpha.fill_(alpha)
        self._given_alpha = alpha
        self._refresh()

    def get_alpha(self) -> float:
        """Return alpha as it was given: 0.2, not the float32 nearest to it."""
        held = self.alpha.item()
        if held == self.alpha.new_tensor(self._given_alpha).item():
            return self._given_alpha
        return float(str(np.float32(held)))  # set by a state_dict: the shortest number that rounds to it

    def switches(self) -> dict[str, Any]:
        """Return all that decides the operator's function besides statistics and alpha, as plain values."""
        return {
            "variant": self.variant,
            "centre": self.centre_mode,
            "steepness": self.steepness,
            "strict": self.strict,
            "backward": self.backward,
            "backward_steepness": self.backward_steepness,
        }

    def set_switches(self, switches: Mapping[str, Any]) -> None:
        """Set what `switches` returned.

        Raises:
            StateError: There are others than this release knows.
        """
        known = self.switches().keys()
        if switches.keys() != known:
            differing = ", ".join(sorted(switches.keys() ^ known))
            raise StateError(
                f"{self.name}: settings of another release of meansparse_fx ({differing}): load them there"
            )
        self.set_variant(switches["variant"], switches["centre"], switches["steepness"])
        self.set_backward(switches["backward"], switches["backward_steepness"])
        self.strict = bool(switches["strict"])

    def get_extra_state(self) -> Tensor:
        written = json.dumps({"alpha": self._given_alpha, **self.switches()})
        return torch.frombuffer(bytearray(written, "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        try:
            switches = json.loads(bytes(state.tolist()))
            self._given_alpha = float(switches.pop("alpha"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{self.name}: the state_dict's _extra_state is damaged: {error}") from error
        self.set_switches(switches)

    def set_backward(self, mode: str, steepness: float) -> None:
        """Choose the gradient: ``exact``, ``identity`` or ``smooth``; forward values do not change."""
        if mode not in BACKWARDS:
            raise ArgumentError(
                f"backward must be one of {', '.join(BACKWARDS)}, got {mode!r} (smooth-3 is set_backward(model, "
                '"smooth", 3.0); annealed, which evaluate has, is smooth with 3, 5, 9, 17 and 30 by turns)'
            )
        if (mode, steepness) != (self.backward, self.backward_steepness):  # attacks switch at every step
            self.backward, self.backward_steepness = mode, _positive("steepness", steepness)
            self.gate_steepness.fill_(self.backward_steepness)

    def set_variant(self, variant: str, centre: str | None = None, steepness: float | None = None) -> None:
        """Choose what the band becomes (``mean``, ``edge``, ``smooth``) and its centre (paper, Table 8), if given."""
        centre = self.centre_mode if centre is None else centre
        steepness = self.steepness if steepness is None else steepness
        if variant not in VARIANTS:
            raise ArgumentError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if centre not in CENTRES:
            raise ArgumentError(f"centre must be one of {', '.join(CENTRES)}, got {centre!r}")
        self.variant, self.centre_mode, self.steepness = variant, centre, _positive("steepness", steepness)

    def _refresh(self) -> None:
        with torch.no_grad():
            for own, value in zip((self.centre, self.threshold), self._derived(), strict=True):
                own.copy_(value)
        self.__dict__["_written"] = self.count_writes()

    def _derived(self) -> tuple[Tensor, Tensor]:
        """Return centre and threshold as they follow from the rest."""
        held: Any = self._buffers  # attributes are proxies while somebody traces
        mean, band = held["mean"], held["alpha"] * held["std"]
        if self.strict:
            band = torch.where(band > 0, band.nextafter(torch.zeros_like(band)), band)
        threshold = torch.where(band > 0, band, -torch.ones_like(band))
        match self.centre_mode:
            case "zero":
                return torch.zeros_like(mean), threshold
            case "layer":
                return mean.mean().expand_as(mean), threshold
        return mean, threshold

    def count_writes(self) -> int:
        """Return what changes where statistics or alpha are written to or replaced, or alpha wants gradients.

        0.7 microseconds, of which every call of a model has as many as there are sites: so written out.
        """
        held: Any = self._buffers
        mean, std, alpha = held["mean"], held["std"], held["alpha"]
        try:
            writes = (
                mean._version + std._version + alpha._version + held["centre"]._version + held["threshold"]._version
            )
        except RuntimeError:  # inference tensors do not count
            return -1
        return writes + id(mean) + id(std) + id(alpha) + int(alpha.requires_grad)

    def check_written(self, values: bool = False) -> None:
        """Raise StateError if statistics, alpha or what follows from them were written to past what sets them, or want
        gradients.

        Args:
            values: Compare them in any case, and not only where torch counted a write: ``.data`` counts none.
        """
        held: Any = self._buffers
        writes = self.count_writes()
        if (values or writes != self._written) and not (torch.jit.is_tracing() or held["mean"].is_meta):
            if wanting := [name for name in _VECTORS if held[name].requires_grad]:
                raise StateError(f"{self.name}: no gradient reaches {wanting[0]}: call its requires_grad_(False)")
            given = {is_functorch_wrapped_tensor(held[name]) for name in _VECTORS}  # all of them: an ensemble's
            if given == {False, True} or not (
                given == {True} or all(map(torch.equal, self._derived(), (held["centre"], held["threshold"])))
            ):
                raise StateError(
                    f"{self.name}: its buffers were written to, of which some follow from others: call "
                    "meansparse_fx.set_alpha or set_statistics, or give all sites theirs by load_state_dict"
                )
            self.__dict__["_written"] = writes

    def _apply(self, fn, recurse: bool = True):
        # model.half() must not round the statistics: buffers follow the device, and float64 only.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = getattr(self, key)
            dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
            if new.dtype != dtype:
                self._buffers[key] = old.to(device=new.device, dtype=dtype)
        # Writing the same values again would be a change between a forward pass and its backward.
        if any(self._buffers[key] is not old for key, old in before.items()):
            self._refresh()
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        if metadata.get("assign_to_params_buffers"):
            for name in ("mean", "std", "alpha"):  # or set_alpha would change the operator they come from
                self._buffers[name] = self.get_buffer(name).clone()
            for name in ("centre", "threshold"):
                self._buffers[name] = torch.empty_like(self.mean)
            self.gate_steepness = self.alpha.new_tensor(self.backward_steepness)
        self._refresh()


def _positive(name: str, value: float) -> float:
    value = number(value, name)
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name} must be finite and positive, got {value}")
    return value
