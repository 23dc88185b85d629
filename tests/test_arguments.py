"""Arguments in the forms that users give them: one string for several, arrays for tensors; what is none has a name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx.arguments import autocast_dtype, items, number, whole
from meansparse_fx.errors import (
    ArgumentError,
    CalibrationError,
    DataError,
    EvaluationError,
    MeanSparseError,
    SiteError,
    StateError,
)
from meansparse_fx.evaluate import plan
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


def test_an_array_of_no_dimension_is_one_item():
    assert [items(one) for one in (np.array(4), torch.tensor(4), 4, "4")] == [(4,), (4,), (4,), ("4",)]


def test_whole_numbers_in_every_form():
    assert [whole(one, "steps") for one in ("8/2", "4.0", 4.0, np.int64(4), torch.tensor(4), "4")] == [4] * 6
    assert whole("12345678901234567891", "seed") == 12345678901234567891


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


@pytest.mark.parametrize(
    "wrong", [1e39, "1e39", -1, float("nan"), float("inf"), "x", torch.tensor(0.3, requires_grad=True)]
)
def test_alphas_that_no_operator_can_have(net, images, labels, wrong):
    sparse = msfx.transform(net, images)
    statistics = msfx.calibrate(sparse, images, progress=False)
    data, quick = (images, labels), {"attacks": "pgd", "steps": 1, "progress": False}
    compiled = torch.compile(net, backend="meansparse", options={"statistics": statistics, "alpha": wrong})
    for refused in (
        lambda: msfx.set_alpha(sparse, wrong),
        lambda: msfx.set_alpha(sparse, {"relu": 0.1, "slope": wrong}),
        lambda: msfx.transform(net, images, statistics=statistics, alpha=wrong),
        lambda: msfx.select_alpha(sparse, data, alphas=[0.1, wrong], **quick),
        lambda: msfx.select_alpha(sparse, data, alphas=0.1, per_site=True, site_alphas=[wrong], **quick),
    ):
        with pytest.raises(ArgumentError, match=r"alpha.* (must be finite and not negative|must be a number)"):
            refused()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ArgumentError: alpha.* must be"):
        compiled(images)
    assert msfx.get_alpha(sparse) == 0  # of the mapping nothing was set


@pytest.mark.parametrize("number", [0.25, "0.25", "1/4", np.float32(0.25), torch.tensor(0.25)])
def test_numbers_of_other_kinds(net, images, number):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    msfx.set_alpha(sparse, number)
    assert msfx.get_alpha(sparse) == 0.25
    assert AttackSettings(eps=number).eps == 0.25
    with pytest.raises((ValueError, EvaluationError)):
        AttackSettings(eps="8/0")


def test_precisions_and_norms_by_name(net, images, labels):
    assert [autocast_dtype(name) for name in (None, "bfloat16", "bf16", "torch.float16", torch.float16)] == [
        *(None, torch.bfloat16, torch.bfloat16, torch.float16, torch.float16)
    ]
    for wrong in ("float17", "float32", torch.float32, True, 16):
        with pytest.raises(ValueError, match=r"amp must be torch\.bfloat16"):
            autocast_dtype(wrong)
    assert {AttackSettings(0.1, norm).norm for norm in ("linf", "Linf", "LINF ")} == {"Linf"}
    assert AttackSettings(0.1, "l2").norm == "L2"
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.flip(3), progress=False, amp="bfloat16")
    msfx.set_alpha(sparse, 0.2)
    options = {"norm": "l2", "amp": "bf16", "attacks": "pgd", "steps": "1", "progress": False, "batch_size": 12.0}
    result = msfx.evaluate(sparse, (images, labels), sanity_images=np.int64(0), **options)
    assert (result.norm, result.steps) == ("L2", 1)
    assert msfx.select_alpha(sparse, (images, labels), alphas="0.2", clean_budget="1/2", **options).threat.norm == "L2"


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        *(
            (msfx.evaluate, {name: value})
            for name in ("steps", "queries", "batch_size")
            for value in (0, 2.5, "x", None)
        ),
        *((msfx.evaluate, {name: value}) for name in ("seed", "sanity_images") for value in (2.5, "x", None)),
        *((msfx.evaluate, {name: value}) for name in ("attacks", "backwards") for value in (None, 5, [])),
        (msfx.evaluate, {"sanity_images": -1}),
        (msfx.evaluate, {"base": torch.nn.ReLU()}),
        *((msfx.select_alpha, {name: value}) for name in ("attacked", "rungs") for value in (0, 2.5, "x")),
        *((msfx.select_alpha, {name: [value]}) for name in ("alphas", "site_alphas") for value in (-1, "x", np.nan)),
        *((msfx.select_alpha, {"clean_budget": value}) for value in (-0.1, 3, "x", None)),
        *((msfx.select_alpha, {"significance": value}) for value in (0, 1, "x")),
        *((msfx.select_alpha, {"variants": value}) for value in ((), "sharp", None)),
        (msfx.select_alpha, {"per_site": 5}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_what_means_nothing_is_refused_before_the_work(net, images, labels, verb, wrong, monkeypatch):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    msfx.set_alpha(sparse, 0.2)
    monkeypatch.setattr(plan, "attack", None)
    with pytest.raises((ValueError, MeanSparseError)):
        verb(sparse, (images, labels), **{"attacks": "pgd", "progress": False} | wrong)


@pytest.mark.parametrize("wrong", [{"tolerance": "x"}, {"every": None}, {"timeout": "x"}, {"metadata": "x"}])
def test_calibrations_that_mean_nothing_are_refused(net, images, wrong):
    with pytest.raises((ValueError, CalibrationError), match="must be"):
        msfx.calibrate(msfx.transform(net, images), images, progress=False, **wrong)


def test_numbers_come_back_as_they_were_typed(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    for typed in (np.float32(0.1), torch.tensor(0.1), np.array(0.1), "0.1"):
        msfx.set_alpha(sparse, typed)
        assert msfx.get_alpha(sparse) == 0.1
    fraction = torch.tensor(8 / 255)  # no short decimal
    assert number(fraction, "eps") == fraction.item()
    assert msfx.get_alpha(sparse, by_site=True) == dict.fromkeys(msfx.operators(sparse), 0.1)
    msfx.set_backward(sparse, "smooth", "3")
    with pytest.raises(ValueError, match="steepness must be a number"):
        msfx.set_backward(sparse, "smooth", "steep")


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (lambda images: images[:, :1], r"three of one"),
        (lambda images: images.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
        (lambda images: images[:, 0], r"unsqueeze\(1\)"),
        (lambda images: images[:, :, :0], r"expected floats \[N, C, H, W\]|the model fails on images"),
        (lambda images: images.to_sparse(), r"sparse_coo hold no plain values"),
        (lambda images: images.to("meta"), "the meta device"),
        (
            lambda images: torch.nested.nested_tensor(list(images), layout=torch.jagged),
            r"several sizes \(nested\) hold no",
        ),
    ],
)
def test_images_that_the_model_cannot_run(net, images, labels, given, cure):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images, progress=False)
    msfx.set_alpha(sparse, 0.2)
    with pytest.raises(DataError, match=cure):
        msfx.evaluate(sparse, [(given(images), labels)], progress=False)
    with pytest.raises(DataError, match=r"the model fails on images|permute|unsqueeze|no plain values|expected floats"):
        msfx.calibrate(sparse, [given(images)], progress=False)


def test_one_image_and_a_model_without_weights(net, images, labels):
    sparse = msfx.transform(net, images)
    with pytest.raises(DataError, match=r"images\[None\], labels\[None\]"):
        msfx.evaluate(sparse, (images[0], labels[0]), progress=False)
    with pytest.raises(StateError, match="on the meta device"):
        msfx.calibrate(sparse.to("meta"), images, progress=False)
