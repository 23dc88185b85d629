"""Evaluation, on networks small enough that the right answer is known."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import meansparse_fx as msfx
from meansparse_fx import progress
from meansparse_fx.data import load_images
from meansparse_fx.errors import ArtifactError, EvaluationError, MeanSparseError, StateError, WriteError
from meansparse_fx.evaluate import (
    Evidence,
    ModelOutcome,
    PairedDifference,
    attacks,
    batch,
    external_evaluation,
    plan,
    run,
    sanity,
)
from meansparse_fx.evaluate.attacks import VERSIONS, AttackSettings, attack
from meansparse_fx.evaluate.outcome import _at_most
from meansparse_fx.evaluate.plan import Attacked, FastModel, compile_mode, padded, plan_runs
from meansparse_fx.nn import MeanSparse
from meansparse_fx.operators import added

QUICK: dict = {"steps": 5, "progress": False, "eps": 0.05, "attacks": ("apgd-ce",)}


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images.flip(3)], progress=False)
    msfx.set_alpha(sparse, 0.3)
    return sparse


@pytest.fixture
def test_set(net, images):
    """Images with the model's own predictions as labels: clean accuracy of the base is 1."""
    return images, net(images).argmax(1)


def test_base_and_sparse_stand_side_by_side(sparse, test_set):
    result = msfx.evaluate(sparse, test_set, queries=10, **QUICK | {"attacks": ("apgd-ce", "square")})
    assert result.n_test == 12
    assert float(result.base.clean.double().mean()) == 1
    runs = {"apgd-ce/exact", "apgd-ce/identity", "square", "transfer"}
    assert set(result.base.robust) == set(result.sparse.robust) == runs
    for outcome in (result.base, result.sparse):
        for mask in outcome.robust.values():
            assert not (mask & ~outcome.clean).any(), "robust where not even clean"
            assert not (outcome.worst & ~mask).any()
    values = json.loads(json.dumps(result.to_dict()))
    assert values["alpha"] == pytest.approx(0.3)
    assert values["base"]["worst_case"] <= min(values["base"]["robust"].values())
    assert "worst case" in str(result)


def test_switches_are_put_back(sparse, test_set):
    msfx.set_backward(sparse, "smooth")
    msfx.evaluate(sparse, test_set, **QUICK)
    msfx.select_alpha(sparse, test_set, alphas=(0.1,), **QUICK)
    assert {m.backward for m in msfx.operators(sparse).values()} == {"smooth"}
    assert msfx.get_alpha(sparse) == pytest.approx(0.3)


