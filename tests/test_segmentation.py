"""Evaluation on label maps: an image is counted by its pixels."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.errors import DataError, EvaluationError
from meansparse_fx.evaluate import PairedDifference, descent, ledger, plan, segmentation
from meansparse_fx.evaluate.threat import AttackSettings

QUICK: dict = {"steps": 6, "progress": False, "eps": 0.05}


class Net(nn.Module):
    """Logits of three classes a pixel, at the images' size or at a share of it."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=stride)
        self.act = nn.GELU()
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        return self.head(self.act(self.stem(x)))


def transformed(model, images, alpha=0.3):
    sparse = msfx.transform(model.eval(), images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, alpha)
    return sparse


@pytest.fixture
def images():
    return torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sparse(images):
    torch.manual_seed(0)
    return transformed(Net(), images)


@pytest.fixture
def maps(sparse, images):
    """The base's own predictions, but for a stripe that has no label and one that is wrong."""
    labels = msfx.restore(sparse)(images).argmax(1)
    labels[:, 0] = 255
    labels[:, 1, :4] = (labels[:, 1, :4] + 1) % 3
    return labels


def by_hand(found, labels, classes):
    """Return each image's accuracy, and mean IoU over all images, pixel by pixel."""
    shares, both, either = [], [0] * classes, [0] * classes
    for a, b in zip(found.tolist(), labels.tolist(), strict=True):
        pairs = [(p, q) for row, other in zip(a, b, strict=True) for p, q in zip(row, other, strict=True) if q != -1]
        shares.append(sum(p == q for p, q in pairs) / len(pairs))
        for p, q in pairs:
            for k in range(classes):
                both[k] += p == q == k
                either[k] += k in (p, q)
    return shares, sum(b / e for b, e in zip(both, either, strict=True) if e) / sum(e > 0 for e in either)


def test_scores_of_two_small_maps():
    labels = torch.tensor([[[0, 0], [1, -1]], [[1, 1], [1, 1]]])
    found = torch.tensor([[[0, 1], [1, 2]], [[1, 1], [1, 0]]])
    counted = segmentation.counts(F.one_hot(found, 4).movedim(3, 1).float(), labels)
    assert segmentation.accuracy(counted).tolist() == pytest.approx([2 / 3, 3 / 4])
    # Class 0: 1 of 3 pixels; class 1: 4 of 6; class 2 was found where there is no label; class 3 is nowhere.
    assert segmentation.mean_iou(counted) == pytest.approx((1 / 3 + 4 / 6) / 2)


def test_scores_are_those_counted_by_hand():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 6, 7, 9, generator=generator)
    labels = torch.randint(-1, 4, (5, 7, 9), generator=generator)
    shares, miou = by_hand(logits.argmax(1), labels, 6)
    counted = segmentation.counts(logits, labels)
    assert segmentation.accuracy(counted).tolist() == pytest.approx(shares)
    assert segmentation.mean_iou(counted) == pytest.approx(miou)


def test_losses_are_what_they_are_called():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 3, 3), generator=generator)
    p, q = logits.softmax(1), F.one_hot(labels, 5).movedim(3, 1).double()
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(1) / 2
    entropy, right = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
    losses = {name: loss for name, (loss, _) in descent.PIXEL_LOSSES.items()}
    torch.testing.assert_close(losses["pgd-js"](entropy, right, 0.3), divergence)
    torch.testing.assert_close(losses["pgd-masked"](entropy, right, 0.3), entropy.where(right, 0))
    for done, wrong in ((0.0, 0.0), (0.5, 0.25), (1.0, 0.5)):
        expected = torch.where(right, 1 - wrong, wrong) * entropy
        torch.testing.assert_close(losses["pgd-balanced"](entropy, right, done), expected)


