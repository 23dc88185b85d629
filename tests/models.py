"""Models shared by tests, and the definition of the operator by itself."""

from __future__ import annotations

from torch import nn

from meansparse_fx.kernels import reference
from meansparse_fx.kernels.records import Options, Vectors


class Functional(nn.Module):
    """Wraps a function of the input as a model; built with what it needs as children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def mean_sparse(x, centre, threshold, channel_dim, activation="identity", constants=(), weight=None, *modes, **options):
    """Return act(s(x)) by the reference, of the arguments of `ops.mean_sparse`."""
    everything = Options(channel_dim, activation, tuple(constants), *modes, **options)
    return reference.operator(x, None, None, Vectors(centre, threshold, weight), everything)[0]
