"""Models shared by tests."""

from __future__ import annotations

from torch import nn


class Functional(nn.Module):
    """Wraps a function of the input as a model; built with what it needs as children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)
