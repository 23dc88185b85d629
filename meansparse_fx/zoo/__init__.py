"""Floor 5: from a short text to a model."""

from .models import Normalised, input_shape, load_model
from .weights import load_weights

__all__ = ["Normalised", "input_shape", "load_model", "load_weights"]
