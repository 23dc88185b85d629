"""The judge of the judge: adversarial examples planted by construction, and probes on models that fail each."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meansparse_fx as msfx
from benchmarks import judge
from benchmarks.harness import Row
from benchmarks.page.markdown import between_marks, render
from meansparse_fx.evaluate import plan
from meansparse_fx.evaluate.attacks import AttackSettings
from meansparse_fx.evaluate.outcome import ModelOutcome
from meansparse_fx.evaluate.plan import Attacked, correct, perturbed, plan_runs
from meansparse_fx.evaluate.planted import (
    CANDIDATES,
    INNER,
    RIDGE,
    _around,
    _changed,
    _readout,
    nearest,
    plant,
)
from meansparse_fx.evaluate.probes import Probed, _gradients, examine, outputs, search_planted
from meansparse_fx.evaluate.sanity import check_power, checks_of
from meansparse_fx.nn import MeanSparse
from meansparse_fx.passes.readout import features_of, last_linear, with_readout
from tests.models import Functional


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net.requires_grad_(False), images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.01)
    return sparse


SETTINGS = AttackSettings(eps=0.05, steps=20)


def test_features_are_what_the_last_layer_reads(sparse, images):
    seen = []
    hook = sparse.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = sparse(images)
    hook.remove()
    assert torch.equal(features_of(sparse)(images), seen[0])
    assert torch.equal(with_readout(sparse, nn.Linear(6, 3))(images).new_zeros(12, 3), torch.zeros(12, 3))
    assert torch.equal(with_readout(sparse, sparse.head)(images), expected)
    assert torch.equal(sparse(images), expected), "the model itself is left alone"
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.Flatten()).eval()
    assert last_linear(msfx.transform(convolutional, images)) is None
    assert plant(msfx.transform(convolutional, images), images, SETTINGS) is None
    functional = Functional(
        lambda self, x: F.linear(self.body(x), self.head.weight), body=convolutional, head=nn.Linear(4, 3)
    )
    assert torch.equal(features_of(msfx.transform(functional.eval(), images))(images), convolutional(images))
    keyword = Functional(lambda self, x: self.head(input=self.body(x)), body=convolutional, head=nn.Linear(4, 3)).eval()
    named = msfx.transform(keyword, images)
    assert torch.equal(features_of(named)(images), convolutional(images))
    assert torch.equal(with_readout(named, keyword.head)(images), keyword(images))


ROWS = {  # features that are not one row an image
    "tokens": lambda self, x: self.head(self.body(x).flatten(2).mT).mean(1),
    "tokens of all images": lambda self, x: (
        self.head(self.body(x).movedim(1, 3).flatten(0, 2)).view(len(x), -1, 3).mean(1)
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_planted_behind_features_that_are_no_row_an_image(images, name):
    model = Functional(ROWS[name], body=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), head=nn.Linear(4, 3)).eval()
    sparse = msfx.transform(model, images)
    assert last_linear(sparse) is not None
    assert plant(sparse, images, SETTINGS) is None


@pytest.mark.parametrize("shape", [(1, 1, 12, 12), (1, 144)], ids=str)
def test_a_changed_square_weighs_as_much_as_what_was_there(shape):
    """In L2, of one channel: where the square is not, all is divided by the root of two; the whole has the radius."""
    images = torch.full(shape, 0.5)
    points = images.clone()
    points.view(-1)[0] += 0.1
    outside = []
    for seed in range(30):
        changed = _changed(points, images, AttackSettings(0.1, "L2"), torch.Generator().manual_seed(seed)) - images
        assert float(changed.norm()) == pytest.approx(0.1, rel=1e-5)
        first, beside, below = changed.view(-1)[[0, 1, 12]].tolist()
        outside += [first] if beside == below == 0 else []
    assert len(outside) > 9
    assert outside == pytest.approx([0.1 / math.sqrt(2)] * len(outside), rel=1e-4)


def _around_nothing(seed):
    images = torch.full((1, 3, 12, 12), 0.5)
    return _changed(images.clone(), images, AttackSettings(0.1), torch.Generator().manual_seed(seed)) - images


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_changed_cube_is_an_image(norm, value):
    images = torch.full((8, 3, 12, 12), value)
    changed = _changed(images.clone(), images, AttackSettings(0.9, norm), torch.Generator().manual_seed(0))
    assert (changed != images).any()
    assert torch.equal(changed, changed.clamp(0, 1))


def test_a_changed_cube_is_at_the_edge_of_the_ball():
    """In Linf: a square of the image, of which each channel goes to one side; nothing else changes."""
    images = torch.full((4, 3, 12, 12), 0.5)
    changed = _changed(images.clone(), images, AttackSettings(0.1), torch.Generator().manual_seed(0)) - images
    rows, columns = (changed != 0).any(0).any(0).nonzero(as_tuple=True)
    square = changed[:, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert 0 < square[0, 0].numel() < 144
    sides = [(_around_nothing(seed) != 0).any(0).any(0).any(0).sum().item() for seed in range(60)]
    assert {1, 5} < set(sides) < set(range(7)), "from a twentieth to half of the image"
    torch.testing.assert_close(square.abs(), torch.full_like(square, 0.1))
    assert (square.amax((2, 3)) == square.amin((2, 3))).all()


def test_the_readout_is_fishers_discriminant_of_the_farthest_candidate():
    """Against NumPy; features of which some vary a hundred times as much as others."""
    image, settings = torch.full((1, 3, 3), 0.5), AttackSettings(0.1)
    mixing = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([100.0, 1, 1, 0.1])

    def features(x):
        return x.flatten(1) @ mixing

    weights, point, largest, own = _readout(features, image, settings, torch.Generator().manual_seed(2))
    drawing = torch.Generator().manual_seed(2)
    edge = _around(image, CANDIDATES, settings, drawing, edge=True)
    inner = torch.cat([image[None], _around(image, INNER - 1, settings, drawing, edge=False)])
    far, near = (features(x).double().numpy() for x in (edge, inner))
    covariance = np.cov(near.T, bias=True)
    covariance += RIDGE * np.trace(covariance) / 4 * np.eye(4)
    directions = [np.linalg.solve(covariance, candidate - near.mean(0)) for candidate in far]
    directions = [d / np.linalg.norm(d) for d in directions]
    gaps = [(f @ d - (near @ d).max()) / (near @ d).std(ddof=1) for f, d in zip(far, directions, strict=True)]
    best = int(np.argmax(gaps))
    assert np.sort(gaps)[-1] - np.sort(gaps)[-2] > 1e-3
    assert weights.numpy() == pytest.approx(directions[best], abs=1e-5)
    assert torch.equal(point, edge[best])
    assert largest.item() == pytest.approx((near @ directions[best]).max(), rel=1e-4)
    assert own.item() == pytest.approx(near[0] @ directions[best], rel=1e-4)


@pytest.mark.parametrize(("value", "label", "rises"), [(0, 0, False), (0.5, 0, True), (1, 0, True), (1, 1, False)])
def test_a_step_that_leaves_the_images_range_raises_nothing(value, label, rises):
    """The margin falls with the brightness for label 0, and rises with it for label 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0] * 4, [0.0] * 4]))
    right = Probed(torch.full((1, 1, 2, 2), float(value)), torch.tensor([label]))
    assert _gradients(model, right, plan_runs(["pgd"], ["exact"], 0), SETTINGS)["rises"].tolist() == [rises]


