"""Floor 5: the verb. Attack the base and the transformed model, batch by batch, and collect what is left of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arguments import autocast_dtype, items, whole
from ..artifacts import digest
from ..batches import as_batches, labelled, length
from ..errors import EvaluationError, StateError
from ..names import DEFAULT_ATTACKS
from ..operators import added, answers, get_alpha, operators, require_transformed
from ..outputs import Logits, in_words
from ..passes import restore, returning_logits
from ..progress import bar, say_resumed
from ..seen import image_marks
from ..shards import Ranks, file_of_rank, rank_and_world
from ..statistics import fingerprint
from .attacks import MAP_RUNS
from .batch import Batch, Comparison
from .evidence import Evidence
from .ledger import Ledger, model_identity
from .plan import AttackPlan, fitting, plan_runs
from .provenance import check_calibration, check_distinct, checks_of_choice, require_units
from .segmentation import PixelBatch
from .threat import AttackSettings
from .verdict import THREAT, Evaluation

SANITY_IMAGES = 100


def evaluate(
    sparse: fx.GraphModule,
    test: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    # The attacker.
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
    full_rows: bool = False,
    # What is compared, and kept.
    base: fx.GraphModule | None = None,
    logits: Logits = None,
    ignore_index: int = 255,
    sanity_images: int = SANITY_IMAGES,
    save_adversarial: str | Path | None = None,
    # How it is run.
    batch_size: int = 128,
    compile: bool | str | None = False,
    amp: torch.dtype | str | None = None,
    checkpoint: str | Path | None = None,
    group: Any = None,
    progress: bool = True,
) -> Evaluation:
    """Return how the transformed model and its base stand up to the same attacks on the same images.

    By default (``adaptive``) gradient attacks are run with the operator's own gradient and with surrogates of it; the
    base, which has no operator, gets as many tries from other random starts. Each model also meets the images found
    against the other (``transfer``), and attacks that start there. What is broken is left alone; the worst case counts
    an image only if it survives everything.

    Args:
        sparse: A transformed model in eval mode.
        test: ``(images, labels)`` tensors, a Dataset, or a loader of such batches: images ``[N, C, H, W]``, or other
            inputs ``[N, ...]``, in [0, 1], labels ``[N]``, or label maps ``[N, H, W]`` of a model that returns logits
            ``[N, K, H, W]`` (docs/segmentation.md); docs/data.md lists what else is understood. They should be images
            that neither calibration nor the choice of alpha saw.
        eps: Radius of the ball, in the units of the images.
        norm: ``Linf`` or ``L2``.
        attacks: Names from `ATTACKS`, each with its surrogate (``apgd-ce/annealed``) or to be run under each of
            ``backwards``; or names of lists of them: ``adaptive``, AutoAttack's ``standard``, ``plus``, ``rand``, of
            which is left out what needs images (Square) or more classes (targeted attacks) than there are. For label
            maps: ``pgd-masked``, ``pgd-balanced``, ``pgd-js``, which are then the default.
        backwards: Surrogates of the operator's gradient for attacks that name none: ``exact``, ``identity`` (BPDA),
            ``smooth`` or ``smooth-STEEPNESS``, ``annealed``.
        steps: Iterations of the gradient attacks.
        queries: Queries of the Square attack.
        seed: Of the attacks.
        full_rows: Attack with everything also what is broken already: more work for about the same worst case, and each
            row is that attack's own.
        base: To stand beside ``sparse``, in the place of the same model without its operators.
        logits: Where the logits are in what the model returns, if that is no tensor: a name, a position, or a function
            of it. By default ``logits``, ``out``, or the only tensor there is.
        ignore_index: Label of the pixels of label maps that are left out, of attacks as well.
        sanity_images: Images for the checks that the attacks work at all (`Evaluation.checks`); 0 leaves out those
            that need attacks of their own.
        save_adversarial: File for the adversarial images and what broke each: see `evidence`.
        batch_size: For tensors; a loader brings its own.
        compile: Attack through torch.compile, in a mode of its: True is ``default``; ``reduce-overhead`` replays CUDA
            graphs. What an attack found counts only if the model itself, not compiled and in its own precision, is
            wrong on it; so this may only cost the attacker a little.
        amp: Autocast the attacked model to bfloat16 or float16 (torch's dtype, or its name), with the same check of
            what was found.
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
    sanity_images = whole(sanity_images, "sanity_images", 0)
    batch_size = whole(batch_size, "batch_size", 1)
    amp = autocast_dtype(amp)
    if base is not None and not isinstance(base, fx.GraphModule):
        raise StateError("base must be a graph: msfx.restore(msfx.transform(model, images)) makes one of a model")
    planned = plan_runs(attacks, backwards, settings.seed)
    own = {"base": restore(sparse) if base is None else base, "sparse": sparse}
    models: dict[str, nn.Module] = {which: returning_logits(model, logits) for which, model in own.items()}
    data = labelled(test, batch_size, models["sparse"], ignore_index)
    first = next(data)
    require_units(sparse)
    if maps := first[1].dim() == 3:
        if save_adversarial is not None:
            raise EvaluationError("save_adversarial keeps what makes an image wrong: it cannot be used with label maps")
        if tuple(items(attacks)) == DEFAULT_ATTACKS:
            planned = plan_runs(MAP_RUNS, backwards, settings.seed)
    runs = fitting(planned, attacks, settings, models["sparse"], *first)
    if base is None and get_alpha(sparse) == 0:
        runs = []  # nothing to compare
    else:
        settings.warn_if_wide(first[0])
    plan = AttackPlan(runs, settings, full_rows, compile, amp)
    keep = save_adversarial is not None
    identity = model_identity(sparse, alpha=True) | plan.identity() | {
        "base": None if base is None else fingerprint(base),
        "sanity_images or save_adversarial": [sanity_images, keep],
        "logits": in_words(logits),
    }  # fmt: skip
    rank, world = rank_and_world(group)
    batches = length(as_batches(test, batch_size, pair=True))  # None where the data does not say
    path = None if checkpoint is None else file_of_rank(Path(checkpoint), rank, world)
    ledger = Ledger(path, identity, None if path is None else answers(sparse, added(sparse).shape))
    comparison = Comparison(models, plan, ledger, PixelBatch if maps else Batch, keep)
    with bar(progress and rank == 0) as display, ledger:
        if ledger.batches:
            say_resumed(display, "batch", ledger.batches, batches)
        # Of the first process, for both models.
        total = None if batches is None else math.ceil(batches / world) * 2 * len(runs)
        task = display.add_task("attack", total=total, note="")
        seen: list[str] = []
        marks: list[Tensor] = []
        for index, (images, labels) in enumerate(itertools.chain([first], data)):
            if index % world == rank:
                comparison.attack_batch(index, images, labels, sanity_images, lambda: display.advance(task))
                display.update(task, note=comparison.so_far())
            sanity_images = max(0, sanity_images - len(images))
            marks.append(image_marks(images).cpu())
            if world > 1:
                seen.append(digest(images, labels))
        ledger.require_whole(len(comparison.found))
    seconds = _unite(comparison, identity, seen, ledger.seconds, group)
    outcomes = comparison.outcomes()
    seen_marks = torch.cat(marks)
    if save_adversarial is not None and rank == 0:
        _evidence(comparison, sparse, models, settings).save(save_adversarial)
    return Evaluation(
        outcomes["base"],
        outcomes["sparse"],
        get_alpha(sparse),
        **{name: getattr(settings, name) for name in THREAT},
        seconds=seconds,
        cumulative=not (full_rows or maps),
        checks=(
            *comparison.checks(outcomes),
            check_distinct(seen_marks),
            *checks_of_choice(added(sparse).choice, settings, seen_marks),
            *check_calibration(sparse, first[0], seen_marks),
        ),
    )


def _evidence(
    comparison: Comparison, sparse: fx.GraphModule, models: Mapping[str, nn.Module], settings: AttackSettings
) -> Evidence:
    joined = {which: comparison.joined(f"{which} evidence") for which in models}
    return Evidence(
        joined["base"]["images"],
        joined["base"]["labels"],
        {which: found["adversarial"] for which, found in joined.items()},
        {which: found["broken_by"] for which, found in joined.items()},
        tuple(comparison.joined("sparse rows")),
        settings.eps,
        settings.norm,
        {which: fingerprint(model) for which, model in models.items()},
        get_alpha(sparse),
        {name: operator.switches() for name, operator in operators(sparse).items()},
    )


def _unite(comparison: Comparison, identity: dict[str, Any], seen: list[str], seconds: float, group: Any) -> float:
    """Give every process what all of them found, and return the seconds that the slowest of them took."""
    parts = Ranks(group, error=EvaluationError).gather((identity, seen, comparison.found, seconds), "end")
    for rank, part in enumerate(parts):
        if part[:2] != (identity, seen):
            raise EvaluationError(
                f"process {rank} evaluated another model, other images, or with other settings: every process must be "
                "given all images in the same order, and takes its share of the batches itself"
            )
    comparison.found = {batch: found for part in parts for batch, found in part[2].items()}
    return max(part[3] for part in parts)
