"""Floor 5: do the attacks find an adversarial example that is there by construction?

The binarisation test of Zimmermann et al. (2022): behind the network's features, each image gets a linear readout of
its own that tells points near the image from one planted on the edge of its ball. A sound attack finds nearly all of
them, random search few. Knows a graph and what an attack may do; runs no attack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.readout import features_of, last_linear, with_readout
from .threat import AttackSettings, norm_per_image, per_image

IMAGES = 32
INNER = 200  # points of each ball that its readout takes for the image
CANDIDATES = 10  # points on the edge; the one that is easiest to tell from the inner ones is planted
CLIMBED = 150  # queries by which it is moved away from them
SEARCHED = 200  # points on the edge that random search looks at
CLOSENESS = 0.02  # of the planted point to its readout's boundary; 1 is the nearest of the inner ones
RIDGE = 1e-2  # of the features' mean variance


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """A network on which every image has an adversarial example.

    Attributes:
        model: Returns logits ``[N, K]``: class 0 for the image, class 1 for what was planted.
        images: ``[n, C, H, W]``, of class 0.
        plants: ``[n, C, H, W]``, in their balls, of class 1.
        random: ``[n]`` bool, where random search finds nothing.
    """

    model: nn.Module
    images: Tensor
    plants: Tensor
    random: Tensor

    @property
    def labels(self) -> Tensor:
        """``[n]``, all 0."""
        return torch.zeros(len(self.images), dtype=torch.long, device=self.images.device)


@torch.no_grad()
def plant(model: fx.GraphModule, images: Tensor, settings: AttackSettings) -> Planted | None:
    """Return the network with planted examples, or None where it has no linear layer on features ``[N, D]``.

    Args:
        images: ``[n, C, H, W]``.
    """
    if last_linear(model) is None:
        return None
    features, logits = features_of(model), model(images)
    if features(images).dim() != 2 or len(features(images)) != len(images):
        return None
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = [_readout(features, image, settings, generator) for image in images]
    weights, plants, inside, clean = (torch.stack(parts) for parts in zip(*chosen, strict=True))

    def value(x: Tensor) -> Tensor:
        return (features(x) * weights).sum(1)

    # Climbed by queries alone, so that neither a masked gradient nor an easy point makes the test an easy one.
    best = value(plants)
    for _ in range(CLIMBED):
        tried = _changed(plants, images, settings, generator)
        higher = (found := value(tried)) > best
        best = torch.where(higher, found, best)
        plants = torch.where(per_image(higher, plants), tried, plants)
    boundary = best - CLOSENESS * (best - torch.maximum(inside, clean))
    top = logits.topk(2).values
    margin = (top[:, 0] - top[:, 1]).mean()  # so that what follows the readout gets numbers as the network's own
    scale = (boundary - clean).clamp_min(1e-12)
    readout = _Readout(weights / scale.unsqueeze(1), boundary / scale, images, float(margin), logits.shape[1])
    planted = nn.Sequential(with_readout(model, readout))  # around it, for the graph's own hooks are the model's, too
    planted.register_forward_pre_hook(lambda _, inputs: readout.look(inputs[0].detach()))
    # Not of all images: rounding may have moved one, and not every ball has something to be told from the rest.
    right = planted(images).argmax(1).eq(0) & planted(plants).argmax(1).eq(1)
    if not right.any():
        return None
    random = [
        planted(_around(image, SEARCHED, settings, generator, edge=True)).argmax(1).eq(0).all()
        for image in images[right]
    ]
    return Planted(planted, images[right], plants[right], torch.stack(random))


def _readout(
    features: nn.Module, image: Tensor, settings: AttackSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights ``[D]``, a point on the edge, the largest of the inner points' values, and the image's value.

    Fisher's discriminant of each candidate against the inner points; that of the candidate farthest from them.
    """
    edge = _around(image, CANDIDATES, settings, generator, edge=True)
    inner = torch.cat([image[None], _around(image, INNER - 1, settings, generator, edge=False)])
    near, far = features(inner).double(), features(edge).double()
    centre = near.mean(0)
    covariance = (near - centre).T @ (near - centre) / INNER
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    covariance = covariance + ridge * torch.eye(len(covariance)).to(covariance)
    weights = torch.linalg.solve(covariance, (far - centre).T)  # [D, CANDIDATES]
    weights = weights / weights.norm(dim=0).clamp_min(1e-12)
    inside, value = near @ weights, (far * weights.T).sum(1)
    best = ((value - inside.amax(0)) / inside.std(0).clamp_min(1e-12)).argmax()
    return (
        weights[:, best].to(image.dtype),
        edge[best],
        inside[:, best].max().to(image.dtype),
        inside[0, best].to(image.dtype),
    )


