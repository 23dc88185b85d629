"""Images that were seen before are noticed, whatever they come from; a few that a data set has twice are not minded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx import seen
from meansparse_fx.errors import EvaluationError, StatisticsError
from meansparse_fx.evaluate.attacks import AttackSettings
from meansparse_fx.evaluate.provenance import (
    check_calibration,
    check_distinct,
    checks_of_choice,
    hexadecimal,
    require_units,
)
from meansparse_fx.operators import added
from meansparse_fx.statistics import Statistics

QUICK: dict = {"steps": 1, "attacks": "pgd/exact", "progress": False}


def some_images(seed, count=12):
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def labelled(net, images):
    return images, net(images).argmax(1)


def checked(sparse, test, name, **options):
    result = msfx.evaluate(sparse, test, sanity_images=0, **QUICK | options)
    return next((check.passed, check.finding) for check in result.checks if check.name == name)


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.split(5), progress=False)
    msfx.set_alpha(sparse, 0.2)
    return sparse


def test_marks_are_of_what_is_seen():
    images = (some_images(0) * 255).round() / 255  # as files of 8 bits have them
    marks = seen.image_marks(images)
    assert len(marks.unique()) == 12
    for same in (images.double(), images.contiguous(memory_format=torch.channels_last), images + 1e-7):
        assert torch.equal(seen.image_marks(same), marks)
    bytes_ = (images * 255).to(torch.uint8)
    assert torch.equal(seen.image_marks(bytes_.double() / 255), seen.image_marks(bytes_ / 255))
    moved = images.clone()
    moved[0, 0, 0, [0, 1]] = moved[0, 0, 0, [1, 0]]  # the same values in another place
    assert (seen.image_marks(moved) != marks).tolist() == [True] + [False] * 11
    assert len(seen.image_marks(images[:0])) == 0
    large = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    marks = seen.image_marks(large)
    assert torch.equal(seen.image_marks(large.contiguous(memory_format=torch.channels_last)), marks)
    large[1] = large[1].flip(2)
    large[2, :, :16, :16] = 0.5
    assert (seen.image_marks(large) == marks).tolist() == [True, False, False]


def test_marks_are_the_same_in_any_batch_however_large_the_values_are():
    images = 255 * torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([seen.image_marks(part) for part in images.split(5)]), seen.image_marks(images))


def test_of_many_images_a_sample_tells(monkeypatch):
    monkeypatch.setattr(seen, "MOST_MARKS", 500)
    marks = seen.image_marks(torch.rand(4000, 8, generator=torch.Generator().manual_seed(0)))
    known = seen.least_marks([marks[:1000], marks[1000:2000]])
    assert len(known) == 500
    assert seen.known_share(known, marks[:2000]) == 1
    assert seen.known_share(known, marks[2000:]) == 0
    assert seen.known_share(known, marks[1000:3000]) == pytest.approx(0.5, abs=0.08)
    assert seen.known_share(seen.least_marks([]), marks) == 0


def test_tensors_that_were_calibrated_on_are_noticed(net, images, sparse, tmp_path):
    msfx.save(sparse, tmp_path / "s")
    for model in (sparse, msfx.load(tmp_path / "s", net, images)):
        passed, finding = checked(model, labelled(net, torch.cat([images[8:], some_images(5, 6)])), "calibration data")
        assert not passed
        assert finding.startswith("4 of these images were calibrated on")
        assert checked(model, labelled(net, some_images(5)), "calibration data")[0]
    with pytest.warns(UserWarning, match="12 of these images were calibrated on"):
        msfx.select_alpha(sparse, labelled(net, images), alphas=0.2, **QUICK)


def test_a_few_in_common_are_said_and_pass(net, images, sparse):
    passed, finding = checked(sparse, labelled(net, torch.cat([some_images(5, 399), images[:2]])), "calibration data")
    assert passed
    assert "2 of these images were calibrated on" in finding


def test_the_search_remembers_its_images(net, sparse, tmp_path):
    held_out, others = labelled(net, some_images(6)), labelled(net, some_images(7))
    search = msfx.select_alpha(sparse, held_out, alphas=(0.1, 0.2), **QUICK)
    for alpha in (0.15, search.leader or 0.1):  # set by hand, without search.apply
        msfx.set_alpha(sparse, alpha)
        passed, finding = checked(sparse, held_out, "unseen images")
        assert not passed
        assert finding.startswith("12 of 12 images were used to choose alpha")
        assert checked(sparse, others, "unseen images")[0]
    msfx.save(sparse, tmp_path / "s")
    assert not checked(msfx.load(tmp_path / "s", net, held_out[0]), held_out, "unseen images")[0]


@pytest.mark.parametrize(("repeats", "passed"), [(0, True), (1, True), (2, False)])
def test_images_that_come_twice(net, sparse, repeats, passed):
    images = some_images(8, 250)
    found = checked(sparse, labelled(net, torch.cat([images, images[:repeats]])), "distinct images")
    assert found[0] == passed
    assert found[1].startswith(f"{repeats} of {250 + repeats} images equal another")


def test_statistics_of_the_same_tensors_do_not_merge(net, images, tmp_path):
    parts = []
    for part in (images[:8], images[4:], some_images(9)):
        sparse = msfx.transform(net, images)
        msfx.calibrate(sparse, part, progress=False).save(tmp_path / "s")
        parts.append(Statistics.load(tmp_path / "s"))
    with pytest.raises(StatisticsError, match="50 % of the images of one are in the other"):
        parts[0].merge(parts[1])
    merged = parts[0].merge(parts[2])
    assert len(merged.marks) == 20
    with pytest.raises(StatisticsError, match="100 %"):
        merged.merge(parts[2])


def test_a_resumed_calibration_knows_its_first_images(net, images, tmp_path):
    kept = tmp_path / "c"
    sparse = msfx.transform(net, images)
    whole = msfx.calibrate(sparse, images.split(4), progress=False)

    def killed():
        yield from images.split(4)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        msfx.calibrate(sparse, killed(), checkpoint=kept, every=0, progress=False)
    again = msfx.calibrate(sparse, iter(images.split(4)), checkpoint=kept, every=0, progress=False)
    assert torch.equal(again.marks, whole.marks)
    assert len(whole.marks) == 12


@pytest.mark.parametrize(("of", "passed"), [(200, True), (199, False)])
def test_one_image_in_two_hundred_may_be_the_same(sparse, images, of, passed):
    """As another of its set, as one that was calibrated on, as one that alpha was chosen by."""
    marks = torch.arange(of)
    assert check_distinct(torch.cat([marks[1:], marks[1:2]])).passed == passed
    settings = AttackSettings(0.1)
    choice = {"threat": {"norm": "Linf", "eps": 0.1}, "marks": hexadecimal(torch.tensor([3, 10**9]))}
    threat, unseen = checks_of_choice(choice, settings, marks)
    assert (threat.passed, unseen.passed) == (True, passed)
    added(sparse).statistics = replace(added(sparse).statistics, marks=torch.tensor([3, 10**9]))
    (check,) = check_calibration(sparse, images, marks)
    assert check.passed == passed
    assert "1 of these images were calibrated on" in check.finding


def written(sparse, text):
    known = added(sparse).statistics
    added(sparse).statistics = replace(known, metadata=known.metadata | {"input_range": text})


@pytest.mark.parametrize(
    ("ranges", "units"),
    [
        ("0 to 1", True),
        ("-0.0009 to 1.0009", True),
        ("0 to 1.002", False),
        ("-0.002 to 1", False),
        ("0 to 255", False),
        ("-2 to 2", False),
        ("0 to 1 + 0 to 255", False),
        ("0 to 1 + -2 to 1", False),
        ("", True),
    ],
)
def test_statistics_of_other_units_are_refused(sparse, ranges, units):
    written(sparse, ranges)
    if units:
        require_units(sparse)
    else:
        with pytest.raises(EvaluationError, match="calibrate on images in"):
            require_units(sparse)


@pytest.mark.parametrize(("greatest", "passed"), [("1", True), ("0.25", True), ("0.24", False), ("0.003", False)])
def test_images_four_times_as_bright_as_those_of_calibration_were_divided_twice(sparse, greatest, passed):
    written(sparse, f"0 to {greatest}")
    (check,) = check_calibration(sparse, torch.ones(2, 3, 9, 9), torch.arange(2) + 10**9)
    assert check.passed == passed
    assert ("divided twice" in check.finding) != passed
