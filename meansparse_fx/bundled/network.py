"""Floor 1: the bundled architecture. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a projected shortcut, post-activation."""

    def __init__(self, in_channels: int, channels: int, stride: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))


class FashionResNet(nn.Module):
    """A small residual network for 1x28x28 images in [0, 1]: seven activations, about 80 thousand parameters.

    Stem of 16 channels, three residual blocks of 16, 32 and 64 channels at stride 2, global mean, linear.

    Args:
        activation: Makes one activation module; called once per place.
    """

    def __init__(self, activation: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.default_cfg = {"input_size": (1, 28, 28)}  # as timm's models say it
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), activation())
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, 2, activation),
            ResidualBlock(16, 32, 2, activation),
            ResidualBlock(32, 64, 2, activation),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # [N, 64, 4, 4]
        return self.head(x.mean(dim=(2, 3)))
