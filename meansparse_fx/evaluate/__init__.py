"""Floor 5: how robust a transformed model is against those who know the operator, beside its base.

`run` is the verb, `comparison` what it does with one batch; `plan` says which attacks are run and runs one, `attacks`
is their table, `descent` holds those of our own, `swift` makes them faster, `ledger` keeps results on disk, `outcome`,
`sanity` and `verdict` say what they mean.
"""

from .attacks import ATTACKS, VERSIONS, AttackSettings
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
    "ModelOutcome",
    "PairedDifference",
    "evaluate",
]
