"""Floor 1: image data from the formats users have, as tensors in [0, 1]; one file a format.

Knows nothing of models or graphs. Imports errors and batches; torchvision when an image folder is opened.
Nothing is ever unpickled, but for CIFAR's batches, by a reader that knows dictionaries and arrays only.
"""

from .idx import load_idx, read_idx
from .image_set import ImageSet
from .load import load_images

__all__ = ["ImageSet", "load_idx", "load_images", "read_idx"]