def test_callers_random_state_is_left_alone(sparse, test_set):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    msfx.evaluate(sparse, test_set, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_same_seed_same_result(sparse, test_set):
    first, second = (msfx.evaluate(sparse, test_set, seed=3, **QUICK).to_dict() for _ in range(2))
    for values in (first, second):
        values.pop("seconds")
    assert first == second


def test_unbounded_attack_leaves_nothing(sparse, test_set):
    with pytest.warns(UserWarning, match=r"eps 1 lets every value .* did you mean 1/255\?"):
        result = msfx.evaluate(sparse, test_set, eps=1.0, steps=20, attacks=("apgd-ce",), progress=False)
    assert [c.finding for c in result.checks if c.name == "threat" and "too strong" in c.finding and not c.passed]
    assert float(result.sparse.worst.double().mean()) == 0


def test_identity_backward_sees_through_a_flat_operator():
    """Inside the band the exact gradient is zero; the identity's finds the way out of it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Conv2d(1, 1, 1, bias=False)
            self.act = nn.ReLU()
            nn.init.constant_(self.scale.weight, 10.0)

        def forward(self, x):
            h = self.act(self.scale(x)).mean((1, 2, 3))
            return torch.stack([h - 4.6, 4.6 - h], 1)

    def grey(low, high):
        return torch.linspace(low, high, 64).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()

    net = Net().eval()
    sparse = msfx.transform(net, grey(0.4, 0.6))
    msfx.calibrate(sparse, [grey(0.4, 0.6)], progress=False)
    msfx.set_alpha(sparse, 1.2)  # the band is 0.43 to 0.57 of the grey values
    images, labels = grey(0.47, 0.53), torch.zeros(64, dtype=torch.long)
    result = msfx.evaluate(sparse, (images, labels), eps=0.08, steps=20, attacks=("apgd-ce",), progress=False)
    base, exact, identity = (
        float(mask.double().mean())
        for mask in (
            result.base.worst,
            result.sparse.robust["apgd-ce/exact"],
            result.sparse.robust["apgd-ce/identity"],
        )
    )
    assert base == 0, "0.53 - 0.08 is below the base's boundary of 0.46"
    assert exact > 0.9, "random starts leave the band in few pixels only"
    assert identity == pytest.approx(1 / 3, abs=0.05), "0.51 - 0.08 is the band's edge: what is brighter survives"


def test_paired_difference_against_known_values():
    before = torch.arange(1000) < 700
    after = (torch.arange(1000) < 730) & (torch.arange(1000) >= 10)
    d = PairedDifference.of(before, after)
    assert d.estimate == pytest.approx(0.02)
    # Normal approximation of the paired difference: sqrt(40 - 20**2 / 1000) / 1000.
    half = 1.96 * (40 - 0.4) ** 0.5 / 1000
    assert (d.low, d.high) == (pytest.approx(0.02 - half, abs=1.5e-3), pytest.approx(0.02 + half, abs=1.5e-3))
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        PairedDifference.of_changes(torch.tensor([2, 0]))


@pytest.mark.parametrize("n", [3, 100, 1000])
def test_where_nothing_changed_the_interval_is_that_of_changed_images(n):
    d = PairedDifference.of(torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool))
    most = 1 - 0.025 ** (1 / n)  # Clopper and Pearson: none in n
    assert (d.estimate, d.low, d.high, d.p_value) == (
        0,
        pytest.approx(-most, abs=1e-6),
        pytest.approx(most, abs=1e-6),
        1,
    )


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 1), (1, 4), (0, 5), (6, 0)])
@pytest.mark.parametrize("difference", [-0.3, 0.0, 0.1, 0.5])
def test_a_net_change_is_as_rare_as_among_the_likeliest_shares(gained, lost, difference):
    """Of ten images: the likeliest shares that differ by so much from a grid, all outcomes counted."""
    n, same = 10, 10 - gained - lost
    down = np.linspace(max(0, -difference), (1 - difference) / 2, 400_001)
    shares = np.stack([down + difference, down, (1 - 2 * down - difference).clip(0)])
    likelihood = np.prod(shares ** np.array([[gained], [lost], [same]]), 0)
    up, down, rest = shares[:, likelihood.argmax()]
    expected = sum(
        math.comb(n, g) * math.comb(n - g, k) * up**g * down**k * rest ** (n - g - k)
        for g in range(n + 1)
        for k in range(n + 1 - g)
        if g - k <= gained - lost
    )
    assert _at_most(gained, lost, n, difference) == pytest.approx(expected, abs=1e-4)


def bars(monkeypatch) -> list[progress.Progress]:
    """Return a list that every bar of `evaluate` will be in."""
    displays: list[progress.Progress] = []
    monkeypatch.setattr(run, "bar", lambda enabled: displays.append(progress.bar(enabled)) or displays[-1])
    return displays


def test_the_progress_bar_is_shown_by_default_and_ends_at_its_end(sparse, test_set, monkeypatch):
    displays = bars(monkeypatch)
    options = {"eps": 0.05, "steps": 2, "attacks": ("pgd",), "sanity_images": 0, "batch_size": 5}
    for own in ({}, {"progress": False}):
        msfx.evaluate(sparse, test_set, **options, **own)
    assert [display.disable for display in displays] == [False, True]
    # Three batches, two gradients, two models.
    assert [(task.completed, task.total) for display in displays for task in display.tasks] == [(12, 12)] * 2


def test_interval_and_test_are_right_whatever_the_truth():
    """Every outcome of 12 images, weighed by how likely it is: covered in 95 %, and rejected in 5 % at most."""
    n = 12
    found = {}
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            changes = torch.tensor([1] * gained + [-1] * lost + [0] * (n - gained - lost))
            d = found[gained, lost] = PairedDifference.of_changes(changes)
            assert d.low <= d.estimate <= d.high
            assert (d.low > 0 or d.high < 0) == (d.p_value < 0.05), "interval and test agree"

    def likely(gained, lost, up, down):
        ways = math.comb(n, gained) * math.comb(n - gained, lost)
        return ways * up**gained * down**lost * (1 - up - down) ** (n - gained - lost)

    grid = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
    for up, down in itertools.product(grid, grid):
        inside = sum(likely(*k, up, down) for k, d in found.items() if d.low - 1e-6 <= up - down <= d.high + 1e-6)
        assert inside >= 0.95, (up, down)
        if up == down:
            assert sum(likely(*k, up, down) for k, d in found.items() if d.p_value <= 0.05) <= 0.05


def test_shares_have_the_interval_of_clopper_and_pearson():
    low, high = sanity.share_interval(2, 8)
    upper = sum(math.comb(8, k) * high**k * (1 - high) ** (8 - k) for k in range(3))
    lower = sum(math.comb(8, k) * low**k * (1 - low) ** (8 - k) for k in range(2, 9))
    assert (lower, upper) == (pytest.approx(0.025, abs=1e-5), pytest.approx(0.025, abs=1e-5))


def test_few_images_are_called_that(sparse, test_set):
    images, labels = (part[:3] for part in test_set)
    msfx.set_alpha(sparse, 0.0)
    result = msfx.evaluate(sparse, (images, labels), base=msfx.restore(sparse), **QUICK)
    assert result.gain.estimate == 0
    assert result.gain.high == pytest.approx(0.7076, abs=1e-4)
    assert result.verdict.startswith("Too few images to tell: on 3, ")
    assert replace(result, alpha=0.1).verdict.startswith(
        "Too few images to tell: on 3, worst-case accuracy +0.0 [-70.8, +70.8] points"
    )


@pytest.mark.parametrize(
    ("base", "exact", "identity", "word"),
    [(700, 760, 760, "Gain real"), (700, 760, 700, "Gain masked"), (700, 760, 650, "Loss"), (700, 700, 701, "No diff")],
)
def test_verdict(base, exact, identity, word):
    n = torch.arange(1000)
    models = [
        ModelOutcome(n < 900, {"a/exact": n < e, "a/identity": n < i}) for e, i in ((base, base), (exact, identity))
    ]
    if word == "Gain masked":  # gains and losses that cancel
        models[1].robust["a/identity"] = (n < 730) & (n >= 30)
    result = msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0)
    if word == "Loss":
        assert result.exact_gain.low > 0
    if word in ("Loss", "Gain masked"):
        assert result.masked.low > 0
        assert "is gradient masking" in result.verdict
    assert result.masked.estimate == pytest.approx(result.exact_gain.estimate - result.gain.estimate)
    assert result.verdict.startswith(word)


def test_a_gap_that_may_be_noise_is_called_that():
    n = torch.arange(1000)
    base = ModelOutcome(n < 900, {"a/exact": n < 700, "a/identity": n < 700})
    # 8 gained, and 3 others lost to the attacker who knows: three images may be chance.
    sparse = ModelOutcome(n < 900, {"a/exact": n < 708, "a/identity": (n < 708) & (n >= 3)})
    result = msfx.Evaluation(base, sparse, 0.2, 0.1, "Linf", 10, 0, 0, 1.0)
    assert not result.cumulative
    assert result.exact_gain.low > 0 > result.gain.low
    assert result.masked.estimate == pytest.approx(0.003)
    assert result.masked.low <= 0
    assert result.verdict.startswith("Gain not confirmed")


def test_no_verdict_without_an_attacker_who_knows():
    n = torch.arange(1000)
    models = [ModelOutcome(n < 900, {"a/exact": n < robust}) for robust in (700, 760)]
    assert msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0).verdict.startswith("Not tested against")


@pytest.mark.parametrize("start", ["exact", "identity"])
def test_an_attack_that_starts_at_others_images_is_not_the_operators_own_gradient_alone(start):
    n = torch.arange(1000)
    rows = [{"pgd/exact": n < e, "pgd/identity": n < i, "transfer": n < i} for e, i in ((700, 700), (760, 650))]
    models = [ModelOutcome(n < 900, row | {f"apgd-start/{start}": row["transfer"]}) for row in rows]
    result = msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0, cumulative=True)
    assert result.exact_gain.estimate == pytest.approx(0.06)
    assert "+6.0" in result.verdict
    assert "is gradient masking" in result.verdict


def test_nothing_is_said_of_a_gradient_that_was_not_used():
    """Clean accuracy is not what the operator's own gradient leaves."""
    n = torch.arange(1000)
    models = [ModelOutcome(n < 900, {"pgd/identity": n < robust}) for robust in (700, 650)]
    result = msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0)
    assert (result.exact_gain, result.masked) == (None, None)
    assert result.verdict.startswith("Loss: worst-case accuracy -5.0")
    assert "own gradient" not in result.verdict
    assert result.to_dict()["exact_gain"] is None


def test_the_legend_explains_each_attack_and_each_gradient_once():
    side = ModelOutcome(torch.ones(9).bool(), dict.fromkeys(("pgd/exact", "square", "transfer"), torch.ones(9).bool()))
    legend = msfx.Evaluation(side, side, 0.2, 0.1, "Linf", 10, 0, 0, 1.0).legend()
    assert list(legend) == ["pgd", "square", "transfer", "/exact"]


def test_bad_input_has_its_own_error(sparse, test_set, net):
    x, y = test_set
    cases = [
        ((x * 255, y), {}, r"images must be in \[0, 1\]"),
        ([], {}, "no images"),
        ([x], {}, r"\(images, labels\)"),
        (test_set, {"attacks": ("pgd-9000",)}, "unknown attack 'pgd-9000'"),
        (test_set, {"attacks": ()}, "no attack asked for"),
        (test_set, {"eps": 0}, "eps must be positive"),
        (test_set, {"eps": 1.01}, "did you mean 1.01/255"),
        (test_set, {"norm": "L7"}, "norm must be Linf or L2"),
    ]
    for data, options, message in cases:
        with pytest.raises(EvaluationError, match=message):
            msfx.evaluate(sparse, data, **{**QUICK, **options})
    with pytest.raises(StateError, match="no MeanSparse operators"):
        msfx.evaluate(net, test_set, **QUICK)
    two = nn.Sequential(nn.Flatten(), nn.Linear(243, 2))
    with pytest.raises(EvaluationError, match="needs at least 4 classes"):
        attack("apgd-t", two, x, y % 2, AttackSettings(eps=0.1))