def test_both_models_side_by_side(sparse, images, maps):
    result = msfx.evaluate(sparse, (images, maps), batch_size=4, **QUICK)
    base = msfx.restore(sparse)
    shares, miou = by_hand(base(images).argmax(1), maps.where(maps != 255, -1), 3)
    assert result.base.clean.tolist() == pytest.approx(shares)
    assert result.base.miou["clean"] == pytest.approx(miou)
    modes = ("masked/exact", "masked/identity", "masked/annealed", "balanced/annealed", "js/annealed")
    assert list(result.sparse.robust) == [*(f"pgd-{mode}" for mode in modes), "transfer"]
    for outcome in (result.base, result.sparse):
        for score in outcome.robust.values():
            assert (score <= outcome.clean).all(), "an image may come back as it was"
        rows = [outcome.clean, *outcome.robust.values()]
        assert outcome.worst.tolist() == [min(scores) for scores in zip(*(row.tolist() for row in rows), strict=True)]
        assert outcome.miou["worst case"] < outcome.miou["clean"]
    exact = result.sparse.robust["pgd-masked/exact"] - result.base.robust["pgd-masked/exact"]
    worst = result.sparse.worst - result.base.worst
    assert result.masked.estimate == pytest.approx(float((exact - worst).mean()))
    assert {check.name for check in result.checks} >= {
        "base above chance",
        "unbounded attack, base",
        "more steps, base",
    }
    assert not result.cumulative
    commonest, labelled = maps == maps[maps != 255].mode().values, maps != 255
    share = (commonest.flatten(1).sum(1) / labelled.flatten(1).sum(1)).mean()
    assert f"the commonest label alone gets {100 * share:.1f} %" in result.checks[0].finding


@pytest.mark.parametrize(
    ("count", "above", "passed"), [(10, 0, True), (10, -0.2, False), (60, 0, False), (60, 0.2, True)]
)
def test_few_maps_must_be_below_chance_to_convict_and_many_above_it_to_pass(count, above, passed):
    """Of every ten pixels six have the commonest label; the base has that share right, by 5 points more or less."""
    labelled = torch.tensor([[6, 4, 0]]).repeat(count, 1)
    clean = 0.6 + above + 0.05 * (torch.arange(count).double() % 2 * 2 - 1)
    (check,) = segmentation.PixelBatch.check_labels({"labelled": labelled}, clean)
    assert check.passed == passed
    assert f"{100 * (0.6 + above):.1f} % of the pixels right; the commonest label alone gets 60.0 %" in check.finding


def test_prints_and_is_kept(sparse, images, maps, tmp_path):
    result = msfx.evaluate(sparse, (images, maps), sanity_images=0, **QUICK)
    assert "pixel accuracy in %" in str(result)
    assert "mIoU base" in str(result)
    assert result.to_csv().splitlines()[0].endswith("base_miou,sparse_miou,n,norm,eps")
    result.save(tmp_path / "result.json")
    again = msfx.Evaluation.load(tmp_path / "result.json")
    assert again.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert torch.equal(again.sparse.worst, result.sparse.worst)
    assert len(result.figure().axes) == 2


def test_steps_shrink_from_half_the_radius_to_nothing():
    attack = descent.PixelPGD(nn.Identity(), AttackSettings(0.1, steps=8), "pgd-masked")
    steps = []
    for attack._done in (0.0, 1 / 3, 0.5, 1.0):
        steps.append(float(descent.STEP * 0.1 * attack._direction(torch.ones(1, 3, 2, 2)).max()))
    assert steps == pytest.approx([0.05, 0.0375, 0.025, 0.0])


@pytest.mark.parametrize(("norm", "reach"), [("Linf", 1.0), ("L2", math.sqrt(3 * 8 * 8))])
def test_the_unbounded_attack_reaches_every_image(sparse, images, maps, monkeypatch, norm, reach):
    found, perturbed = set(), plan.perturbed
    monkeypatch.setattr(plan, "perturbed", lambda *args: found.add((args[-1].eps, args[-1].steps)) or perturbed(*args))
    msfx.evaluate(sparse, (images, maps), norm=norm, attacks=("pgd-masked/exact",), sanity_images=2, **QUICK)
    assert found == {(0.05, 6), (reach, 6), (0.05, 12)}, "the attack, the unbounded one, and twice the steps"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("attack", descent.PIXEL_LOSSES)