@pytest.mark.parametrize(("norm", "moved"), [("Linf", 0.005), ("L2", 0.0025)])
def test_a_step_along_the_gradient_is_a_tenth_of_the_radius(norm, moved):
    """The margin is highest where all four pixels are brighter by a bit more, or a bit less, than half of the step."""
    for peak, rises in ((0.55 * moved, True), (0.45 * moved, False)):
        model = Apply(
            lambda x, peak=peak: torch.stack([0 * x.sum((1, 2, 3)), -(x.mean((1, 2, 3)) - 0.5 - peak).abs()], 1)
        )
        right = Probed(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
        found = _gradients(model, right, plan_runs(["pgd"], ["exact"], 0), AttackSettings(eps=0.05, norm=norm))
        assert found["rises"].tolist() == [rises]


def test_a_tiny_change_is_a_thousandth_of_the_radius():
    """Inputs rounded to a step are as they were after a change of less than half of it."""
    settings, x = AttackSettings(eps=0.05), torch.full((2, 1, 2, 2), 0.5)
    for step, follows in ((0.8e-4, True), (1.2e-4, False)):
        model = Apply(lambda x, step=step: step * ((x.double() - 0.5) / step).round().flatten(1))
        assert outputs(model, Probed(x, torch.zeros(2).long()), settings)["continuous"].tolist() == [follows] * 2


def test_two_passes_may_differ_by_rounding():
    """By a ten thousandth of the largest logit."""
    for by, repeatable in ((0.9e-4, True), (1.1e-4, False)):
        calls: list[int] = []
        model = Apply(lambda x, by=by, calls=calls: x.flatten(1) + by * 8 * (calls.append(1) or len(calls) == 2))
        found = outputs(model, Probed(torch.full((2, 1, 2, 2), 8.0), torch.zeros(2).long()), SETTINGS)
        assert found["repeatable"].tolist() == [repeatable] * 2


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_is_planted_is_there(sparse, images, norm):
    eps = 0.05 if norm == "Linf" else 0.5
    planted = plant(sparse, images, AttackSettings(eps=eps, norm=norm))
    assert len(planted.images) > 6
    delta = (planted.plants - planted.images).flatten(1)
    assert (delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)).max() <= eps + 1e-6
    assert planted.model(planted.images).argmax(1).eq(0).all()
    assert planted.model(planted.plants).argmax(1).eq(1).all()
    assert planted.random.all(), "random search finds nothing"
    assert not sparse._forward_pre_hooks, "the model itself is left alone"
    assert planted.model(planted.images).shape == (len(planted.images), 10)
    # What stands behind meets numbers as the network's own: a margin of the same mean, at the image and at the plant.
    top = sparse(images).topk(2).values
    margin = float((top[:, 0] - top[:, 1]).mean())
    logits = planted.model(planted.images)
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], torch.full((len(logits),), margin), rtol=1e-3, atol=0)
    assert torch.equal(logits[:, 2:], logits.new_full((len(logits), 8), -5 * margin))
    # Attacks drop rows and change their order.
    order = torch.tensor([3, 0, 5])
    assert torch.equal(planted.model(planted.plants[order]), planted.model(planted.plants)[order])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_points_lie_on_the_edge_of_the_ball_or_anywhere_within(norm):
    image, generator = torch.full((3, 5, 5), 0.5), torch.Generator().manual_seed(0)
    edge, within = (_around(image, 50, AttackSettings(0.1, norm), generator, on) - image for on in (True, False))
    for points in (edge, within):
        assert torch.linalg.vector_norm(points.flatten(1), math.inf if norm == "Linf" else 2, 1).max() <= 0.1 + 1e-6
    sizes = [points.abs() if norm == "Linf" else points.flatten(1).norm(dim=1) for points in (edge, within)]
    torch.testing.assert_close(sizes[0], torch.full_like(sizes[0], 0.1))
    assert sizes[1].mean() == pytest.approx(0.05, rel=0.2)