def test_non_finite_logits_are_refused(test_set):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] / 0

    with pytest.raises(EvaluationError, match="NaN or inf"):
        attack("apgd-ce", Broken(), *test_set, AttackSettings(eps=0.1))


# Long runs.


ATTACK = plan.attack


class Killed(Exception):
    """Stands for the process's end."""


def count_attacks(monkeypatch, die_at: int | None = None) -> list[int]:
    """Return a list that gets the number of images of every attack made; die before the ``die_at``-th."""
    made: list[int] = []

    def attack_or_die(name, model, images, *args):
        if len(made) == die_at:
            raise Killed
        made.append(len(images))
        return ATTACK(name, model, images, *args)

    monkeypatch.setattr(plan, "attack", attack_or_die)
    return made


def numbers(result) -> dict:
    values = result.to_dict()
    values.pop("seconds")
    return values


@pytest.mark.parametrize("full_rows", [False, True])
@pytest.mark.parametrize("die_at", [0, 3, 7, 12])
def test_interrupted_anywhere_it_ends_the_same(sparse, test_set, tmp_path, monkeypatch, die_at, full_rows):
    options = QUICK | {"attacks": ("pgd", "square"), "queries": 20, "batch_size": 5, "full_rows": full_rows}
    whole_run = count_attacks(monkeypatch)
    whole = msfx.evaluate(sparse, test_set, **options)
    path = tmp_path / "c"
    before = count_attacks(monkeypatch, die_at)
    with pytest.raises(Killed):
        msfx.evaluate(sparse, test_set, checkpoint=path, **options)
    after = count_attacks(monkeypatch)
    resumed = msfx.evaluate(sparse, test_set, checkpoint=path, **options)
    assert numbers(resumed) == numbers(whole)
    # A sanity piece is several attacks, done again if it was cut in the middle.
    assert len(whole_run) <= len(before) + len(after) <= len(whole_run) + 2
    again = count_attacks(monkeypatch)
    assert numbers(msfx.evaluate(sparse, test_set, checkpoint=path, **options)) == numbers(whole)
    assert not again, "all of it is on disk"


def test_checkpoint_of_another_run_is_refused(sparse, test_set, tmp_path, net, images):
    images, labels = test_set
    path = tmp_path / "c"
    options = QUICK | {"checkpoint": path, "batch_size": 5, "sanity_images": 0}
    msfx.evaluate(sparse, test_set, **options)
    kept = path.read_bytes()
    cases = [
        (test_set, {"eps": 0.06}, r"attack settings differ \(eps was 0.05 and is 0.06\)"),
        (test_set, {"seed": 1}, "attack settings differ"),
        (test_set, {"full_rows": True}, "attack settings differ"),
        (test_set, {"attacks": ("pgd",)}, r"backwards differ \(\['apgd-ce/exact', .*\] there, \['pgd/exact', .* here"),
        (test_set, {"backwards": ("exact",)}, "attacks or backwards differ"),
        ((images.flip(0), labels.flip(0)), {}, "batch 0 differs"),
        ((images, labels.roll(1)), {}, "batch 0 differs"),
        (test_set, {"batch_size": 4}, "batch 0 differs"),
        ((images[:5], labels[:5]), {}, "2 batches of it did not come again"),
    ]
    for data, change, message in cases:
        with pytest.raises(EvaluationError, match=message):
            msfx.evaluate(sparse, data, **options | change)
    msfx.set_alpha(sparse, 0.2)
    with pytest.raises(EvaluationError, match="statistics, alphas or variants differ"):
        msfx.evaluate(sparse, test_set, **options)
    msfx.set_alpha(sparse, 0.3)
    with torch.no_grad():
        sparse.conv1.weight += 0.01
    with pytest.raises(EvaluationError, match="weights differ"):
        msfx.evaluate(sparse, test_set, **options)
    with torch.no_grad():
        sparse.conv1.weight -= 0.01
    path.write_bytes(kept[:-100])
    with pytest.raises(msfx.MeanSparseError, match="truncated"):
        msfx.evaluate(sparse, test_set, **options)
    with pytest.raises(WriteError, match="directory does not exist"):
        msfx.evaluate(sparse, test_set, **options | {"checkpoint": tmp_path / "none" / "c"})


def test_what_is_broken_is_left_alone_and_the_worst_case_keeps_its_meaning(sparse, test_set, monkeypatch):
    options = QUICK | {"attacks": ("apgd-ce", "pgd"), "eps": 0.02, "sanity_images": 0}
    all_made = count_attacks(monkeypatch)
    whole = msfx.evaluate(sparse, test_set, full_rows=True, **options)
    fewer_made = count_attacks(monkeypatch)
    result = msfx.evaluate(sparse, test_set, **options)
    assert (result.cumulative, whole.cumulative) == (True, False)
    assert "all rows above" in str(result)
    assert "rows above" not in str(whole)
    for outcome in (result.base, result.sparse):
        standing = outcome.clean
        for mask in outcome.robust.values():
            assert not (mask & ~standing).any()
            standing = mask
        assert torch.equal(outcome.worst, standing)
    first = "apgd-ce/exact"
    assert torch.equal(result.sparse.robust[first], whole.sparse.robust[first]), "nothing was broken before it"
    assert 0 < int(result.base.worst.sum()) < 12
    assert sum(fewer_made) < sum(all_made)
    # What an attack met is what the one before left of each model's images.
    left = [[int(mask.sum()) for mask in o.robust.values()] for o in (result.base, result.sparse)]
    expected = [int(o.clean.sum()) for o in (result.base, result.sparse)]
    assert fewer_made == [expected[0], *left[0][:3], expected[1], *left[1][:3]]


