"""Floor 2: the placements of the published checkpoints, by name. Imports `plan` and floor 1 only.

The paper says "before every activation"; the checkpoints differ from that and from each other. What they do was read
off RobustBench 1.1.1 and is found here by data flow, so that a placement serves any model of the family.
"""

from __future__ import annotations

from ..errors import SiteError
from .plan import Placement, Site


def _branch_with_activation(site: Site) -> bool:
    """Take MLP branches and leave attention branches alone."""
    return site.kind != "residual_branch" or bool(site.inside)


_SUMS = Placement(kinds=("activation", "residual_sum"))

PLACEMENTS: dict[str, Placement] = {
    "activations": Placement(),
    # WideResNet-70-16 and -94-16: before each activation and after each residual sum.
    "robustbench:wrn": _SUMS,
    # RaWideResNet-70-16: the same; squeeze-and-excitation is a gate anyway.
    "robustbench:rawrn": _SUMS,
    # Swin-L: before GELU, at the end of the MLP branch, after both residual sums.
    "robustbench:swin": Placement(
        kinds=("activation", "residual_sum", "residual_branch"), predicate=_branch_with_activation
    ),
    # ConvNeXt-L: before GELU and at the end of the branch.
    "robustbench:convnext": Placement(kinds=("activation", "residual_branch"), predicate=_branch_with_activation),
    # RaWideResNet-101-2 on ImageNet: before each activation but the block's last, which follows the residual sum.
    "robustbench:rawrn-imagenet": Placement(predicate=lambda site: site.producer != "add"),
}


def placement_of(placement: Placement | str | None) -> Placement:
    """Return a placement given by name, itself, or the default.

    Raises:
        SiteError: No placement has that name.
    """
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise SiteError(f"no placement is called {placement!r}; there are {', '.join(PLACEMENTS)}")
        return PLACEMENTS[placement]
    if not isinstance(placement, Placement | None):
        raise SiteError(f"a placement is a Placement or one of {', '.join(PLACEMENTS)}, got {placement!r}")
    return placement or Placement()
