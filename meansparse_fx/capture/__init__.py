"""Floor 2: from a model to a `torch.fx` graph that computes the same thing, with every activation in sight."""

from .routes import ROUTES, Capture, capture

__all__ = ["ROUTES", "Capture", "capture"]