def test_nearest_is_the_ball_an_image_lies_in(images):
    moved = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))[[4, 4, 1]]
    assert nearest(moved, images).tolist() == [4, 4, 1]


def test_a_sound_attack_finds_what_is_planted_and_a_blind_one_does_not(net, images):
    def power(before):
        model = Around(net, Apply(before)).eval().requires_grad_(False)
        planted = plant(msfx.transform(model, images), images, SETTINGS)
        (run,) = plan_runs(["apgd-margin/identity"], (), 0)
        made = perturbed(planted.model, run, planted.images, planted.labels, SETTINGS)
        return 1 - float(correct(planted.model, made, planted.labels).double().mean())

    assert power(lambda x: 1 * x) > 0.9
    assert power(lambda x: (64 * x).round() / 64) < 0.2, "planted there, too, but no gradient leads to it"


def test_power_is_judged_by_all_attacks_together():
    n = torch.arange(20)
    missed = {"random search": n >= 0, "a": n < 10, "b": (n >= 10) | (n < 1)}
    check = check_power("base", missed)
    assert check.passed
    assert check.finding.startswith("19 of 20 planted adversarial examples found (a 50 %, b 45 %; random search 0 %)")
    assert not check_power("base", missed | {"b": n >= 7}).passed


def test_what_survives_an_unbounded_attack_is_said_with_its_meaning():
    def check(fell):
        (found,) = checks_of("base", {"unbounded": fell}, ModelOutcome(torch.ones(4, dtype=torch.bool)), ())
        return found

    blind = "2 of 4 images survive an attack that may change them into any other: the attack is blind here"
    assert check(torch.arange(4) < 2).finding.startswith(blind)
    passed = check(torch.ones(4))
    whole = "0.00 % of the pixels of 4 images survive an attack that may change them into any other"
    assert (passed.passed, passed.finding) == (True, whole)


class Around(nn.Module):
    """A network with something in front of it and something behind it."""

    def __init__(self, network, before=None, behind=None):
        super().__init__()
        self.network, self.before, self.behind = network, before or nn.Identity(), behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.network(self.before(x)))