def test_attacks_find_more_than_noise_does(sparse, images, maps, attack, norm):
    eps = 0.1 if norm == "Linf" else 1.2
    result = msfx.evaluate(
        sparse, (images, maps), attacks=(attack,), backwards=("identity",), norm=norm, sanity_images=0,
        **QUICK | {"steps": 20, "eps": eps},
    )  # fmt: skip
    generator, labels = torch.Generator().manual_seed(0), maps.where(maps != 255, -1)
    least = torch.ones(len(images))
    for _ in range(21):
        noise = torch.randn(images.shape, generator=generator)
        noise = eps * (noise.sign() if norm == "Linf" else noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        shares, _ = by_hand(sparse((images + noise).clamp(0, 1)).argmax(1), labels, 3)
        least = torch.minimum(least, torch.tensor(shares))
    assert (result.sparse.robust[f"{attack}/identity"] < least - 0.05).all()


def test_surrogates_see_through_a_flat_operator():
    """Inside the band the exact gradient is zero; the identity's finds the way out of it."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.act = nn.Conv2d(1, 1, 1, bias=False), nn.ReLU()
            nn.init.constant_(self.scale.weight, 10.0)

        def forward(self, x):
            h = self.act(self.scale(x))
            return torch.cat([h - 4.6, 4.6 - h], 1)

    def grey(low, high):
        return torch.linspace(low, high, 8 * 64).view(8, 64).T.reshape(64, 1, 2, 4).contiguous()

    sparse = transformed(Flat(), grey(0.4, 0.6), 1.2)  # the band is 0.43 to 0.57 of the grey values
    maps = torch.zeros(64, 2, 4, dtype=torch.long)
    result = msfx.evaluate(
        sparse, (grey(0.47, 0.53), maps), attacks=("pgd-masked",), sanity_images=0, **QUICK | {"eps": 0.08, "steps": 20}
    )
    base, exact, identity = (
        float(score.mean())
        for score in (result.base.worst, result.sparse.worst_of("/exact"), result.sparse.worst_of("/identity"))
    )
    assert base == 0, "0.53 - 0.08 is below the base's boundary of 0.46"
    assert exact > 0.8, "random starts leave the band in few pixels only"
    assert identity == pytest.approx(1 / 3, abs=0.05), "0.51 - 0.08 is the band's edge: what is brighter survives"
    assert "is gradient masking" in result.verdict


def test_pixels_without_a_label_count_nowhere(sparse, images, maps):
    quick = QUICK | {"sanity_images": 0}
    expected = msfx.evaluate(sparse, (images, maps), **quick).to_dict() | {"seconds": 0}
    # As another number, of another dtype and rank.
    other = maps.where(maps != 255, -100).to(torch.int32).unsqueeze(1).numpy()
    assert msfx.evaluate(sparse, [(images, other)], ignore_index=-100, **quick).to_dict() | {"seconds": 0} == expected
    whole = maps.where(maps != 255, 0)
    assert msfx.evaluate(sparse, (images, whole), **quick).to_dict() | {"seconds": 0} != expected


def test_killed_and_resumed_to_the_same_result(sparse, images, maps, tmp_path, monkeypatch):
    arguments = QUICK | {"batch_size": 4}
    expected = msfx.evaluate(sparse, (images, maps), **arguments).to_dict() | {"seconds": 0}
    monkeypatch.setattr(ledger, "EVERY", 0)
    perturbed, made = plan.perturbed, itertools.count()

    def killed(*args):
        if next(made) in (7, 25):  # in the first batch, of the second model; in the second batch
            raise KeyboardInterrupt
        return perturbed(*args)

    monkeypatch.setattr(plan, "perturbed", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            msfx.evaluate(sparse, (images, maps), checkpoint=tmp_path / "kept", **arguments)
    result = msfx.evaluate(sparse, (images, maps), checkpoint=tmp_path / "kept", **arguments)
    assert result.to_dict() | {"seconds": 0} == expected
    attacks = 2 * 2 * 5 + 2 * 2 * 4  # models, batches, runs; and of the checks
    assert next(made) - 2 == attacks, "nothing is done twice"
    assert not [name for name in load_file(tmp_path / "kept") if name.endswith(":images")], "none is kept longer"


def test_differences_are_judged_by_flipped_signs():
    """Interval and p-value against every one of the 2 ** 9 flips, on both sides of each end."""
    changes = torch.tensor([0.11, -0.02, 0.05, 0.07, -0.04, 0.13, 0.02, 0.09, -0.01], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=9)), dtype=torch.float64)

    def p_value(truth):
        flipped, seen = (signs * (changes - truth)).mean(1), (changes - truth).mean()
        share = min(float((flipped >= seen - 1e-12).double().mean()), float((flipped <= seen + 1e-12).double().mean()))
        return min(1.0, 2 * share)

    found = PairedDifference.of_changes(changes)
    assert found.estimate == pytest.approx(float(changes.mean()))
    assert found.p_value == pytest.approx(p_value(0.0))
    for inside, outside in ((1e-6, -1e-6), (-1e-6, 1e-6)):
        end = found.low if inside > 0 else found.high
        assert p_value(end + inside) >= 0.05 > p_value(end + outside)


def test_many_differences_have_about_a_t_interval():
    changes = 0.02 + 0.05 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = PairedDifference.of_changes(changes)
    half = 1.966 * float(changes.std()) / 20
    assert (found.low, found.high) == (
        pytest.approx(found.estimate - half, abs=half / 8), pytest.approx(found.estimate + half, abs=half / 8)
    )  # fmt: skip


def test_five_images_tell_nothing():
    found = PairedDifference.of_changes(torch.tensor([0.1, 0.2, 0.1, 0.3, 0.2], dtype=torch.float64))
    assert (found.low, found.high) == (-1, 1)
    assert found.p_value == pytest.approx(2 / 32)
    more = PairedDifference.of_changes(torch.tensor([0.1, 0.2, 0.1, 0.3, 0.2, 0.1], dtype=torch.float64))
    assert (more.low, more.high, more.p_value) == (pytest.approx(0.1), pytest.approx(0.3), pytest.approx(2 / 64))


def test_equal_models_are_not_told_apart(sparse, images, maps):
    msfx.set_alpha(sparse, 0.0)
    result = msfx.evaluate(sparse, (images, maps), **QUICK)
    assert result.gain.estimate == 0
    assert result.gain.high == pytest.approx(1 - 0.025 ** (1 / 7), abs=1e-6), "no image changed: as of masks"
    assert result.verdict.startswith("Nothing compared: alpha is 0")


def test_a_base_that_knows_nothing_is_found_out(sparse, images, maps):
    wrong = ((maps + 1) % 3).where(maps != 255, 255)
    result = msfx.evaluate(sparse, (images, wrong), attacks=("pgd-js/exact",), **QUICK | {"steps": 1})
    assert any(warning.startswith("base above chance") for warning in result.warnings)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda maps: maps.where(maps != 2, 3), DataError, "image 0: label 3 is out of range .* Left out: 255"),
        (lambda maps: maps.where(maps != 255, -1), DataError, "label -1 in a map; .* ignore_index="),
        (
            lambda maps: torch.cat([maps[:5], torch.full_like(maps[5:], 255)]),
            DataError,
            "image 5 has no labelled pixel",
        ),
        (lambda maps: maps / 255, DataError, "label maps must be integers .* without scaling"),
        (lambda maps: maps[:, ::2, ::2], EvaluationError, r"logits of \[8, 8\] pixels for label maps of \[4, 4\]"),
    ],
)
def test_label_maps_that_cannot_be_used(sparse, images, maps, change, error, words):
    with pytest.raises(error, match=words):
        msfx.evaluate(sparse, [(images[:4], change(maps)[:4]), (images[4:], change(maps)[4:])], **QUICK)


def test_small_logits_are_to_be_upsampled_inside_the_model(images, maps):
    with pytest.raises(EvaluationError, match=r"logits of \[4, 4\] .* inside the model, with F.interpolate"):
        msfx.evaluate(transformed(Net(stride=2), images), (images, maps), **QUICK)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attacks": ("square",)}, "square is for one label an image: maps have pgd-masked, pgd-balanced, pgd-js"),
        ({"save_adversarial": "found.safetensors"}, "cannot be used with label maps"),
    ],
)
def test_what_does_not_serve_label_maps_says_so(sparse, images, maps, given, words):
    with pytest.raises(EvaluationError, match=words):
        msfx.evaluate(sparse, (images, maps), **QUICK | given)


def test_what_is_for_label_maps_alone_says_so(net, images):
    with pytest.raises(EvaluationError, match="pgd-js is for label maps"):
        msfx.evaluate(transformed(net, images), (images, torch.arange(7)), **QUICK | {"attacks": ("pgd-js",)})


def test_torchvisions_models_as_they_are():
    models = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    images = torch.rand(2, 3, 32, 32)
    sparse = transformed(model, images, 0.2)
    labels = msfx.restore(sparse)(images)["out"].argmax(1)
    result = msfx.evaluate(
        sparse, [(images, labels)], attacks=("pgd-masked/exact",), sanity_images=0, **QUICK | {"steps": 2}
    )
    assert result.base.clean.tolist() == [1, 1]
    assert math.isfinite(result.sparse.miou["worst case"])