def test_each_model_is_attacked_from_the_images_that_broke_the_other(sparse, test_set, monkeypatch):
    """A rigged attack breaks other images of each model; the start gets these, and no others."""
    images, _ = test_set
    hit = {"base": torch.arange(12) < 6, "sparse": torch.arange(12) % 2 == 0}
    met = []

    def rigged(name, model, x, y, settings, backward, starts):
        which = "sparse" if any(isinstance(m, MeanSparse) for m in model.modules()) else "base"
        if starts is not None:
            met.append((which, x, starts))
            return starts
        at = torch.tensor([int((images == i).flatten(1).all(1).nonzero()[0]) for i in x])
        return torch.where(hit[which][at].view(-1, 1, 1, 1), x + 1e-3, x)

    monkeypatch.setattr(plan, "attack", rigged)
    known = {i.numpy().tobytes() for i in images}
    right = lambda model, x, y: torch.tensor([i.numpy().tobytes() in known for i in x], dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(batch, "correct", right)
    options = QUICK | {"attacks": ("apgd-ce", "apgd-start"), "sanity_images": 0, "backwards": ("exact",)}
    result = msfx.evaluate(sparse, test_set, **options)
    # What breaks one model breaks the other, so nothing is left to start from; with rows of their own there is.
    assert torch.equal(result.base.worst, ~(hit["base"] | hit["sparse"]))
    assert torch.equal(result.base.robust["transfer"], result.base.worst)
    assert [len(x) for _, x, _ in met] == [0, 0]
    met.clear()
    msfx.evaluate(sparse, test_set, full_rows=True, **options)
    for which, x, starts in met:
        other = hit["sparse" if which == "base" else "base"]
        assert torch.equal(x, images[other])
        assert torch.equal(starts, images[other] + 1e-3)


def test_a_loader_that_streams_is_enough(sparse, test_set):
    images, labels = test_set
    streamed = msfx.evaluate(sparse, (b for b in zip(images.split(5), labels.split(5), strict=True)), **QUICK)
    assert numbers(streamed) == numbers(msfx.evaluate(sparse, test_set, batch_size=5, **QUICK))
    (planted,) = [check for check in streamed.checks if check.name == "planted examples, base"]
    assert int(re.search(r"of (\d+) planted", planted.finding)[1]) <= 5, "in the first batch alone"


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    """The real thing: SIGKILL, in the middle of attacks on the bundled network."""
    data, statistics = "meansparse_fx/bundled/fashion_mnist_subset.npz", tmp_path / "s"
    meansparse = [sys.executable, "-m", "meansparse_fx"]
    calibrate = ["calibrate", "bundled", "--data", data, "--split", "calibration", "--limit", "200"]
    subprocess.run([*meansparse, *calibrate, "--out", statistics], check=True, capture_output=True)
    attack = ["evaluate", "bundled", "--data", data, "--split", "test", "--limit", "48", "--batch-size", "16"]
    attack += ["--statistics", str(statistics), "--alpha", "0.3", "--eps", "0.1", "--steps", "30"]
    attack += ["--attacks", "apgd-ce,pgd"]
    subprocess.run([*meansparse, *attack, "--out", tmp_path / "whole"], check=True, capture_output=True)
    path, kills = tmp_path / "c", 0
    command = [*meansparse, *attack, "--checkpoint", path, "--out", tmp_path / "out"]
    for moment in (0.0, 0.7):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2, "the evaluation was over too soon to be killed"
    subprocess.run(command, check=True, capture_output=True)
    whole, resumed = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("whole", "out"))
    for report in (whole, resumed):
        report.pop("seconds")
    assert resumed == whole


# Checks of the evaluation itself.


class Masked(nn.Module):
    """Is the image bright? Seen through a step function, whose gradient is zero: blind for every gradient attack."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1, bias=False)
        self.act = nn.ReLU()
        nn.init.constant_(self.scale.weight, 10.0)

    def forward(self, x):
        h = self.act(self.scale(torch.round(x * 64) / 64)).mean((1, 2, 3))
        return torch.stack([h - 4.6, 4.6 - h], 1)


def test_checks_fail_on_a_masked_model():
    images = torch.linspace(0.48, 0.52, 40).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    sparse = msfx.transform(Masked().eval(), images)
    msfx.calibrate(sparse, [images.flip(0) * 0.999], progress=False)
    labels = torch.zeros(40, dtype=torch.long)
    options = {"eps": 0.08, "steps": 10, "queries": 100, "attacks": ("apgd-ce", "square"), "progress": False}
    result = msfx.evaluate(sparse, (images, labels), base=msfx.restore(sparse), **options)
    failed = {check.name.partition(",")[0] for check in result.checks if not check.passed}
    assert failed == {
        "continuous outputs",
        "gradient of cross-entropy",
        "ascent",
        "unbounded attack",
        "Square against gradients",
    }
    assert "In doubt, 10 of the checks failed" in result.verdict
    passed = sum(check.passed for check in result.checks)
    assert f"{passed} of {passed + 10} passed" in " ".join(str(result).split())
    assert [c["passed"] for c in result.to_dict()["checks"]] == [c.passed for c in result.checks]


CHECKS = (
    "repeatable outputs",
    "logits",
    "continuous outputs",
    "gradient of cross-entropy",
    "ascent",
    "silent success",
    "unbounded attack",
    "more steps",
    "Square against gradients",
    "planted examples",
)


def test_checks_pass_on_a_sound_model(sparse, test_set):
    options = QUICK | {"steps": 20, "eps": 0.01, "attacks": ("apgd-ce", "square"), "queries": 20}
    msfx.set_alpha(sparse, 0.01)
    result = msfx.evaluate(sparse, test_set, **options)
    names = [check.name for check in result.checks]
    assert names[:3] == ["base above chance", "classes seen", "threat"]
    assert names[3:-2] == [f"{name}, {which}" for which in ("base", "with MeanSparse") for name in CHECKS]
    assert names[-2:] == ["distinct images", "calibration data"]
    assert result.warnings == []
    assert "In doubt" not in result.verdict


@pytest.mark.parametrize("name", ["adaptive-1-1", "apgd-start/annealed"])
def test_an_attack_that_cannot_look_for_planted_examples_may_be_alone(name, sparse, test_set):
    result = msfx.evaluate(sparse, test_set, **QUICK | {"attacks": (name,)})
    names = {check.name for check in result.checks}
    assert "logits, base" in names
    assert "planted examples, base" not in names


def test_checks_look_at_as_many_images_as_are_asked_for(sparse, test_set):
    """At the first ones, whichever batches they are in."""
    for count in (3, 5, 7, 12, 99):
        result = msfx.evaluate(sparse, test_set, **QUICK | {"steps": 1, "batch_size": 5, "sanity_images": count})
        for which, outcome in (("base", result.base), ("with MeanSparse", result.sparse)):
            (check,) = (check for check in result.checks if check.name == f"repeatable outputs, {which}")
            assert f"0 of {int(outcome.clean[:count].sum())} images" in check.finding


def test_checks_can_be_left_out(sparse, test_set, monkeypatch):
    made = count_attacks(monkeypatch)
    result = msfx.evaluate(sparse, test_set, sanity_images=0, **QUICK)
    assert len(made) == 4
    names = ["base above chance", "classes seen", "threat", "distinct images", "calibration data"]
    assert [check.name for check in result.checks] == names


@pytest.mark.parametrize(
    ("labels", "classes", "right", "failed"),
    [
        (torch.arange(100) % 10, 10, 3, {"base above chance"}),  # shifted
        (torch.arange(100) % 10, 10, 14, {"base above chance"}),  # no better than guessing
        (torch.arange(100) % 10, 10, 30, set()),
        (torch.arange(30) % 10, 10, 4, set()),  # few: no more than one more image right than by chance
        (torch.arange(30) % 2, 10, 5, {"base above chance"}),  # few, and yet worse than chance
        (torch.arange(100) // 50, 1000, 70, {"classes seen"}),  # the first of a sorted set
        (torch.zeros(100), 10, 70, {"classes seen"}),
        (torch.zeros(3), 10, 0, set()),
        (torch.arange(100) % 2, 2, 70, set()),
        (torch.arange(100) % 5, 10, 70, set()),
        (torch.arange(100) % 4, 10, 70, {"classes seen"}),
    ],
)
def test_labels_that_cannot_be_the_images_are_noticed(labels, classes, right, failed):
    checks = sanity.checks_of_labels(labels.long(), classes, torch.arange(len(labels)) < right)
    assert {check.name for check in checks if not check.passed} == failed


def test_shifted_labels_put_the_verdict_in_doubt(sparse, net):
    images = torch.rand(60, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    labels = (net(images).argmax(1) + 1) % 10
    result = msfx.evaluate(sparse, (images, labels), sanity_images=0, **QUICK)
    assert "of the checks failed: base above chance: 0 of 60 images right" in result.verdict


def test_the_verdict_names_every_check_that_failed():
    mask = torch.ones(100, dtype=torch.bool)
    models = [ModelOutcome(mask, {"a/exact": mask, "a/identity": mask})] * 2
    checks = tuple(sanity.Check(name, False, f"of {name}") for name in ("this", "that"))
    result = msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0, checks=checks)
    assert result.verdict.endswith("In doubt, 2 of the checks failed: this: of this. that: of that.")


@pytest.mark.parametrize(
    ("more", "of", "passed"),
    [(0, 100, True), (2, 100, True), (3, 100, False), (50, 100, False), (20, 10_000, True), (21, 10_000, False)],
)
def test_steps_that_find_more_are_noticed(more, of, passed):
    nothing = ModelOutcome(torch.ones(of, dtype=torch.bool))
    (check,) = sanity.checks_of("base", {"twice the steps": torch.arange(of) >= more}, nothing, ())
    assert (check.name, check.passed) == ("more steps, base", passed)
    assert check.finding.startswith(f"{more} of {of} images that survived everything fall to one more run")
    assert ("not complete" in check.finding) != passed


@pytest.mark.parametrize("full_rows", [False, True])
@pytest.mark.parametrize(("alone", "passed"), [(0, True), (2, True), (3, False), (50, False)])
def test_what_square_alone_breaks_is_counted(alone, passed, full_rows):
    """Where rows count what survives all above them, the attack that starts at Square's images survives Square."""
    n = torch.arange(1000)
    rows = {"pgd/exact": n < 800, "pgd/identity": n < 700, "square": n >= alone, "apgd-start/annealed": n >= alone}
    if not full_rows:
        rows |= {"square": (n < 700) & (n >= alone), "apgd-start/annealed": (n < 700) & (n >= alone)}
    runs = plan_runs(rows, (), 0)
    (check,) = sanity.checks_of("base", {}, ModelOutcome(n < 900, rows), runs)
    assert check.passed == passed
    assert check.finding.startswith(f"{alone} of 1000")
    assert ("masked" in check.finding) != passed
    assert not list(
        sanity.checks_of("base", {}, ModelOutcome(n < 900, {"square": n < 700}), plan_runs("square", (), 0))
    )


