"""Floor 3: the two modules the passes put into graphs: the operator and the observer.

Knows one site each; nothing of graphs. Imports kernels, and statistics for the moments' type.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activations import ActivationCall
from .errors import SiteError, StateError
from .frozen import Before
from .kernels.fused import fused
from .kernels.ops import activation_moments, channel_moments, mean_sparse
from .kernels.records import Options, Vectors
from .kernels.reference import BACKWARDS, VARIANTS, per_channel
from .published import PublishedOperator
from .rewrite import RecordedCall
from .statistics import ChannelStatistics

CENTRES = ("channel", "zero", "layer")


class MeanSparse(nn.Module):
    """The operator at one site, with the site's activation fused behind it (paper, section 3.2).

    Values within ``alpha * std`` of the channel's centre become the centre, then the activation is applied.
    At alpha = 0 it is the activation alone.

    Args:
        name: The site's name, for messages.
        channels: Number of channels C.
        channel_dim: Dimension of the input that holds them, not negative.
        activation: The activation to fuse; None for the bare operator.

    Attributes:
        mean, std: ``[C]``, the site's statistics; std is NaN until calibrated.
        alpha: Scalar. Change it with `set_alpha`, which also renews the threshold.
        centre, threshold: ``[C]``, what the kernel reads: derived from the above, so not in the state_dict.
            Always float32, or float64 in a float64 model. A negative threshold switches a channel off.
        replaces: The call this operator took the place of, activation included; None for a bare operator.
        before: What a fused call takes in besides its tensors; see `passes.fuse`.
        strict: The band is open, as published checkpoints have it: values at distance alpha * std stay.
        variant, backward, steepness: See `kernels.reference.mean_sparse`.
    """

    def __init__(self, name: str, channels: int, channel_dim: int, activation: ActivationCall | None = None):
        super().__init__()
        self.name = name
        self.channels = channels
        self.channel_dim = channel_dim
        self.activation = activation
        self.replaces: RecordedCall | None = None
        self.before = Before()
        self.strict = False
        self.variant = "mean"
        self.centre_mode = "channel"
        self.backward = "exact"
        self.steepness = 10.0
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.full((channels,), math.nan))
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(channels), persistent=False)
        self.register_buffer("threshold", torch.full((channels,), -1.0), persistent=False)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        fused: bool = False,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return act(s(x)), shaped like x.

        Args:
            x: ``[..., C, ...]``.
            weight: The activation's learned slope, if it has one.
            fused: Take in what stands around the operator, too; see `fused`.
            residual, layer_scale, shortcut: For a fused call.
        """
        if fused:
            return self.fused(x, weight, residual, layer_scale, shortcut)
        return mean_sparse(
            x,
            self.centre,
            self.threshold,
            self.channel_dim,
            self.activation.name if self.activation else "identity",
            self.activation.constants if self.activation else (),
            weight,
            self.variant,
            self.backward,
            self.steepness,
        )

    def fused(
        self,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        layer_scale: Tensor | None,
        shortcut: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return act(s(outer(v))) + shortcut of v = norm(x) * layer_scale + residual; and v if `before` wants it.

        Args:
            x: ``[..., C, ...]``.
            weight: The activation's learned slope, if it has one.
            residual, shortcut: Of x's shape.
            layer_scale: C numbers, whatever their shape.
        """
        if any(norm is not None and norm.module.training for norm in (self.before.norm, self.before.outer)):
            raise StateError(f"{self.name}: fused with a batch norm in eval mode, which is in train mode: call eval()")
        # Of several dtypes, as autocast makes them, the result has torch's own.
        mixed = any(t is not None and t.dtype != x.dtype for t in (residual, layer_scale, shortcut))
        if mixed or torch.compiler.is_compiling():
            return self._composed(x, weight, residual, layer_scale, shortcut)
        inner, outer = (
            (None, None) if norm is None else norm.affine() for norm in (self.before.norm, self.before.outer)
        )
        layer_scale = None if layer_scale is None else layer_scale.detach().flatten()
        vectors = Vectors(self.centre, self.threshold, weight, *inner, layer_scale, *outer)
        activation = self.activation
        options = Options(
            self.channel_dim,
            activation.name if activation else "identity",
            activation.constants if activation else (),
            self.variant,
            self.backward,
            self.steepness,
            self.before.want_sum,
        )
        return fused(x, residual, shortcut, vectors, options)

    def _composed(
        self,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        layer_scale: Tensor | None,
        shortcut: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the same as single calls, which compilers fuse themselves."""
        v = x if self.before.norm is None else self.before.norm(x)
        v = v if layer_scale is None else v * per_channel(layer_scale.flatten(), x.dim(), self.channel_dim)
        v = v if residual is None else v + residual
        u = v if self.before.outer is None else self.before.outer(v)
        y = self.forward(u, weight)
        y = y if shortcut is None else y + shortcut
        return (y, v) if self.before.want_sum else y

    @property
    def calibrated(self) -> bool:
        """Whether the site has statistics."""
        return bool(self.std.isfinite().all())

    def set_statistics(self, statistics: ChannelStatistics) -> None:
        """Take over mean and std (population) of a calibration."""
        self.mean.copy_(statistics.mean)
        self.std.copy_(statistics.std)
        self._refresh()

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
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"{self.name}: alpha must be finite and not negative, got {alpha}")
        if alpha > 0 and not self.calibrated:
            raise StateError(f"{self.name}: alpha {alpha} asked for, but the site has no statistics: calibrate first")
        self.alpha.fill_(alpha)
        self._refresh()

    def set_backward(self, mode: str, steepness: float) -> None:
        """Choose the gradient: ``exact``, ``identity`` or ``smooth``; forward values do not change."""
        if mode not in BACKWARDS:
            raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}, got {mode!r}")
        self.backward, self.steepness = mode, _positive("steepness", steepness)

    def set_variant(self, variant: str, centre: str, steepness: float) -> None:
        """Choose what the band becomes (``mean``, ``edge``, ``smooth``) and its centre (paper, Table 8)."""
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if centre not in CENTRES:
            raise ValueError(f"centre must be one of {', '.join(CENTRES)}, got {centre!r}")
        self.variant, self.centre_mode, self.steepness = variant, centre, _positive("steepness", steepness)
        self._refresh()

    def _refresh(self) -> None:
        with torch.no_grad():
            band = self.alpha * self.std
            if self.strict:
                band = torch.where(band > 0, band.nextafter(torch.zeros_like(band)), band)
            self.threshold.copy_(torch.where(band > 0, band, -torch.ones_like(band)))
            match self.centre_mode:
                case "channel":
                    self.centre.copy_(self.mean)
                case "zero":
                    self.centre.zero_()
                case "layer":
                    self.centre.copy_(self.mean.mean())

    def _apply(self, fn, recurse: bool = True):
        # model.half() must not round the statistics: buffers follow the device, and float64 only.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
            if new.dtype != dtype:
                self._buffers[key] = old.to(device=new.device, dtype=dtype)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def extra_repr(self) -> str:
        fused = self.activation.name if self.activation else "identity"
        return (
            f"{self.channels} channels @ dim {self.channel_dim}, activation={fused}, "
            f"variant={self.variant}, centre={self.centre_mode}, backward={self.backward}"
        )


