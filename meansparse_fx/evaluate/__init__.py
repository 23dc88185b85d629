"""Floor 5: how robust a transformed model is against those who know the operator, beside its base.

`run` is the verb, `comparison` what it does with one batch; `plan` says which attacks are run and runs one, `attacks`
is their table, `surrogates` that of the gradients they use, `descent` holds those of our own, `compiled` makes it fast;
`segmentation` is `comparison` for label maps, `pixels` their scores and losses;
`probes` and `planted` look at the attacks themselves; `ledger` keeps results on disk, `evidence` adversarial images;
`outcome`, `sanity` and `verdict` say what was found.
"""

from .attacks import ATTACKS, VERSIONS, AttackSettings
from .evidence import Evidence, Verification, external_evaluation, verify
from .outcome import ModelOutcome, PairedDifference
from .run import evaluate
from .sanity import Check
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
