"""Floor 5: one model on one batch of images, attack after attack: which images stand, and what broke the others.

`evaluate` compares two of them, the search for alpha looks at one a candidate. Results are kept in a ledger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .compiled import Attacked
from .ledger import Ledger, Masks
from .outcome import TRANSFER
from .plan import AttackPlan, Run, correct, perturbed


class Batch:
    """Which images of a batch one model has right, and what broke the others.

    Args:
        name: What the results are called in the ledger, ``batch 3, base``.
        attacked: The model.
        images, labels: On its device.
        clean: ``[N]`` bool, images that are right as they are; None asks the model.
        keep: The ledger keeps the adversarial images, too.

    Attributes:
        masks: ``clean`` and one an attack: correct after it; on the CPU.
        broken: ``[N]`` bool: wrong on the image itself or on one made of it.
        adversarial: ``[N, C, H, W]``, the first that broke each; the image itself where none did.
    """

    def __init__(
        self,
        name: str,
        attacked: Attacked,
        plan: AttackPlan,
        ledger: Ledger,
        images: Tensor,
        labels: Tensor,
        clean: Tensor | None = None,
        keep: bool = True,
    ) -> None:
        self._name, self._attacked, self._plan, self._ledger, self._keep = name, attacked, plan, ledger, keep
        self.images, self.labels = images, labels
        if clean is None:
            piece = f"{name}, clean"
            clean = ledger.get_or_compute(piece, lambda: {"clean": correct(attacked.model, images, labels)})["clean"]
        self.masks: dict[str, Tensor] = {"clean": clean}
        self.broken, self.adversarial = ~clean, images.clone()
        self._by = torch.where(clean, -1, 0)

    def attack(self, run: Run, among: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Let one run attack what stands, or what of it is ``among`` ``[N]``, from ``starts`` ``[N, C, H, W]``."""

        def make(at: Tensor) -> Tensor:
            begin, settings = None if starts is None else starts[at], self._plan.settings
            return perturbed(self._attacked.by(run), run, self.images[at], self.labels[at], settings, begin)

        self._meet(run.name, among, make)

    def transfer(self, among: Tensor, found: Tensor) -> None:
        """Show what stands of ``among`` ``[N]`` the images ``found`` ``[N, C, H, W]`` that broke another model."""
        self._meet(TRANSFER, among, lambda at: found[at])

    def _meet(self, name: str, among: Tensor | None, make: Callable[[Tensor], Tensor]) -> None:
        standing = self.masks["clean"] if self._plan.full_rows else ~self.broken
        target = standing if among is None else standing & among
        device = self.images.device

        def work() -> Masks:
            at = target.to(device)
            made = make(at)
            right = correct(self._attacked.model, made, self.labels[at])
            survived = {"survived": torch.zeros_like(at).masked_scatter(at, right)}
            first = ~right & ~self.broken.to(device)[at]
            return survived | ({"images": made[first]} if self._keep else {})

        known = self._ledger.get_or_compute(f"{self._name}, {name}", work)
        newly = target & ~known["survived"] & ~self.broken
        self.masks[name] = known["survived"] | (standing & ~target)
        self.broken = self.broken | newly
        self._by[newly] = len(self.masks) - 1
        if "images" in known:  # not of a batch that was done with before
            self.adversarial[newly.to(device)] = known["images"].to(self.images)

    def evidence(self) -> dict[str, Tensor]:
        """Return the batch, its adversarial images, and the number of the row that broke each: 0 clean, -1 none."""
        batch = {"images": self.images.cpu(), "labels": self.labels.cpu()}
        return batch | {"adversarial": self.adversarial.cpu(), "broken_by": self._by}