class Confused(nn.Module):
    """Stands for a compiled model that went wrong: it takes every image for another class than the model does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return -self.model(x)


def test_what_a_compiled_model_falls_for_must_fool_the_model_itself(sparse, test_set, monkeypatch):
    options = QUICK | {"eps": 0.3, "sanity_images": 0}
    assert float(msfx.evaluate(sparse, test_set, **options).sparse.worst.double().mean()) < 0.5
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: asked.append(mode) or Confused(model))
    result = msfx.evaluate(sparse, test_set, compile=True, **options)
    assert asked == ["default", "default"], "the base and the transformed model"
    for outcome in (result.base, result.sparse):
        assert torch.equal(outcome.worst, outcome.clean), "the attack left what it took for broken as it was"


def test_attacks_in_lower_precision_are_checked_in_full(sparse, test_set):
    seen = {True: 0, False: 0}
    operator = next(iter(msfx.operators(sparse).values()))
    hook = operator.register_forward_pre_hook(
        lambda *_: seen.update({(low := torch.is_autocast_enabled("cpu")): seen[low] + 1})
    )
    result = msfx.evaluate(sparse, test_set, amp=torch.bfloat16, **QUICK | {"sanity_images": 0, "full_rows": True})
    hook.remove()
    # Full precision: the number of classes for the labels and for the attacks, clean, then after each of two attacks on
    # it and what broke the base.
    assert seen[False] == 6
    assert seen[True] > 2 * QUICK["steps"]
    assert set(result.sparse.robust) == {"apgd-ce/exact", "apgd-ce/identity", "transfer"}


def test_attacks_that_compiled_programs_cannot_serve_get_the_model_itself(sparse, test_set, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: Confused(model))
    options = QUICK | {"attacks": ("adaptive-1-1", "fab"), "sanity_images": 0}
    plain, swift = (msfx.evaluate(sparse, test_set, compile=c, **options) for c in (False, True))
    assert numbers(swift) == numbers(plain)


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_batches_are_padded_where_graphs_are_recorded(sparse, test_set, monkeypatch, mode):
    """Images that are broken are left out; what stands is filled up to few sizes, and nothing else changes."""
    sizes = set()

    def counted(model, dynamic, mode):
        return lambda x: sizes.add(len(x)) or model(x)

    options = QUICK | {"attacks": ("apgd-ce", "square"), "queries": 20, "eps": 0.1, "sanity_images": 2}
    plain = msfx.evaluate(sparse, test_set, **options)
    monkeypatch.setattr(torch, "compile", counted)
    fast = msfx.evaluate(sparse, test_set, compile=mode, **options)
    assert min(sizes) >= 2
    assert len(sizes) > 2, "images were broken and left out"
    assert (mode is True) or all(size == padded(size) for size in sizes)
    for which in ("base", "sparse"):
        differ = getattr(plain, which).worst ^ getattr(fast, which).worst
        assert int(differ.sum()) <= 1, "other batch sizes round differently, which may tip an image"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_padding_changes_neither_logits_nor_gradients(sparse, images, monkeypatch, mode, count):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: seen.append(len(x)) or model(x))
    fast = FastModel(sparse, mode, None)
    results = []
    for model in (sparse, fast):
        x = images[:count].clone().requires_grad_()
        logits = model(x)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    assert seen == [padded(count) if mode == "reduce-overhead" else max(2, count)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


class Recorded(torch.autograd.Function):
    """Stands for a recorded graph: what it returns, it overwrites the next time."""

    logits, gradient = torch.zeros(4, 2), torch.zeros(4, 1, 2, 2)

    @staticmethod
    def forward(ctx, x):
        return Recorded.logits.copy_(x.flatten(1)[:, :2]).view_as(Recorded.logits)

    @staticmethod
    def backward(ctx, grad):
        Recorded.gradient.zero_().flatten(1)[:, :2] = grad
        return Recorded.gradient.view_as(Recorded.gradient)


def test_no_gradient_is_made_that_nobody_wants(sparse, images):
    fast, x = FastModel(sparse, None, None), images.clone().requires_grad_()
    with torch.no_grad():
        assert not fast(x).requires_grad
    assert fast(x).requires_grad
    assert not fast(images).requires_grad, "the images want none"


def test_what_a_recorded_graph_returned_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: Recorded.apply)
    fast = FastModel(nn.Identity(), "reduce-overhead", None)
    x = torch.rand(4, 1, 2, 2, requires_grad=True)
    logits = fast(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    kept = logits.clone(), gradient.clone()
    again = fast(x + 1)
    torch.autograd.grad((2 * again).sum(), x)
    assert torch.equal(logits, kept[0])
    assert torch.equal(gradient, kept[1])


def test_padded_sizes_are_few():
    sizes = [padded(count) for count in range(1, 513)]
    assert all(count <= size < 1.3 * count + 2 for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 28
    assert sizes[0] == 2, "a batch of one is another program"


@pytest.mark.parametrize("mode", [None, False, True, "max-autotune"])
def test_modes(mode):
    assert compile_mode(mode) == {None: None, False: None, True: "default"}.get(mode, mode)


def test_a_mode_that_torch_lacks_is_named(sparse, test_set):
    with pytest.raises(EvaluationError, match=r"no mode 'fast': one of default, .*reduce-overhead"):
        msfx.evaluate(sparse, test_set, compile="fast", **QUICK)


@pytest.mark.slow
def test_attacks_compile_a_program_for_each_kind_of_backward(sparse, test_set, monkeypatch):
    """Neither the annealed gate's five widths, nor another alpha, nor images left out compile anything anew."""
    counters, compile = [], torch.compile

    def counted(model, mode, **options):
        counters.append(CompileCounterWithBackend("aot_eager"))
        return compile(model, backend=counters[-1], **options)

    monkeypatch.setattr(torch, "compile", counted)
    settings = AttackSettings(eps=0.05, steps=10, queries=10)
    attacked = Attacked(sparse, plan.AttackPlan((), settings, compile="reduce-overhead"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        programs = []
        for attacks in ("apgd-ce/exact", "apgd-ce/identity", "apgd-ce/annealed", "square"):
            (run,), counts = plan_runs([attacks], (), 0), []
            for alpha, count in ((0.3, 12), (0.3, 7), (0.1, 12), (0.1, 1)):
                msfx.set_alpha(sparse, alpha)
                attacked.perturbed(run, *(t[:count] for t in test_set))
                counts.append(counters[0].frame_count)
            assert len(set(counts)) == 1, "another alpha, or fewer images, compiled anew"
            programs.append(counts[0])
    first = programs[0]  # without a gradient, and with the operator's own
    assert programs == [first, first + 1, first + 2, first + 2]


@pytest.mark.slow
def test_compiled_attacks_find_as_much(sparse, test_set):
    options = QUICK | {"eps": 0.03, "sanity_images": 0}
    plain, compiled = (msfx.evaluate(sparse, test_set, compile=c, **options) for c in (False, True))
    for which in ("base", "sparse"):
        differ = getattr(plain, which).worst ^ getattr(compiled, which).worst
        assert int(differ.sum()) <= 1, "compiled gradients round differently, which may tip an image"


class Pair:
    """A group of two processes, as far as `evaluate` asks it."""

    def __init__(self, rank: int):
        self._rank = rank

    def rank(self):
        return self._rank

    def size(self):
        return 2


def test_two_processes_find_what_one_finds(sparse, test_set, tmp_path, monkeypatch):
    options = QUICK | {"attacks": ("pgd", "square"), "queries": 10, "batch_size": 5, "sanity_images": 7}
    options |= {"save_adversarial": tmp_path / "whole", "progress": True}
    whole = msfx.evaluate(sparse, test_set, **options)
    parts, displays = [], bars(monkeypatch)
    options |= {"save_adversarial": tmp_path / "together"}

    class Alone:
        """It has found what it can, and the other process is gone."""

        def __init__(self, group, error):
            self.error = error

        def gather(self, value, point):
            parts.append(value)
            raise self.error("lost another process")

    path = tmp_path / "c"
    monkeypatch.setattr(run, "Ranks", Alone)
    for rank in range(2):
        with pytest.raises(EvaluationError, match="lost another process"):
            msfx.evaluate(sparse, test_set, group=Pair(rank), checkpoint=path, **options)
    assert {file.name for file in tmp_path.iterdir()} == {"c.rank0-of-2", "c.rank1-of-2", "whole"}
    assert [display.disable for display in displays] == [False, True], "one bar for both"
    # Of three batches, three runs and two models: two batches are the first process's.
    assert [(task.completed, task.total) for display in displays for task in display.tasks] == [(12, 12), (6, 12)]
    parts = [(*part[:3], seconds) for part, seconds in zip(parts, (1000.0, 2000.0), strict=True)]
    monkeypatch.setattr(Alone, "gather", lambda *_: parts)
    made = count_attacks(monkeypatch)
    found = msfx.evaluate(sparse, test_set, group=Pair(1), checkpoint=path, **options)
    assert numbers(found) == numbers(whole)
    assert found.seconds == 2000, "the slower one's"
    assert not (tmp_path / "together").exists(), "the first process writes"
    msfx.evaluate(sparse, test_set, group=Pair(0), checkpoint=path, **options)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not made, "each goes on from its own file"
    with pytest.raises(ArtifactError, match="a checkpoint of 2 process"):
        msfx.evaluate(sparse, test_set, checkpoint=path, **options)
    images, labels = test_set
    for other in ((images[:5], labels[:5]), (images.flip(0), labels.flip(0))):  # fewer, or in another order
        with pytest.raises(EvaluationError, match="process 0 evaluated another model, other images"):
            msfx.evaluate(sparse, other, group=Pair(0), **options)


# Evidence.


def test_adversarial_images_are_kept_and_can_be_checked_without_attacking(sparse, test_set, tmp_path, monkeypatch):
    options = QUICK | {"attacks": ("adaptive",), "queries": 20, "batch_size": 5, "sanity_images": 0, "eps": 0.01}
    path = tmp_path / "adversarial"
    msfx.set_alpha(sparse, 0.05)
    result = msfx.evaluate(sparse, test_set, save_adversarial=path, **options)
    kept = Evidence.load(path)
    images, labels = test_set
    assert torch.equal(kept.images, images)
    assert torch.equal(kept.labels, labels)
    assert kept.rows == ("clean", *result.sparse.robust)
    for which, model, outcome in (("base", msfx.restore(sparse), result.base), ("sparse", sparse, result.sparse)):
        adversarial, by = kept.adversarial[which], kept.broken_by[which]
        assert 0 < int((by >= 0).sum()) < 12
        assert torch.equal(by < 0, outcome.worst)
        assert torch.equal(adversarial[by <= 0], images[by <= 0])
        assert torch.equal(model(adversarial).argmax(1) == labels, outcome.worst)
        right = torch.stack([outcome.clean, *outcome.robust.values()])
        assert torch.equal(by, torch.where(right.all(0), -1, (~right).int().argmax(0))), "the first row that is wrong"
    monkeypatch.setattr(plan, "attack", None)
    fresh = copy.deepcopy(sparse)
    msfx.set_alpha(fresh, 0.0)
    found = msfx.verify(path, fresh)
    assert found.holds
    assert msfx.get_alpha(fresh) == pytest.approx(0.05)
    assert found.broken == {w: int((~o.worst).sum()) for w, o in (("base", result.base), ("sparse", result.sparse))}
    lines = str(found).splitlines()
    for line, outcome in zip(lines, (result.base, result.sparse), strict=False):
        assert f"wrong on {int((~outcome.worst).sum())} of {len(images)} images" in line
        assert f"accuracy at most {100 * outcome.worst.double().mean():.1f} %" in line
    assert lines[2:] == ["The file holds."]
    external = external_evaluation(path)
    assert torch.equal(external["x_adv"], kept.adversarial["sparse"])

    forged = {**kept.adversarial, "sparse": images}  # claims what does not hold
    replace(kept, adversarial=forged).save(tmp_path / "forged")
    assert not msfx.verify(tmp_path / "forged", fresh).holds
    outside = {**kept.adversarial, "base": (images + 0.02).clamp(0, 1)}
    replace(kept, adversarial=outside).save(tmp_path / "outside")
    with pytest.raises(EvaluationError, match="left its ball"):
        msfx.verify(tmp_path / "outside", fresh)
    with torch.no_grad():
        fresh.conv1.weight += 0.01
    with pytest.raises(EvaluationError, match="of another model"):
        msfx.verify(path, fresh)


def test_evidence_keeps_every_switch_of_every_site(net, sparse, test_set, tmp_path):
    first, *_, last = msfx.operators(sparse).values()
    first.set_variant("smooth", "zero", 3.0)
    last.strict = True
    last.set_backward("smooth", 7.0)
    msfx.evaluate(sparse, test_set, save_adversarial=tmp_path / "kept", **ONE_STEP)
    plain = msfx.transform(net, test_set[0])
    msfx.set_statistics(plain, added(sparse).statistics)
    assert msfx.verify(tmp_path / "kept", plain).holds
    switches = {name: operator.switches() for name, operator in msfx.operators(plain).items()}
    assert switches == {name: operator.switches() for name, operator in msfx.operators(sparse).items()}
    assert torch.equal(plain(test_set[0]), sparse(test_set[0]))
    fewer = msfx.transform(net, test_set[0], placement=msfx.Placement(exclude=f"^{last.name}$"))
    with pytest.raises(EvaluationError, match=f"{last.name} has one there only"):
        msfx.verify(tmp_path / "kept", fewer)


def test_interrupted_evidence_is_the_same(sparse, test_set, tmp_path, monkeypatch):
    options = QUICK | {"attacks": ("adaptive",), "queries": 20, "batch_size": 5, "sanity_images": 0, "eps": 0.01}
    msfx.evaluate(sparse, test_set, save_adversarial=tmp_path / "whole", **options)
    count_attacks(monkeypatch, 17)
    options |= {"checkpoint": tmp_path / "c", "save_adversarial": tmp_path / "resumed"}
    with pytest.raises(Killed):
        msfx.evaluate(sparse, test_set, **options)
    count_attacks(monkeypatch)
    msfx.evaluate(sparse, test_set, **options)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


ONE_STEP: dict = {"attacks": "pgd", "backwards": "exact", "steps": 1, "sanity_images": 0, "progress": False}


def calibration_check(sparse, test):
    (found,) = [c for c in msfx.evaluate(sparse, test, **ONE_STEP).checks if c.name == "calibration data"]
    return found


@pytest.mark.parametrize("change", ["eps", "hook"])
def test_a_checkpoint_of_the_same_weights_in_another_function_is_refused(net, images, labels, tmp_path, change):
    def sparse():
        made = msfx.transform(net, images)
        msfx.set_statistics(made, statistics, check_weights=False)
        msfx.set_alpha(made, 0.2)
        return made

    first = msfx.transform(net, images)
    statistics = msfx.calibrate(first, images.flip(3).split(4), checkpoint=tmp_path / "c", progress=False)
    data, search = (images, labels), {"attacks": "pgd", "steps": 1, "alphas": 0.2, "progress": False}
    msfx.evaluate(sparse(), data, checkpoint=tmp_path / "e", **ONE_STEP)
    msfx.select_alpha(sparse(), data, checkpoint=tmp_path / "s", **search)
    assert torch.equal(
        msfx.calibrate(sparse(), images.flip(3).split(4), checkpoint=tmp_path / "c", progress=False)["relu"].mean,
        statistics["relu"].mean,
    )
    if change == "eps":
        net.bn.eps = 0.5
    else:
        net.head.register_forward_hook(lambda module, inputs, output: -output)
    for call in (
        lambda: msfx.evaluate(sparse(), data, checkpoint=tmp_path / "e", **ONE_STEP),
        lambda: msfx.select_alpha(sparse(), data, checkpoint=tmp_path / "s", **search),
        lambda: msfx.calibrate(sparse(), images.flip(3).split(4), checkpoint=tmp_path / "c", progress=False),
    ):
        with pytest.raises(MeanSparseError, match=r"a checkpoint of another model; it has the same weights"):
            call()


def test_images_are_compared_with_those_of_calibration(net, images, labels):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.flip(3), progress=False)
    assert calibration_check(sparse, (images, labels)).passed
    larger = torch.nn.functional.interpolate(images, 12)
    found = calibration_check(sparse, (larger, labels))
    assert not found.passed
    assert "3x9x9, and these are 3x12x12" in found.finding
    msfx.calibrate(sparse, images.flip(3) / 255, progress=False)
    assert "divided twice" in calibration_check(sparse, (images, labels)).finding
    with pytest.warns(UserWarning, match="divided twice"):
        msfx.select_alpha(sparse, (images, labels), alphas=(), attacks="pgd", steps=1, progress=False)
    msfx.calibrate(sparse, images * 4 - 2, progress=False)
    for verb in (msfx.evaluate, msfx.select_alpha):
        with pytest.raises(EvaluationError, match=r"measured on images from -.*calibrate on images in \[0, 1\]"):
            verb(sparse, (images, labels), progress=False)


def test_images_that_were_calibrated_on_are_noticed(net, images, tmp_path):
    np.savez(tmp_path / "x.npz", images=images.numpy(), labels=np.arange(12) % 10)
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, load_images(tmp_path / "x.npz", limit=8).loader(4), progress=False)
    rest = load_images(tmp_path / "x.npz", skip=8)
    msfx.save(sparse, tmp_path / "s")
    for model in (sparse, msfx.load(tmp_path / "s", net, images)):
        assert calibration_check(model, rest.loader(4)).passed
        seen = calibration_check(model, load_images(tmp_path / "x.npz", skip=6).loader(4))
        assert not seen.passed
        assert "2 of these images were calibrated on" in seen.finding


