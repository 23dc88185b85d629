"""Arguments in the forms that users give them: one string for several, arrays for tensors; what is none has a name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx.errors import DataError, EvaluationError, SiteError
from meansparse_fx.evaluate.attacks import AttackSettings, expand
from meansparse_fx.evaluate.plan import plan_runs


def taken(net, images, **placement):
    return {s.name for s in msfx.inspect(net, images, msfx.Placement(**placement)).active}


@pytest.mark.parametrize("text", ["relu_1", "gelu"])
def test_a_string_is_one_pattern(net, images, sites, text):
    assert taken(net, images, include=text) == taken(net, images, include=(text,)) == {text}
    assert taken(net, images, exclude=text) == taken(net, images, exclude=[text]) == {*sites} - {text}
    assert taken(net, images, kinds="activation") == {*sites}


def test_a_string_is_one_name(net, images, labels):
    assert plan_runs("pgd", "exact", 0) == plan_runs(("pgd",), ("exact",), 0)
    assert plan_runs("apgd-ce/annealed", (), 0) == plan_runs(("apgd-ce/annealed",), (), 0)
    assert expand("standard") == expand(["standard"])
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.flip(3), progress=False)
    options = {"attacks": "pgd", "backwards": "identity", "steps": 1, "progress": False}
    found = msfx.select_alpha(sparse, (images, labels), alphas=0.2, variants="edge", **options)
    assert (found.variant, set(found.outcomes)) == ("edge", {0.0, 0.2})
    assert msfx.evaluate(sparse, (images, labels), sanity_images=0, **options).n_test == len(images)


def test_placements_that_mean_nothing_are_refused(net, images):
    for wrong in ({"kinds": "sums"}, {"include": "*"}, {"exclude": (3,)}):
        with pytest.raises(SiteError, match=r"no kind|no regular expression"):
            msfx.Placement(**wrong)
    with pytest.raises(SiteError, match="a placement is"):
        msfx.inspect(net, images, ["activations"])


def test_example_images_in_other_forms(net, images, sites):
    expected = msfx.transform(net, images)(images)
    for given in (images.numpy(), images.double(), images.double().numpy(), images.half()):
        assert {s.name for s in msfx.inspect(net, given)} == {*sites}
        assert torch.equal(msfx.transform(net, given)(images), expected)
        assert msfx.cost(net, given).images == len(images)
    assert {s.name for s in msfx.inspect(net.double(), images)} == {*sites}


@pytest.mark.parametrize("kind", [tuple, list, dict, iter])
@pytest.mark.parametrize("verb", [msfx.inspect, msfx.transform, msfx.cost])
def test_example_images_that_are_none(net, images, verb, kind):
    batch = {"image": images} if kind is dict else kind((images, torch.zeros(12)))
    with pytest.raises(DataError, match=r"must be a tensor \[N, C, H, W\].* alone"):
        verb(net, batch)


@pytest.mark.parametrize("wrong", [[0.1], (0.1, 0.2), None, torch.ones(2), "much", 1j])
def test_alphas_that_are_no_number(net, images, wrong):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    for given in (wrong, {"relu": wrong}):
        with pytest.raises(ValueError, match=r"alpha.* must be a number"):
            msfx.set_alpha(sparse, given)
    assert msfx.get_alpha(sparse) == 0


@pytest.mark.parametrize("number", [0.25, "0.25", "1/4", np.float32(0.25), torch.tensor(0.25)])
def test_numbers_of_other_kinds(net, images, number):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    msfx.set_alpha(sparse, number)
    assert msfx.get_alpha(sparse) == 0.25
    assert AttackSettings(eps=number).eps == 0.25
    with pytest.raises((ValueError, EvaluationError)):
        AttackSettings(eps="8/0")
