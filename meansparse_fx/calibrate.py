"""Floor 5: measure each site's statistics with the instrumented graph, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, fx

from .errors import CalibrationError
from .operators import operators, require_transformed, set_statistics
from .passes import observe
from .progress import track
from .statistics import Statistics, fingerprint


def calibrate(
    sparse: fx.GraphModule,
    loader: Iterable[Any],
    *,
    progress: bool = True,
    metadata: dict[str, str] | None = None,
) -> Statistics:
    """Return the exact mean and deviation of every site's channels over the data, and set them in ``sparse``.

    The instrumented graph makes the base model's own calls, so alpha plays no part. A second calibration
    replaces the first; alpha keeps its value.

    Args:
        sparse: A transformed model in eval mode.
        loader: Yields batches of images ``[N, ...]``, alone or first in a tuple or list (labels are ignored).
        progress: Show a progress bar.
        metadata: Facts to keep with the statistics, such as what the data was.

    Raises:
        StateError: The model is not transformed, or in train mode.
        CalibrationError: The loader is empty, or a site saw NaN or inf.
    """
    require_transformed(sparse, "calibrate")
    observed, observers = observe(sparse)
    device = next(iter(operators(sparse).values())).mean.device
    images = 0
    total = len(loader) if isinstance(loader, Sized) else None
    with torch.inference_mode():
        for index, batch in enumerate(track(loader, "calibrate", total, progress)):
            batch = batch_images(batch).to(device, non_blocking=True)
            observed(batch)
            images += len(batch)
            # On a GPU the check would wait for every batch; there one look at the end must do.
            if device.type == "cpu":
                _refuse_non_finite(observers, f"batch {index}")
    if images == 0:
        raise CalibrationError("the loader yielded no images: nothing to calibrate on")
    _refuse_non_finite(observers, f"{images} images")
    statistics = Statistics(
        {name: observer.moments() for name, observer in observers.items()},
        fingerprint(sparse),
        images,
        {"torch": torch.__version__} | (metadata or {}),
    )
    set_statistics(sparse, statistics, check_weights=False)
    return statistics


def batch_images(batch: Any) -> Tensor:
    """Return the images of a loader's batch: the batch itself, or its first element."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(images, Tensor):
        raise CalibrationError(f"the loader yielded {type(images).__name__} where a tensor of images was expected")
    return images


def _refuse_non_finite(observers: dict, where: str) -> None:
    for name, observer in observers.items():
        if not (observer.mean.isfinite().all() and observer.m2.isfinite().all()):
            raise CalibrationError(f"{name}: NaN or inf in the site's input within {where}: check the data and weights")