def test_a_resumed_run_says_where_it_goes_on(sparse, test_set, tmp_path, monkeypatch, capsys):
    options = ONE_STEP | {"progress": True, "batch_size": 5, "checkpoint": tmp_path / "c"}
    count_attacks(monkeypatch, 3)  # each batch meets one attack for the base and one for the sparse model
    with pytest.raises(Killed):
        msfx.evaluate(sparse, test_set, **options)
    assert "goes on" not in capsys.readouterr().out
    count_attacks(monkeypatch)
    msfx.evaluate(sparse, test_set, **options)
    assert "goes on from batch 2 of 3\n" in capsys.readouterr().out


def test_a_resumed_calibration_says_where_it_goes_on(net, images, tmp_path, capsys):
    sparse, kept = msfx.transform(net, images), tmp_path / "c"

    class Broken(list):
        def __getitem__(self, index):
            if index == 2 and not (tmp_path / "mended").exists():
                raise Killed
            return super().__getitem__(index)

    batches = Broken(images.split(4))
    with pytest.raises(Killed):
        msfx.calibrate(sparse, batches, checkpoint=kept, every=0)
    (tmp_path / "mended").touch()
    msfx.calibrate(sparse, batches, checkpoint=kept, every=0)
    assert "goes on from batch 3 of 3\n" in capsys.readouterr().out


