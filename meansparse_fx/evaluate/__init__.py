"""Floor 5: how robust a transformed model is against those who know the operator, beside its base.

`run` is the verb. Attacking: `threat` is what an attacker may do, `plan` says which attacks are run and on what of a
model, `attacks` is their table, `surrogates` that of their gradients, `descent` holds those of our own.
`batch` is one model on one batch of images, and both models on all; `segmentation` the same for label maps;
`ledger` keeps results on disk, `evidence` adversarial images. Results: `outcome` is what one model did, with the
statistics of two; `verdict` is the comparison, its table and its sentences, `figures` its figure. Checks: `probes` and
`planted` look at the attacks themselves, `sanity` judges what they saw, `provenance` where the images came from.
"""

from .attacks import ATTACKS, VERSIONS
from .evidence import Evidence, Verification, external_evaluation, verify
from .outcome import ModelOutcome, PairedDifference
from .run import evaluate
from .sanity import Check
from .threat import AttackSettings
from .verdict import Evaluation

__all__ = [
    "ATTACKS",
    "VERSIONS",
    "AttackSettings",
    "Check",
    "Evaluation",
    "Evidence",
    "ModelOutcome",
    "PairedDifference",
    "Verification",
    "evaluate",
    "external_evaluation",
    "verify",
]
