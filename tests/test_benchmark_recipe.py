"""RobustBench's own benchmark() takes a transformed model as it is (the recipe of docs/robustness.md)."""

from __future__ import annotations

import importlib
import importlib.util
from unittest import mock

import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.evaluate.attacks import AttackSettings, attack
from meansparse_fx.zoo.robustbench_compat import library

pytestmark = pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="needs robustbench")

IMAGES = 4


@pytest.fixture
def robustbench():
    library()
    return importlib.import_module("robustbench.eval")


@pytest.mark.slow
def test_benchmark_takes_the_transformed_model(robustbench, capsys):
    images, labels = (part[:100] for part in bundled.load_split("test"))
    sparse = msfx.transform(bundled.load_model(), images[:2])
    msfx.calibrate(sparse, [bundled.load_split("calibration")[0][:200]], progress=False)
    msfx.set_alpha(sparse, 0.3)
    msfx.set_backward(sparse, "identity")

    def left(eps):
        found = attack("pgd", sparse, images, labels, AttackSettings(eps=eps, steps=20))
        return sparse(found).argmax(1) == labels

    # Three that fall well inside the ball, to the first attack, which is quick; one that stands well beyond it.
    with torch.no_grad():
        right = sparse(images).argmax(1) == labels
        broken, standing = right & ~left(0.8 * bundled.EPS), right & left(1.1 * bundled.EPS)
    chosen = torch.cat([broken.nonzero()[:3, 0], standing.nonzero()[:1, 0]])
    images, labels = images[chosen], labels[chosen]
    code, alpha = sparse.code, msfx.get_alpha(sparse)
    with mock.patch.object(robustbench, "load_clean_dataset", return_value=(images, labels)):
        measured, robust = robustbench.benchmark(
            sparse, n_examples=IMAGES, dataset="cifar10", threat_model="Linf", eps=bundled.EPS, batch_size=IMAGES
        )
    assert (measured, robust) == (1, 0.25)
    assert "Adversarial accuracy" in capsys.readouterr().out
    assert (sparse.code, msfx.get_alpha(sparse)) == (code, alpha)