class OfAnyShape(nn.Module):
    """A linear layer or convolution over inputs of one shape, an activation, a readout of 10 classes."""

    def __init__(self, first, features):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.head = first(), nn.ReLU(), nn.Linear(features, 10)

    def forward(self, x):
        return self.head(self.act(self.first(x)).flatten(1))


@pytest.mark.parametrize(("base", "sparse", "words"), [(0, 0, "too strong"), (99, 99, "too weak"), (0, 40, "")])
def test_a_threat_that_tells_nothing_is_said(base, sparse, words):
    clean = torch.arange(120) < 100
    sides = [ModelOutcome(clean, {"pgd/exact": clean & (torch.arange(120) < left)}) for left in (base, sparse)]
    if words == "too weak":
        sides = [ModelOutcome(clean, {"pgd/exact": clean}) for _ in range(2)]
    (check,) = sanity.check_threat(*sides)
    assert check.passed == (not words)
    assert words in check.finding
    assert not list(sanity.check_threat(*[ModelOutcome(clean)] * 2)), "not attacked"


def test_alpha_zero_is_not_attacked(sparse, test_set, monkeypatch, tmp_path):
    made = count_attacks(monkeypatch)
    msfx.set_alpha(sparse, 0)
    result = msfx.evaluate(sparse, test_set, **QUICK)
    assert not made
    assert result.verdict.startswith("Nothing compared: alpha is 0")
    assert [what for what, *_ in result.rows()] == ["clean"]
    assert "not attacked" in str(result)
    result.save(tmp_path / "e")
    assert str(msfx.Evaluation.load(tmp_path / "e")) == str(result)
    assert "clean" in result.to_csv()
    result.figure()
    msfx.evaluate(sparse, test_set, base=msfx.restore(sparse), **QUICK)
    assert made, "with a base of its own it is a comparison"


