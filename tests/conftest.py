"""Fixtures shared by all tests: one small network with every hazard that costs nothing, and its images."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_fx import rewrite
from tests.graph_verifier import verified_editing

# Torch operators everywhere unless a test says otherwise: no compiling, and results equal bit for bit.
os.environ["MEANSPARSE_FX_LOWERING"] = "eager"


class TinyNet(nn.Module):
    """Convolutions, an in-place module called twice, a functional call, a learned slope and a token MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.slope = nn.PReLU(8, init=0.1)
        self.mlp = nn.Linear(8, 6)
        self.head = nn.Linear(6, 10)
        self.unused = nn.Linear(2, 2)  # in the state_dict, not in the graph

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(x + self.conv2(x))
        x = self.slope(self.conv2(x))
        x = F.gelu(self.mlp(x.permute(0, 2, 3, 1)))  # [N, H, W, 6]
        return self.head(x.mean((1, 2)))


@pytest.fixture
def sites() -> dict[str, int]:
    """The sites of `net` and their channels."""
    return {"relu": 8, "relu_1": 8, "slope": 8, "gelu": 6}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = TinyNet()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    net.eval()
    with torch.no_grad():  # so that the classes differ from image to image
        net.head.bias -= net(torch.rand(64, 3, 9, 9)).mean(0)
    return net


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True, scope="session")
def every_pass_is_verified():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "editing", verified_editing)
        yield
