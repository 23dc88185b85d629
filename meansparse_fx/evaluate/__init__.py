"""Floor 5: how robust a transformed model is against those who know the operator, beside its base."""

from .attacks import ATTACKS, AttackSettings
from .outcome import Evaluation, ModelOutcome, PairedDifference
from .run import evaluate

__all__ = ["ATTACKS", "AttackSettings", "Evaluation", "ModelOutcome", "PairedDifference", "evaluate"]