def test_the_progress_line_fits_80_columns(monkeypatch):
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    notes = ("worst: base 100.0%, sparse 100.0%", "base: worst case 100.0%", "worst case 100.0%", "1,000,000 images/s")
    for task, note in zip(("attack", "select alpha", "site by site", "calibrate"), notes, strict=True):
        display = progress.bar()
        display.add_task(task, total=1234, completed=1000, note=note)
        with console.capture() as capture:
            console.print(display.get_renderable())
        (line,) = capture.get().splitlines()
        assert note in line
        assert "left" in line


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("first", "features", "shape"),
    [
        (lambda: nn.Linear(20, 30), 30, (20,)),
        (lambda: nn.Conv1d(2, 4, 3), 4 * 10, (2, 12)),
        (lambda: nn.Conv3d(1, 4, 3), 4 * 64, (1, 6, 6, 6)),
    ],
)
def test_inputs_that_are_no_images(first, features, shape, norm):
    """All of the default but Square meets them, and every check; Square says what it needs."""
    model = OfAnyShape(first, features).eval()
    inputs = torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))
    test = inputs, model(inputs).argmax(1)
    sparse = msfx.transform(model, inputs)
    msfx.calibrate(sparse, [inputs.flip(-1)], progress=False)
    msfx.set_alpha(sparse, 0.2)
    options = {"norm": norm, "eps": 0.4 if norm == "Linf" else 1.5, "steps": 4, "progress": False}
    result = msfx.evaluate(sparse, test, **options)
    expected = [name for name in VERSIONS["adaptive"] if name != "square"]
    assert set(result.base.robust) == {*expected, "transfer"}
    assert float(result.base.worst.double().mean()) < 1
    assert {check.name for check in result.checks} >= {"planted examples, base", "ascent, base"}
    assert msfx.select_alpha(sparse, test, alphas=(0.2,), **options).leader in (0.0, 0.2)
    with pytest.raises(EvaluationError, match=r"square needs images \[N, C, H, W\], and these are"):
        msfx.evaluate(sparse, test, attacks=("apgd-ce", "square"), **options)


def test_lists_leave_out_what_needs_more_classes(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 2)).eval()
    sparse = msfx.transform(model, images)
    test, options = (images, model(images).argmax(1)), {"steps": 2, "queries": 5, "progress": False}
    result = msfx.evaluate(sparse, test, base=msfx.restore(sparse), **options)
    assert set(result.base.robust) == {*VERSIONS["adaptive"], "transfer"} - {"apgd-t/annealed"}


@pytest.mark.parametrize(
    ("norm", "move", "leaves"),
    [
        ("Linf", lambda x: x.add_(0.1), False),
        ("Linf", lambda x: x[0, 0, 0, 0].add_(0.1 + 5e-6), True),
        ("Linf", lambda x: x[0, 0, 0, 0].fill_(torch.nan), True),
        ("L2", lambda x: x[:, 0, 0, 0].add_(0.1), False),
        ("L2", lambda x: x[1, 0, 0, :2].add_(0.08), True),  # 0.08 * sqrt(2) = 0.113
        ("L2", lambda x: x.add_(0.1), True),
        ("Linf", lambda x: x.mul_(0).sub_(1e-3), True),
        ("Linf", lambda x: x.mul_(0).add_(1.001), True),
    ],
)
def test_an_attack_that_leaves_its_ball_is_refused(sparse, monkeypatch, norm, move, leaves):
    """In [0, 1], too: there the ball is made as large as all of it."""
    images = torch.full((2, 3, 9, 9), 0.5)
    moved = images.clone()
    move(moved)
    eps = 1.0 if move(torch.full((2, 3, 9, 9), 0.5)).abs().max() in (1e-3, 1.001) else 0.1
    built = type("Moving", (), {"perturb": lambda self, images, labels: moved})()
    row = replace(attacks.attack_kind("apgd-ce"), build=lambda model, settings: built)
    monkeypatch.setattr(attacks, "attack_kind", lambda name: row)

    def run():
        return attack("apgd-ce", sparse, images, torch.zeros(2).long(), AttackSettings(eps, norm))

    if leaves:
        with pytest.raises(EvaluationError, match=f"apgd-ce left its ball: {norm} distance"):
            run()
    else:
        assert torch.equal(run(), moved)


class OfFourPixels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.act, self.head = nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.norm(self.first(x))).flatten(1))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_nothing_is_missed_that_a_whole_grid_of_changes_finds(norm):
    """Of images of four pixels every change on a grid is tried: what it breaks the attacks break, and little else."""
    model, generator = OfFourPixels(), torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 2, 2, generator=generator)
    model(images), model.eval()  # of the norm's own statistics
    sparse = msfx.transform(model, images)
    msfx.calibrate(sparse, [torch.rand(500, 1, 2, 2, generator=generator)], progress=False)
    msfx.set_alpha(sparse, 0.3)
    eps, labels = 0.12, model(images).argmax(1)
    grid = torch.cartesian_prod(*[torch.linspace(-eps, eps, 13)] * 4)
    if norm == "L2":
        grid = grid * (eps / grid.norm(dim=1, keepdim=True).clamp_min(eps))
    moved = (images.unsqueeze(1) + grid.view(-1, 1, 2, 2)).clamp(0, 1)
    options = {"eps": eps, "norm": norm, "steps": 20, "queries": 50, "sanity_images": 0, "progress": False}
    result = msfx.evaluate(sparse, (images, labels), **options)
    assert ("square" in result.base.robust) == (norm == "Linf"), "in L2 it needs five rows"
    for network, outcome in ((msfx.restore(sparse), result.base), (sparse, result.sparse)):
        with torch.no_grad():
            stands = torch.stack(
                [(network(near).argmax(1) == label).all() for near, label in zip(moved, labels, strict=True)]
            )
        assert 0.1 < stands.double().mean() < 0.9
        assert (outcome.worst != stands).sum() <= 2, "one or two lie between the grid's points, or take more steps"
    with pytest.raises(EvaluationError, match="square needs images of 5 rows"):
        attack("square", sparse, images, labels, AttackSettings(eps, "L2"))


def test_logits_of_another_form_are_refused(images):
    sparse = msfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(1, 2)).eval(), images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.2)
    labels = torch.zeros(len(images), dtype=torch.long)
    with pytest.raises(EvaluationError, match=r"expected logits \[N, classes\] from the model, got \(2, "):
        msfx.evaluate(sparse, (images, labels), progress=False)
