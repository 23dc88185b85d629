"""Floor 1: what a user gives as data, as batches of images and labels.

The one place that looks at loaders, the layout of their batches, dtypes, ranges and labels: `calibrate`, `evaluate`,
`select_alpha` and the command line share it. Of a model it asks the dtype of its weights and the number of its logits.
Imports errors only.
"""

from .intake import Intake, cycled, examples, explaining_misfit, labelled
from .labels import class_numbers, out_of_range
from .loaders import BATCH_SIZE, IMAGE_KEYS, LABEL_KEYS, as_batches, collect_samples, count, length, nothing_in

__all__ = [
    "BATCH_SIZE", "IMAGE_KEYS", "LABEL_KEYS", "Intake", "as_batches", "class_numbers", "collect_samples", "count",
    "cycled", "examples", "explaining_misfit", "labelled", "length", "nothing_in", "out_of_range",
]  # fmt: skip