class Apply(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


FAILURES = {
    "repeatable": {"before": lambda x: F.dropout(x, 0.2, True)},
    "logits": {"behind": lambda z: z.softmax(1)},
    "continuous": {"behind": lambda z: (2 * z).round() / 2},
    "slope": {"before": lambda x: x.detach()},
    "rises": {"before": judge._reversed},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_each_probe_sees_its_failure_and_no_other_model_has_it(net, images, failure):
    def looked(right=True, attacks=("apgd-ce/exact",), **around):
        model = Around(net, **{name: Apply(call) for name, call in around.items()}).eval().requires_grad_(False)
        labels = model(images).argmax(1)
        runs = plan_runs(attacks, (), 0)
        mask = torch.full((12,), right)
        return examine(Attacked(model, plan.AttackPlan(runs, SETTINGS)), Probed(images, labels), mask, mask)

    torch.manual_seed(0)
    assert not looked(**FAILURES[failure])[failure].all()
    sound = looked()
    assert set(sound) == {*FAILURES, "unbounded", "twice the steps", "silent success"}
    assert all(sound[name].all() for name in FAILURES)
    assert sound["silent success"].all()
    assert sound["unbounded"].all()
    assert looked(right=False) == {}, "there is nothing to look at"
    assert set(looked(attacks=("square",))) == {"repeatable", "logits", "continuous"}, "nor a gradient"


@pytest.mark.parametrize(
    ("behind", "probabilities"),
    [
        (lambda z: z.softmax(1), True),
        (lambda z: F.one_hot(z.argmax(1), 10).float(), True),
        (lambda z: z.log_softmax(1), False),
        (lambda z: z.relu(), False),  # none is negative
        (lambda z: 1e4 * (z - z.mean(1, keepdim=True)) + 0.1, False),  # they sum to one
        (lambda z: z.sigmoid(), False),
    ],
)
def test_probabilities_are_not_negative_and_sum_to_one(net, images, behind, probabilities):
    found = outputs(Around(net, behind=Apply(behind)), Probed(images, images.new_zeros(12).long()), SETTINGS)
    assert found["logits"].tolist() == [not probabilities] * 12


def test_what_an_attack_met_and_did_not_return_is_noticed(net, images, monkeypatch):
    """An attack that looks at an adversarial image and gives the clean one back."""

    def silent(name, attacked, x, *_):
        attacked(x + 1e-3 * (1 - x))
        return x

    monkeypatch.setattr(plan, "attack", silent)
    # Of any image but the known ones it sees the negative.
    known = {image.numpy().tobytes() for image in images}
    negative = Apply(lambda x: torch.stack([i if i.detach().numpy().tobytes() in known else 1 - i for i in x]))
    model = Around(net, negative).eval().requires_grad_(False)
    labels, everything = model(images).argmax(1), torch.ones(12, dtype=torch.bool)
    wrong = net(1 - (images + 1e-3 * (1 - images))).argmax(1) != labels
    assert wrong.any()
    runs = plan_runs(["apgd-ce/exact"], (), 0)
    found = examine(Attacked(model, plan.AttackPlan(runs, SETTINGS)), Probed(images, labels), everything, everything)
    assert torch.equal(found["silent success"], ~wrong)
    assert found["twice the steps"].all()


def test_planted_examples_are_looked_for_by_every_run(sparse, images):
    runs = plan_runs(["apgd-ce/exact", "apgd-margin/annealed", "square", "apgd-start/annealed", "pgd/exact"], (), 0)
    given = plan.AttackPlan(runs, AttackSettings(eps=0.05, steps=5, queries=10))
    found = search_planted(Attacked(sparse, given), Probed(images, images.new_zeros(12).long()))
    names = ["random search", "apgd-ce/exact", "pgd/exact", "apgd-margin/annealed", "square"]
    assert list(found) == [f"planted/{name}" for name in names]
    assert search_planted(Attacked(nn.Identity(), given), Probed(images, images)) == {}


# The court.


def test_the_court_has_enough_cases(tmp_path):
    found = judge.cases(tmp_path)
    kinds = [case.kind for case in found.values()]
    assert sum(kind.startswith("mask") for kind in kinds) >= 15
    assert kinds.count("honest") >= 10


def a_row(case, kind, convicted, verdict="No difference shown"):
    figures = {"gain": 0.01, "low": -0.01, "high": 0.02, "own": 0.01, "images": 10, "torch": "2"}
    return Row(case=case, kind=kind, convicted=convicted, verdict=verdict, **figures)


def test_the_courts_page_counts(tmp_path):
    rows = [
        a_row("a", "mask in the model", True),
        a_row("b", "mask in the operator", False),
        a_row("c", "honest", False),
        a_row("A/A", "same against same", False, "Gain real in 1 of 200"),
    ]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- judge: made by benchmarks.page -->\nold\n<!-- end -->\nbehind\n")
    between_marks(page, "judge", render("judge.md", rows=rows, threat=judge.THREAT))
    text = page.read_text()
    assert "Of 2 planted masks 1 are convicted, of 1 honest cases 0." in text
    assert "the base against itself: gain real in 1 of 200 resampled runs" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nbehind\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "convicted"), [("quantised logits", True), ("gradient reversed", True), ("GELU, alpha 0", False)]
)
def test_the_court_tells_a_mask_from_an_honest_network(tmp_path, monkeypatch, case, convicted):
    monkeypatch.setattr(judge, "THREAT", judge.THREAT | {"steps": 15, "queries": 50})
    row = judge.judge(case, judge.cases(tmp_path)[case], 32)
    assert row.convicted == convicted, row


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("blind", [("exact",), ("identity",), ("exact", "identity")])
def test_the_unbounded_attack_may_reach_any_image_under_any_backward(net, images, monkeypatch, norm, blind):
    """What falls under one backward has fallen, whichever comes last; the ball holds black and white."""
    balls = []

    def find(name, attacked, x, labels, settings, backward, starts):
        balls.append(settings)
        if settings.eps < 1 or backward in blind:
            return x
        classes = net(images).argmax(1)
        return torch.stack([images[int((classes != label).nonzero()[0])] for label in labels])

    monkeypatch.setattr(plan, "attack", find)
    labels, everything = net(images).argmax(1), torch.ones(12, dtype=torch.bool)
    assert len(labels.unique()) > 1
    runs = plan_runs(["apgd-ce/exact", "apgd-ce/identity"], (), 0)
    settings = AttackSettings(eps=0.05, norm=norm, steps=2)
    found = examine(Attacked(net, plan.AttackPlan(runs, settings)), Probed(images, labels), everything, everything)
    assert found["unbounded"].tolist() == [len(blind) < 2] * 12
    black, white = torch.zeros_like(images[0]), torch.ones_like(images[0])
    largest = max(ball.eps for ball in balls)
    assert largest == pytest.approx(float((white - black).norm()) if norm == "L2" else 1.0)
    assert {(ball.eps, ball.steps) for ball in balls} == {(largest, 2), (0.05, 4)}, "and once more, twice the steps"


