"""Floor 5: the verb. Attack the base and the transformed model, batch by batch, and collect what is left of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..batches import as_batches, labelled, length
from ..errors import EvaluationError
from ..operators import get_alpha, require_transformed
from ..progress import bar
from ..shards import gather, own_file, place
from .attacks import AttackSettings
from .comparison import Comparison
from .ledger import Ledger, digest, model_identity
from .plan import plan_runs
from .sanity import check_balls
from .verdict import Evaluation

DEFAULT_ATTACKS = ("apgd-ce", "square")
SANITY_IMAGES = 100


def evaluate(
    sparse: fx.GraphModule,
    test: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 100,
    queries: int = 5000,
    batch_size: int = 128,
    seed: int = 0,
    skip_broken: bool = False,
    sanity_images: int = SANITY_IMAGES,
    compile: bool = False,
    amp: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    group: Any = None,
    progress: bool = True,
) -> Evaluation:
    """Return how the transformed model and its base stand up to the same attacks on the same images.

    Gradient attacks are run once for each backward mode; the base, which has no operator, gets as many tries
    from other random starts. Each model also meets the images found against the other (``transfer``). The
    worst case counts an image only if it survives everything.

    Args:
        sparse: A transformed model in eval mode.
        test: ``(images, labels)`` tensors, a Dataset, or a loader of such batches: images ``[N, C, H, W]`` in [0, 1],
            labels ``[N]``; docs/data.md lists what else is understood. They should be images that neither
            calibration nor the choice of alpha saw.
        eps: Radius of the ball, in the units of the images.
        norm: ``Linf`` or ``L2``.
        attacks: Names from `ATTACKS`, or of AutoAttack's versions: ``standard``, ``plus``, ``rand``.
        backwards: Modes of the operator's backward; ``identity`` is BPDA, the attacker who knows.
        steps: Iterations of the gradient attacks.
        queries: Queries of the Square attack.
        batch_size: For tensors; a loader brings its own.
        seed: Of the attacks.
        skip_broken: Attack only images that no attack before has broken: the same worst case for less work, but rows
            that are no longer each attack's own.
        sanity_images: Images for the checks that the attacks work at all (`Evaluation.checks`); 0 leaves out those
            that need attacks of their own.
        compile: Attack through torch.compile. What an attack found counts only if the model itself, not compiled and in
            its own precision, is wrong on it; so this may only cost the attacker a little.
        amp: Autocast the attacked model to bfloat16 or float16, with the same check of what was found.
        checkpoint: File to keep results in as they come; if it exists, go on from it. It stays: remove it when the
            result is saved. The loader must yield the same images in the same order each time. A resumed run ends as
            an uninterrupted one would, as far as the device computes the same thing twice. Several processes have
            ``PATH.rank0-of-2`` and so on.
        group: Of torch.distributed: each of its processes attacks every so-manieth batch, and all return the whole.
            Each must be given the same images and labels, in the same order.
        progress: Show a progress bar.

    Raises:
        StateError: The model is not transformed, or in train mode.
        EvaluationError: No images, images or labels that cannot be used (DataError), an attack that cannot be run or
            left its ball, or a checkpoint of another run.
    """
    require_transformed(sparse, "evaluate")
    settings = AttackSettings(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)
    runs = plan_runs(attacks, backwards, seed)
    identity = model_identity(sparse, alpha=True) | {
        "attack settings": [f"{settings}", skip_broken, sanity_images, compile, str(amp)],
        "attacks or backwards": [run.name for run in runs],
    }
    rank, world = place(group)
    ledger = Ledger(None if checkpoint is None else own_file(Path(checkpoint), rank, world), identity)
    comparison = Comparison(sparse, runs, settings, ledger, skip_broken, compile, amp)
    with bar(progress and rank == 0) as display, ledger:
        task = display.add_task("attack", total=_count(test, batch_size, 2 * len(runs), world), note="")
        seen: list[str] = []
        for index, (images, labels) in enumerate(labelled(test, batch_size, sparse)):
            if index % world == rank:
                comparison.meet(index, images, labels, sanity_images, lambda: display.advance(task))
                display.update(task, note=comparison.so_far())
            sanity_images = max(0, sanity_images - len(images))
            if world > 1:
                seen.append(digest(images, labels))
        ledger.require_whole(comparison.met)
    seconds = _unite(comparison, identity, seen, ledger.seconds, group)
    outcomes = comparison.outcomes()
    return Evaluation(
        base=outcomes["base"],
        sparse=outcomes["sparse"],
        alpha=get_alpha(sparse),
        eps=eps,
        norm=norm,
        steps=steps,
        queries=queries,
        seed=seed,
        seconds=seconds,
        cumulative=skip_broken,
        checks=(*comparison.checks(outcomes), check_balls(comparison.made)),
    )


def _count(test: Any, batch_size: int, runs: int, world: int) -> int | None:
    """Return how many attacks on batches the first process will make, if the data says how many batches it has."""
    found = length(as_batches(test, batch_size, pair=True))
    return None if found is None else math.ceil(found / world) * runs


def _unite(comparison: Comparison, identity: dict[str, Any], seen: list[str], seconds: float, group: Any) -> float:
    """Give every process what all of them found, and return the seconds that the slowest of them took."""
    if group is None:
        return seconds
    try:
        parts = gather((identity, seen, comparison.found, comparison.sanity, comparison.made, seconds), group)
    except RuntimeError as error:  # what torch.distributed raises when a peer is gone
        raise EvaluationError(
            f"lost another process ({str(error).splitlines()[0]}). Checkpoints, if asked for, are kept: start again"
        ) from error
    for rank, part in enumerate(parts):
        if part[:2] != (identity, seen):
            raise EvaluationError(
                f"process {rank} evaluated another model, other images, or with other settings: every process must be "
                "given all images in the same order, and takes its share of the batches itself"
            )
    comparison.found = {batch: masks for part in parts for batch, masks in part[2].items()}
    comparison.sanity = {batch: masks for part in parts for batch, masks in part[3].items()}
    comparison.made = sum(part[4] for part in parts)
    return max(part[5] for part in parts)
