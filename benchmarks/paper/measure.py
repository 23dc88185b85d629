"""Measure cells: each network once, each attack once, whatever tables ask for them; killed at any moment it goes on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.alpha.halving import Candidate, Trials
from meansparse_fx.data import load_idx
from meansparse_fx.evaluate import AttackSettings, ModelOutcome, PairedDifference
from meansparse_fx.evaluate.ledger import Ledger, model_identity
from meansparse_fx.evaluate.outcome import mean
from meansparse_fx.evaluate.plan import AttackPlan, plan_runs
from meansparse_fx.operators import operators
from meansparse_fx.progress import bar

from ..harness import Row
from .tables import NETWORKS, TABLES, Cell
from .training import subsets, trained

BATCH = 250
QUERIES = 1000
Data = tuple[Tensor, Tensor]  # images and labels


def interval(difference: PairedDifference, estimate: str, ends: str = "") -> dict[str, float]:
    """Return a difference of accuracies as columns: of the name ``estimate``, and of its 95 % interval."""
    return {estimate: difference.estimate, f"{ends}low": difference.low, f"{ends}high": difference.high}


def changes(base: ModelOutcome, own: ModelOutcome) -> dict[str, Any]:
    """Return the columns of attacked accuracy.

    ``own``: under attacks by the operator's own gradient, or by queries. ``worst``: after attacks by those who know the
    operator, on what was left; not there where no gradient is used. ``_change``: against the base under the same
    attacks, ``_low`` and ``_high``: its 95 % interval.
    """
    found: dict[str, Any] = {"attacked": len(own.worst), "torch": torch.__version__}
    compared = {"own": (base.worst, own.worst)}
    if any("/" in name for name in own.robust):  # some attacks use gradients
        compared = {"own": (base.worst_of("/exact"), own.worst_of("/exact")), "worst": (base.worst, own.worst)}
    for which, (before, after) in compared.items():
        found[which] = mean(after)
        found |= interval(PairedDifference.of(before, after), f"{which}_change", f"{which}_")
    return found


@contextmanager
def on_images(
    sparse: fx.GraphModule, data: Data, attacked: int, attacks: Sequence[str], settings: AttackSettings, path: Path
) -> Iterator[Trials]:
    """Yield what attacks candidates on the first ``attacked`` images, by ``attacks`` that need no other model to start.

    Their results are kept at ``path``, for these images, attacks and settings alone.
    """
    runs = [run for run in plan_runs(attacks, (), settings.seed) if not run.kind.started]
    identity = model_identity(sparse, alpha=False) | {"settings": f"{settings}", "attacks": [run.name for run in runs]}
    batches = list(zip(*(part.split(BATCH) for part in data), strict=True))
    with Ledger(path, identity) as ledger:
        yield Trials(sparse, batches, attacked, AttackPlan(runs, settings), ledger)


class Laboratory:
    """Networks, images and what was measured so far.

    Args:
        data: Directory of Fashion-MNIST's IDX files; None takes the bundled network and images, and knows GELU alone.
        cache_dir: Keeps trained networks, statistics and the attacks' results.
        attacked: Images to attack.
        steps: Replaces each attack's steps, if given.

    Attributes:
        sparse: Of a network's name: it, transformed and calibrated; one object, whatever is set on it.
        images: Of a split's name: images that neither training nor calibration saw, and labels.
    """

    def __init__(self, data: Path | None, cache_dir: Path, attacked: int, steps: int | None = None) -> None:
        self._data, self._attacked, self._steps = data, attacked, steps
        self._cache = cache_dir if data is not None else cache_dir / "bundled"
        self._cache.mkdir(parents=True, exist_ok=True)
        self.sparse: Callable[[str], fx.GraphModule] = cache(self._make)
        self.images: Callable[[str], Data] = cache(self._load)

    def rows(self, number: int, column: str) -> list[Row]:
        """Return the rows of one column of a table."""
        cells = [cell for cell in TABLES[number].cells if cell.column == column]
        rows = []
        with bar() as shown:
            task = shown.add_task(f"table {number}", total=len(cells), note=column)
            for cell in cells:
                base, own, threat = self._outcome(cell, 0.0), self._outcome(cell, cell.alpha), cell.threat
                row = Row(table=number, row=cell.row, column=cell.column, alpha=cell.alpha, network=cell.network)
                row |= {"sites": " ".join(map(str, cell.sites)), "centre": cell.centre, "split": cell.split}
                row |= {"attacks": " ".join(threat.attacks), "norm": threat.norm, "eps": threat.eps}
                row |= {"steps": self._steps or threat.steps, "images": len(own.clean), "clean": mean(own.clean)}
                rows.append(row.but(**changes(base, own)))
                shown.advance(task)
        return rows

    def _outcome(self, cell: Cell, alpha: float) -> ModelOutcome:
        sparse, threat = self.sparse(cell.network), cell.threat
        names = list(operators(sparse))
        on = {names[i]: alpha for i in cell.sites}
        msfx.set_variant(sparse, "mean", centre=cell.centre)
        settings = AttackSettings(threat.eps, threat.norm, self._steps or threat.steps, QUERIES)
        attacks = (attack.replace("/", ".") for attack in threat.attacks)
        key = (cell.network, cell.split, cell.centre, *attacks, threat.norm, f"{threat.eps:g}", settings.steps)
        path = self._cache / f"{'-'.join(map(str, key))}.safetensors"
        with on_images(sparse, self.images(cell.split), self._attacked, threat.attacks, settings, path) as trials:
            # One number where it is the same everywhere: the base is one candidate, whichever sites a cell is about.
            setting = Candidate(alpha if len(on) == len(names) or not alpha else dict.fromkeys(names, 0.0) | on)
            return trials.attack(setting, trials.attacked)

    def _make(self, network: str) -> fx.GraphModule:
        model, images = self._network(network)
        sparse = msfx.transform(model, images[:2])
        path = self._cache / f"{network}.statistics.safetensors"
        if not path.exists():
            msfx.calibrate(sparse, images.split(BATCH)).save(path)
        msfx.set_statistics(sparse, path)
        return sparse

    def _network(self, network: str) -> tuple[nn.Module, Tensor]:
        """Return a network and the images it is calibrated on."""
        if self._data is None:
            if network != "GELU":
                raise SystemExit(f"{network}: only the bundled network is at hand without --data")
            return bundled.load_model().requires_grad_(False), bundled.load_split("calibration")[0]
        load = partial(load_idx, self._data, "train")
        return trained(NETWORKS[network], load, self._cache), load()[0]

    def _load(self, split: str) -> Data:
        """Return 2,000 images, none of them in the bundled selection and test sets."""
        if self._data is None:
            return bundled.load_split({"train": "calibration", "test": "selection"}[split])
        sets = {name: load_idx(self._data, file) for name, file in (("train", "train"), ("test", "t10k"))}
        index = subsets(len(sets["train"][0]), len(sets["test"][0]))[{"train": "calibration", "test": "paper"}[split]]
        images, labels = sets[split]
        return images[index], labels[index]
