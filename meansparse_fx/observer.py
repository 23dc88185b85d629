"""Floor 3: the observer, the module that the passes put in an operator's place to measure.

Knows one site; nothing of graphs. Imports kernels, and statistics for the moments' type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activations import ActivationCall
from .errors import SiteError, check_dims
from .kernels.ops import activation_moments, channel_moments
from .statistics import ChannelStatistics


class ChannelMoments(nn.Module):
    """An observer: measures its input, and returns it unchanged or, fused, activated.

    It keeps the moments of its latest call alone; `calibrate` merges those of all sites at once, in a few operations
    a batch instead of a few a site. No host synchronisation.

    Args:
        name: The site's name, for messages.
        channels: Number of channels C.
        channel_dim: Dimension of the input that holds them.
        activation: Returned applied to the input, which a GPU then reads once; None returns the input.
        dims: How many dimensions the input has; any number if None.

    Attributes:
        latest: Of the latest call; None before the first.
        bins: Called with the input ``[C, values]`` too, if set: what counts histograms.
    """

    def __init__(
        self, name: str, channels: int, channel_dim: int, activation: ActivationCall | None = None,
        dims: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.name = name
        self.channels = channels
        self.channel_dim, self.dims = channel_dim, dims
        self.activation = activation
        self.latest: ChannelStatistics | None = None
        self.bins: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return x ``[..., C, ...]``, or act(x), having measured it; weight is the activation's learned slope."""
        check_dims(self.name, x, self.dims)
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
