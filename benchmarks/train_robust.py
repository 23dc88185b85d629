"""Train the bundled network adversarially on Fashion-MNIST and write the files the package carries.

    python -m benchmarks.train_robust --data /usr/share/datasets/fashion-mnist --out meansparse_fx/bundled

The recipe is the default one of `benchmarks.paper.training`. The calibration images come from the training
set; the selection and test images from the test set, which training never sees.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meansparse_fx import bundled
from meansparse_fx.data import load_idx

from .harness import options
from .paper.training import Recipe, accuracy, pgd, save, train


def main() -> None:
    parser = options(__doc__, out="")
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    args = parser.parse_args()
    x, y = load_idx(args.data, "train")
    x_test, y_test = load_idx(args.data, "t10k")
    args.out.mkdir(parents=True, exist_ok=True)
    write_subsets((x, y), (x_test, y_test), args.out / "fashion_mnist_subset.npz")
    recipe = Recipe()
    model = train(recipe, x, y)
    record = asdict(recipe) | {"torch": torch.__version__, "clean_t10k": accuracy(model, x_test, y_test)}
    batches = zip(x_test[:1000].split(250), y_test[:1000].split(250), strict=True)
    adv = torch.cat([pgd(model, images, labels, recipe.eps, 20, 0.02) for images, labels in batches])
    record["pgd20_t10k_1000"] = accuracy(model, adv, y_test[:1000])
    print(json.dumps(record))
    save(model, args.out / "fashion_resnet.safetensors", record)


def subsets(train: int, test: int) -> dict[str, np.ndarray]:
    """Return indices of fixed, disjoint sets of 2,000 images, by name.

    Args:
        train, test: Lengths of the two sets.
    """
    generator = np.random.default_rng(0)
    calibration, held_out = generator.permutation(train), generator.permutation(test)
    return {
        "calibration": calibration[:2000],  # of the training set; the others are of the test set
        "selection": held_out[:2000],
        # Looked at while the demo's sizes were chosen, so they are no test of it any more.
        "paper": held_out[2000:4000],
        "test": held_out[4000:6000],
    }


def write_subsets(train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], path: Path) -> None:
    """Write the sets that the package carries."""
    indices = subsets(len(train_set[0]), len(test_set[0]))
    arrays = {}
    for name in bundled.SPLITS:
        images, labels = train_set if name == "calibration" else test_set
        arrays[f"{name}_images"] = (images[indices[name]] * 255).round().to(torch.uint8).numpy()
        arrays[f"{name}_labels"] = labels[indices[name]].to(torch.uint8).numpy()
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
