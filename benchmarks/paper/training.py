"""Train small networks on Fashion-MNIST by a recipe, and keep them by it: adversarially, by TRADES, or plainly.

The bundled network is one of them (`make_bundled`), those of `benchmarks.paper.tables` are the others.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meansparse_fx import bundled, register_activation
from meansparse_fx.artifacts import write_whole
from meansparse_fx.bundled.network import FashionResNet
from meansparse_fx.data import load_idx


class PSiLU(nn.Module):
    """x * sigmoid(a * x), a learned (Dai et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x)


class PSSiLU(nn.Module):
    """x * (sigmoid(a * x) - b) / (1 - b), a and b learned (Dai et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.sigmoid(self.slope * x) - self.shift) / (1 - self.shift)


# Trained networks are frozen, so b is a constant of the kernels' row.
register_activation(PSiLU, "psilu", weight="slope", fused=True)
register_activation(PSSiLU, "pssilu", constants=lambda m: (m.shift.item(),), weight="slope", fused=True)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "psilu": PSiLU, "pssilu": PSSiLU
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained; the defaults made the bundled one.

    Attributes:
        method: ``pgd`` (Madry et al., 2018), ``trades`` (Zhang et al., 2019) or ``standard``.
        eps: Linf radius, for images in [0, 1].
        steps, step_size: Of the attack in training.
        beta: Weight of TRADES's divergence.
        epochs, batch_size, lr, weight_decay: One-cycle SGD with Nesterov momentum 0.9.
        attack_in_train_mode: Attack through batch statistics, not the running ones.
        compile: Train through torch.compile: faster, other rounding.
    """

    activation: str = "gelu"
    method: str = "pgd"
    eps: float = 0.1
    steps: int = 4
    step_size: float = 0.04
    beta: float = 0.6
    epochs: int = 4
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    attack_in_train_mode: bool = False
    compile: bool = True
    seed: int = 0

    @property
    def digest(self) -> str:
        """Sixteen letters that stand for the recipe."""
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=8).hexdigest()


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:  # fmt: skip
    """Return adversarial images of ``x`` in its Linf ball of radius ``eps``, from a random start.

    Args:
        y: What ``loss(logits, y)`` compares with: labels, or the logits of clean images.
    """
    adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(model(adv), y), adv)
        adv = adv.detach() + step_size * grad.sign()
        adv = adv.clamp(x - eps, x + eps).clamp(0, 1)
    return adv.detach()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images ``x`` whose label of ``y`` the model finds."""
    with torch.inference_mode():
        return float(torch.cat([model(b).argmax(1) for b in x.split(500)]).eq(y).double().mean())


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the predictions from those on clean images."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(clean, 1), reduction="batchmean")


def train(recipe: Recipe, x: Tensor, y: Tensor) -> nn.Module:
    """Return a network trained on images ``[N, 1, 28, 28]`` and labels ``[N]``, in eval mode."""
    torch.manual_seed(recipe.seed)
    model = FashionResNet(ACTIVATIONS[recipe.activation]).to(memory_format=torch.channels_last)
    run = torch.compile(model) if recipe.compile else model
    descent = {"lr": recipe.lr, "momentum": 0.9, "nesterov": True, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), **descent)
    batches = len(x) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * batches)
    attack = (recipe.eps, recipe.steps, recipe.step_size)
    for epoch in range(recipe.epochs):
        start, correct, seen = time.perf_counter(), 0, 0
        order = torch.randperm(len(x))
        for i in range(batches):
            index = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            images, labels = x[index], y[index]
            model.train(recipe.attack_in_train_mode)
            if recipe.method == "pgd":
                shown = pgd(run, images, labels, *attack)
            elif recipe.method == "trades":
                with torch.no_grad():
                    clean = run(images)
                shown = pgd(run, images, clean, *attack, loss=divergence)
            else:
                shown = images
            model.train()
            logits = run(shown)
            if recipe.method == "trades":
                clean = run(images)
                loss = F.cross_entropy(clean, labels) + recipe.beta * divergence(logits, clean)
            else:
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: accuracy as attacked {correct / seen:.3f}, {seconds:.0f} s", flush=True)
    return model.eval()


def trained(recipe: Recipe, load: Callable[[], tuple[Tensor, Tensor]], cache: Path) -> nn.Module:
    """Return the network of a recipe in eval mode, frozen; from ``cache`` if it was trained before.

    Args:
        load: Returns images and labels to train on.
    """
    path = cache / f"{recipe.activation}-{recipe.method}-{recipe.digest}.safetensors"
    if path.exists():
        model = FashionResNet(ACTIVATIONS[recipe.activation])
        model.load_state_dict(load_file(path))
        model = model.eval().to(memory_format=torch.channels_last)
    else:
        print(f"training {recipe}", flush=True)
        model = train(recipe, *load())
        save(model, path, asdict(recipe))
    return model.requires_grad_(False)


def save(model: nn.Module, path: Path, recipe: dict) -> None:
    """Write a network's weights, its recipe beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_whole(path, lambda place: save_file(state, place, metadata={"recipe": json.dumps(recipe)}))


def make_bundled(data: Path, out: Path) -> None:
    """Train the bundled network on the IDX files of ``data``, and write what the package carries into ``out``.

    The calibration images come from the training set; the others from the test set, which training never sees.
    """
    x, y = load_idx(data, "train")
    x_test, y_test = load_idx(data, "t10k")
    arrays = {}
    for name, index in subsets(len(x), len(x_test)).items():
        if name in bundled.SPLITS:
            images, labels = (x, y) if name == "calibration" else (x_test, y_test)
            arrays[f"{name}_images"] = (images[index] * 255).round().to(torch.uint8).numpy()
            arrays[f"{name}_labels"] = labels[index].to(torch.uint8).numpy()
    np.savez_compressed(out / "fashion_mnist_subset.npz", **arrays)
    recipe = Recipe()
    model = train(recipe, x, y)
    record = asdict(recipe) | {"torch": torch.__version__, "clean_t10k": accuracy(model, x_test, y_test)}
    batches = zip(x_test[:1000].split(250), y_test[:1000].split(250), strict=True)
    adv = torch.cat([pgd(model, images, labels, recipe.eps, 20, 0.02) for images, labels in batches])
    record["pgd20_t10k_1000"] = accuracy(model, adv, y_test[:1000])
    print(json.dumps(record))
    save(model, out / "fashion_resnet.safetensors", record)


def subsets(train: int, test: int) -> dict[str, np.ndarray]:
    """Return indices of fixed, disjoint sets of 2,000 images, by name, given the lengths of the two sets."""
    generator = np.random.default_rng(0)
    calibration, held_out = generator.permutation(train), generator.permutation(test)
    return {
        "calibration": calibration[:2000],  # of the training set; the others are of the test set
        "selection": held_out[:2000],
        # Looked at while the demo's sizes were chosen, so they are no test of it any more.
        "paper": held_out[2000:4000],
        "test": held_out[4000:6000],
    }
