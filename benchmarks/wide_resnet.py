"""A wide residual network, pre-activation, as in Zagoruyko and Komodakis (2016), for images of 32x32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Norm, ReLU and convolution, twice, beside a shortcut; where the width changes, both start from the activation."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(width_in), nn.ReLU()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, width, H / stride, W / stride]`` of ``[N, width_in, H, W]``."""
        y = self.relu1(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(self.relu2(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-widen: three groups of (depth - 4) / 6 blocks."""

    def __init__(self, depth: int, widen: int, classes: int = 10) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            *(
                Block(widths[group] if first else widths[group + 1], widths[group + 1], 2 if first and group else 1)
                for group in range(3)
                for first in [True] + [False] * ((depth - 4) // 6 - 1)
            )
        )
        self.bn, self.relu = nn.BatchNorm2d(widths[3]), nn.ReLU()
        self.head = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of images ``[N, 3, H, W]``."""
        x = self.relu(self.bn(self.blocks(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