class Under(nn.Module):
    """A network with something in front of it under some backwards of an operator."""

    def __init__(self, network, before, modes):
        super().__init__()
        self.network, self.before, self.modes, self.operator = network, before, modes, MeanSparse("a", 3, 1)

    def forward(self, x):
        return self.network(self.before(x) if self.operator.backward in self.modes else x)


@pytest.mark.parametrize("probe", ["slope", "rises"])
@pytest.mark.parametrize("modes", [("exact",), ("identity",), ("exact", "identity")])
def test_a_gradient_under_any_backward_is_one_whichever_comes_last(net, images, monkeypatch, probe, modes):
    monkeypatch.setattr(plan, "attack", lambda name, attacked, x, *_: x)
    model = Under(net, FAILURES[probe]["before"], modes).eval().requires_grad_(False)
    labels, everything = net(images).argmax(1), torch.ones(12, dtype=torch.bool)
    runs = plan_runs(["apgd-ce/exact", "apgd-ce/identity"], (), 0)
    found = examine(Attacked(model, plan.AttackPlan(runs, SETTINGS)), Probed(images, labels), everything, everything)
    assert found[probe].all() == (len(modes) == 1)


def test_base_against_itself_on_fewer_images_than_asked_for(monkeypatch):
    monkeypatch.setattr(judge.bundled, "load_split", lambda _: (torch.zeros(12, 1, 28, 28), torch.zeros(12)))
    monkeypatch.setattr(judge, "captured", lambda model: model)
    monkeypatch.setattr(msfx, "restore", lambda model: model)
    base = SimpleNamespace(worst=torch.arange(12) < 7)
    monkeypatch.setattr(msfx, "evaluate", lambda sparse, test, **given: SimpleNamespace(base=base))
    row = judge.same_against_same(600)
    assert (row.images, row.gain, row.convicted) == (12, 0.0, False)