class ChannelMoments(nn.Module):
    """An observer: measures its input, and returns it unchanged or, fused, activated.

    It keeps the moments of its latest call alone; `calibrate` merges those of all sites at once, in a few operations
    a batch instead of a few a site. No host synchronisation.

    Args:
        name: The site's name, for messages.
        channels: Number of channels C.
        channel_dim: Dimension of the input that holds them.
        activation: Returned applied to the input, which a GPU then reads once; None returns the input.

    Attributes:
        latest: Of the latest call; None before the first.
        bins: Called with the input ``[C, values]`` too, if set: what counts histograms.
    """

    def __init__(self, name: str, channels: int, channel_dim: int, activation: ActivationCall | None = None):
        super().__init__()
        self.name = name
        self.channels = channels
        self.channel_dim = channel_dim
        self.activation = activation
        self.latest: ChannelStatistics | None = None
        self.bins: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return x ``[..., C, ...]``, or act(x), having measured it; weight is the activation's learned slope."""
        if x.shape[self.channel_dim] != self.channels:
            raise SiteError(
                f"{self.name}: input has {x.shape[self.channel_dim]} channels at dim {self.channel_dim}, "
                f"the site was planned with {self.channels}"
            )
        y = x
        if self.activation is None:
            moments = channel_moments(x, self.channel_dim)
        else:
            call = self.activation
            y, moments = activation_moments(x, self.channel_dim, call.name, call.constants, weight)
        self.latest = ChannelStatistics(*moments)
        if self.bins is not None:
            self.bins(x.movedim(self.channel_dim, 0).flatten(1))
        return y


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and positive, got {value}")
    return value
