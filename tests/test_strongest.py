"""benchmarks.strongest: what the default left meets everything, and counts as left only if it survives both."""

from types import SimpleNamespace

import pytest
import torch

import meansparse_fx as msfx
from benchmarks import strongest
from benchmarks.page.markdown import render
from meansparse_fx.evaluate import ModelOutcome


def test_what_the_default_left_meets_everything(monkeypatch, tmp_path):
    images, labels = torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6)
    survived = {
        "default": ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]),
        "strongest": ([1, 0, 1, 1], [0, 1, 1, 0]),  # of the four that one of the two left
    }
    met = []

    def evaluate(sparse, test, checkpoint, **given):
        met.append((test[0].flatten().tolist(), test[1].tolist(), given.get("steps"), given.get("seed")))
        sides = (torch.tensor(side, dtype=torch.bool) for side in survived[checkpoint.suffix[1:]])
        base, own = (ModelOutcome(torch.ones(len(side), dtype=torch.bool), {"a": side}) for side in sides)
        return SimpleNamespace(base=base, sparse=own)

    monkeypatch.setattr(msfx, "evaluate", evaluate)
    monkeypatch.setattr(msfx, "set_alpha", lambda sparse, alpha: None)
    laboratory = SimpleNamespace(sparse=lambda name: None, images=lambda split: (images, labels))
    row = strongest.measure(laboratory, "ReLU", 0.4, 6, tmp_path)
    assert met == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], None, None), ([0, 1, 2, 3], [0, 1, 2, 3], 200, 1000)]
    assert (row.base, row.gain) == (pytest.approx(3 / 6), pytest.approx(0))
    # The base keeps 0 and 2 of 0, 1, 2; the other 1 of 0, 1, 3.
    assert (row.strongest_base, row.strongest_gain) == (pytest.approx(2 / 6), pytest.approx(-1 / 6))
    table = render("strongest.md", rows=[row])
    assert "| ReLU | 0.4 | 6 | 50.0 | +0.0 [" in table
    assert "| 33.3 | -16.7 [" in table
