"""Train the bundled network adversarially on Fashion-MNIST and write the files the package carries.

    python -m benchmarks.train_robust --data /usr/share/datasets/fashion-mnist --out meansparse_fx/bundled

PGD adversarial training (Madry et al., 2018), Linf. The calibration images come from the training
set; the selection and test images from the test set, which training never sees.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from meansparse_fx.bundled.network import FashionResNet
from meansparse_fx.data import load_idx


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float) -> Tensor:
    """Return adversarial images of ``x`` in its Linf ball of radius ``eps``, from a random start."""
    adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + step_size * grad.sign()
        adv = adv.clamp(x - eps, x + eps).clamp(0, 1)
    return adv.detach()


def train(x: Tensor, y: Tensor, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    model = FashionResNet().to(memory_format=torch.channels_last)
    compiled = torch.compile(model) if args.compile else model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    batches = len(x) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * batches)
    for epoch in range(args.epochs):
        start, correct, seen = time.perf_counter(), 0, 0
        order = torch.randperm(len(x))
        for i in range(batches):
            index = order[i * args.batch_size : (i + 1) * args.batch_size]
            images, labels = x[index], y[index]
            model.train(args.attack_in_train_mode)
            adv = pgd(compiled, images, labels, args.eps, args.steps, args.step_size)
            model.train()
            logits = compiled(adv)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        print(
            f"epoch {epoch + 1}: robust train accuracy {correct / seen:.3f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return float(torch.cat([model(b).argmax(1) for b in x.split(500)]).eq(y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument(
        "--attack-in-train-mode", action="store_true", help="attack through batch statistics, not the running ones"
    )
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step-size", type=float, default=0.04)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile (faster, other rounding)")
    parser.add_argument("--subsets-only", action="store_true", help="write the images, keep the weights")
    args = parser.parse_args()

    x, y = load_idx(args.data, "train")
    x_test, y_test = load_idx(args.data, "t10k")
    args.out.mkdir(parents=True, exist_ok=True)
    write_subsets((x, y), (x_test, y_test), args.out / "fashion_mnist_subset.npz")
    if args.subsets_only:
        return
    model = train(x, y, args)
    recipe = {k: v for k, v in vars(args).items() if k not in ("data", "out", "subsets_only")}
    recipe["torch"] = torch.__version__
    recipe["clean_t10k"] = accuracy(model, x_test, y_test)
    adv = torch.cat(
        [
            pgd(model, a, b, args.eps, 20, 0.02)
            for a, b in zip(x_test[:1000].split(250), y_test[:1000].split(250), strict=True)
        ]
    )
    recipe["pgd20_t10k_1000"] = accuracy(model, adv, y_test[:1000])
    print(json.dumps(recipe))

    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.out / "fashion_resnet.safetensors", metadata={"recipe": json.dumps(recipe)})


def write_subsets(train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], path: Path) -> None:
    """Write three fixed, disjoint sets of 2,000 images each."""
    generator = np.random.default_rng(0)
    calibration = generator.permutation(len(train_set[0]))[:2000]
    held_out = generator.permutation(len(test_set[0]))
    arrays = {}
    for name, (images, labels), index in (
        ("calibration", train_set, calibration),
        ("selection", test_set, held_out[:2000]),
        # Images 2000 to 4000 were looked at while the demo's sizes were chosen, so they are no test any more.
        ("test", test_set, held_out[4000:6000]),
    ):
        arrays[f"{name}_images"] = (images[index] * 255).round().to(torch.uint8).numpy()
        arrays[f"{name}_labels"] = labels[index].to(torch.uint8).numpy()
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
