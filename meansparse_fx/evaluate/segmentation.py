"""Floor 5: the base and the transformed model under the same attacks on label maps, an image counted by its pixels.

Every run attacks every image: none is broken as a whole. Labels are ``[N, H, W]``, -1 for pixels that are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..outputs import logits_of
from .comparison import OTHER, Advance, Comparison
from .ledger import Masks
from .outcome import IN_WORDS, TRANSFER, ModelOutcome, PairedDifference, mean
from .pixels import accuracy, counts, lowest, mean_iou
from .plan import Run, perturbed
from .probes import Probed, outputs
from .sanity import Check, check_chance, check_threat, checks_of
from .threat import AttackSettings


class PixelComparison(Comparison):
    """Both models under all runs, one batch after the other.

    Attributes:
        found: By number of the batch and by model, `counts` ``[N, 3, K]`` for ``clean`` and each run.
    """

    def attack_batch(self, batch: int, images: Tensor, labels: Tensor, sanity_images: int, advance: Advance) -> None:
        """Attack one batch, and look at the attacks themselves on its first ``sanity_images`` images."""
        name, images, labels = self._begin(batch, images, labels)
        scored: dict[str, dict[str, Masks]] = {}
        for which in OTHER:
            scored[which] = {"clean": self._score(name, which, "clean", labels, images.clone)}
            for run in self._runs:
                make = partial(self._perturbed, which, run, images, labels, self._settings)
                scored[which][run.name] = self._score(name, which, run.name, labels, make)
                advance()
        self.found[batch] = {}
        for which, other in OTHER.items():
            rows = {row: kept["counts"] for row, kept in scored[which].items()}
            if not self._runs:
                self.found[batch][which] = rows
                continue
            moved = self._score(name, which, TRANSFER, labels, partial(_worst_images, scored[other]))
            both = rows["clean"], moved["counts"]
            self.found[batch][which] = rows | {TRANSFER: lowest(both, both)}
        if sanity_images > 0:
            probed = Probed(images[:sanity_images], labels[:sanity_images])
            self._examine_both(batch, lambda which: self._probe(which, probed, batch))
        self._ledger.forget(name, "images")

    def _perturbed(self, which: str, run: Run, images: Tensor, labels: Tensor, settings: AttackSettings) -> Tensor:
        return perturbed(self._models[which].by(run), run, images, labels, settings)

    def _counts(self, which: str, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return counts(logits_of(self._models[which].model, images, labels), labels).cpu()

    def _score(self, name: str, which: str, row: str, labels: Tensor, make: Callable[[], Tensor]) -> Masks:
        def work() -> Masks:
            made = make().to(self._device)
            return {"counts": self._counts(which, made, labels), "images": made}

        return self._ledger.get_or_compute(f"{name}, {which}, {row}", work)

    def _probe(self, which: str, probed: Probed, batch: int) -> Masks:
        """Return masks of `probes`, and shares of pixels that an unbounded attack and twice the steps get wrong."""

        def left(run: Run, settings: AttackSettings) -> Tensor:
            made = self._perturbed(which, run, probed.images, probed.labels, settings)
            return accuracy(self._counts(which, made, probed.labels))

        settings, unbounded = self._settings, self._settings.unbounded(probed.images[0])
        more = replace(settings, steps=2 * settings.steps)
        each = {run.backward: run for run in self._runs}.values()
        again = replace(self._runs[-1], seed=self._runs[-1].seed + 1000)
        shares = [accuracy(row[: len(probed.images)]) for row in self.found[batch][which].values()]
        lower = torch.stack(shares).amin(0) - left(again, more)
        return {
            **outputs(self._models[which].model, probed, settings),
            "unbounded": 1 - torch.stack([left(run, unbounded) for run in each]).amin(0),
            "twice the steps": 1 - lower.clamp_min(0),
        }

    def outcomes(self) -> dict[str, ModelOutcome]:
        """Return what both models did."""
        found = {}
        for which in OTHER:
            batches = [rows[which] for _, rows in sorted(self.found.items())]
            joined = {row: torch.cat([rows[row] for rows in batches]) for row in batches[0]}
            shares = {row: accuracy(counted) for row, counted in joined.items()}
            miou = {row: mean_iou(counted) for row, counted in joined.items()}
            miou["worst case"] = mean_iou(lowest(list(joined.values()), list(joined.values())))
            found[which] = ModelOutcome(shares.pop("clean"), shares, miou)
        return found

    def checks(self, outcomes: Mapping[str, ModelOutcome]) -> list[Check]:
        """Return what the evaluation says about itself."""
        labelled = torch.cat([rows["base"]["clean"][:, 2] for _, rows in sorted(self.found.items())]).double()
        chance = labelled[:, labelled.sum(0).argmax()] / labelled.sum(1)
        clean = outcomes["base"].clean
        above = PairedDifference.of(chance, clean)
        finding = (
            f"{100 * mean(clean):.1f} % of the pixels right; the commonest label alone gets {100 * mean(chance):.1f} %"
        )
        found = [check_chance(above.low, above.high, len(labelled), finding)]
        found += check_threat(*(outcomes[which] for which in OTHER))
        for which, words in IN_WORDS.items():
            found += checks_of(words, self.examined(which), outcomes[which], self._runs)
        return found


def _worst_images(scored: Mapping[str, Masks]) -> Tensor:
    return lowest([kept["counts"] for kept in scored.values()], [kept["images"] for kept in scored.values()])
