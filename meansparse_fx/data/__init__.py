"""Floor 1: image data from the formats users have, as tensors in [0, 1]; one file a format.

Knows nothing of models or graphs. Imports errors, arguments and batches; torchvision for image folders and CIFAR's
Python batches, the only pickles that are read, if their checksums are CIFAR's.
"""

from .idx import load_idx, read_idx
from .image_set import ImageSet
from .load import load_images

__all__ = ["ImageSet", "load_idx", "load_images", "read_idx"]
