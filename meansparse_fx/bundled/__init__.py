"""Floor 1: the bundled model and its images, kept inside the package: no download, nothing unpickled.

`python -m benchmarks.paper bundled` made both. Calibration images come from the training set; selection and test
images from the test set, which training never saw. No image is in two of them.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from safetensors.torch import load
from torch import Tensor

from ..data import load_images
from .network import FashionResNet

SPLITS = ("calibration", "selection", "test")
EPS = 0.1  # Linf radius the model was trained against, for images in [0, 1]


def load_model() -> FashionResNet:
    """Return the adversarially trained network, in eval mode.

    Example:
        >>> images, labels = load_split("test")
        >>> load_model()(images[:4]).shape
        torch.Size([4, 10])
    """
    model = FashionResNet()
    model.load_state_dict(load((files(__package__) / "fashion_resnet.safetensors").read_bytes()))
    # Channels-last: measured faster in forward and backward on CPUs than the default layout.
    return model.eval().to(memory_format=torch.channels_last)


def load_split(name: str) -> tuple[Tensor, Tensor]:
    """Return images ``[2000, 1, 28, 28]`` in [0, 1] and labels ``[2000]`` of one of `SPLITS`, shuffled."""
    with as_file(files(__package__) / "fashion_mnist_subset.npz") as path:
        found = load_images(path, name)
    return found.images, found.labels