def _changed(points: Tensor, images: Tensor, settings: AttackSettings, generator: torch.Generator) -> Tensor:
    """Return ``points`` ``[n, C, ...]`` of the balls around ``images``, a random square or cube of each anew."""
    count, channels, *sizes = points.shape if points.dim() > 2 else (len(points), 1, points.shape[1])
    delta = (points - images).view(count, channels, *sizes)
    side = max(1, int(min(sizes) * (0.05 + 0.45 * torch.rand((), generator=generator))))
    starts = [int(torch.randint(size - side + 1, (), generator=generator)) for size in sizes]
    square: tuple[Any, ...] = (..., *(slice(start, start + side) for start in starts))
    anew = torch.randn((count, channels, *[1] * len(sizes)), generator=generator).sign().to(points)
    if settings.norm == "Linf":
        delta[square] = settings.eps * anew
    else:
        delta[square] += settings.eps / side ** (len(sizes) / 2) * anew
        delta = delta * (settings.eps / norm_per_image(delta))
    delta = delta.view_as(points)
    return (images + delta).clamp(0, 1)


def _around(image: Tensor, count: int, settings: AttackSettings, generator: torch.Generator, edge: bool) -> Tensor:
    """Return random points ``[count, C, H, W]`` of an image's ball, on its edge or anywhere within."""
    shape = (count, *image.shape)
    if settings.norm == "Linf":
        delta = 2 * torch.rand(shape, generator=generator) - 1
        if edge:
            delta = delta.sign()
    else:
        delta = torch.randn(shape, generator=generator)
        delta = delta / norm_per_image(delta)
        if not edge:
            delta = delta * per_image(torch.rand(count, generator=generator), delta)
    return (image + settings.eps * delta.to(image)).clamp(0, 1)


class _Readout(nn.Module):
    """One linear layer an image: of that in whose ball each lies of the images that the network is about to read.

    Args:
        weights, offsets: ``[n, D]`` and ``[n]``.
        anchors: ``[n, C, H, W]``, the images themselves.
    """

    def __init__(self, weights: Tensor, offsets: Tensor, anchors: Tensor, margin: float, classes: int) -> None:
        super().__init__()
        self._weights, self._offsets, self._anchors = weights, offsets, anchors
        self._margin, self._classes = margin, classes

    def look(self, images: Tensor) -> None:
        """Note which images are next: attacks drop rows."""
        self._rows = nearest(images, self._anchors)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``[N, K]``: minus and plus half the margin, and far below them the other classes."""
        weights, offsets = (part[self._rows] for part in (self._weights, self._offsets))
        half = self._margin / 2 * ((features * weights.to(features.dtype)).sum(1) - offsets).unsqueeze(1)
        return torch.cat([-half, half, half.new_full((len(half), self._classes - 2), -5 * self._margin)], 1)


def nearest(images: Tensor, anchors: Tensor) -> Tensor:
    """Return for each image ``[N, C, H, W]`` the index of the nearest anchor ``[n, C, H, W]``."""
    return torch.cdist(images.flatten(1), anchors.flatten(1).to(images.dtype)).argmin(1)
