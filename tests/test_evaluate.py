"""Evaluation and the choice of alpha, on networks small enough that the right answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.alpha import _choose
from meansparse_fx.errors import EvaluationError, StateError
from meansparse_fx.evaluate import ModelOutcome, PairedDifference
from meansparse_fx.evaluate.attacks import AttackSettings, attack

QUICK = {"steps": 5, "progress": False, "eps": 0.05}


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.3)
    return sparse


@pytest.fixture
def test_set(net, images):
    """Images with the model's own predictions as labels: clean accuracy of the base is 1."""
    return images, net(images).argmax(1)


def test_base_and_sparse_stand_side_by_side(sparse, test_set):
    result = msfx.evaluate(sparse, test_set, attacks=("apgd-ce", "square"), queries=10, **QUICK)
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
    result = msfx.evaluate(sparse, test_set, eps=1.0, steps=20, progress=False)
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
    result = msfx.evaluate(sparse, (images, labels), eps=0.08, steps=20, progress=False)
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


def test_select_alpha_prefers_the_best_worst_case(sparse, test_set):
    search = msfx.select_alpha(sparse, test_set, alphas=(0.2, 3.0), **QUICK)
    assert list(search.outcomes) == [0.0, 0.2, 3.0]
    worst = {a: int(o.worst.sum()) for a, o in search.outcomes.items()}
    allowed = [a for a, o in search.outcomes.items() if int(o.clean.sum()) >= 12 - 0.003 * 12]
    assert 3.0 not in allowed, "a band of three deviations flattens the features: the budget must refuse it"
    assert worst[search.alpha] == max(worst[a] for a in allowed)
    assert "chosen" in str(search)


def test_clean_is_measured_on_all_images_and_robust_on_those_attacked(sparse, test_set):
    search = msfx.select_alpha(sparse, test_set, alphas=(0.2,), attacked=7, batch_size=5, **QUICK)
    whole = msfx.select_alpha(sparse, test_set, alphas=(0.2,), batch_size=5, **QUICK)
    for alpha, found in search.outcomes.items():
        assert torch.equal(found.clean, whole.outcomes[alpha].clean)
        assert {len(m) for m in found.robust.values()} == {7} == {len(found.worst)}
        # The first batch of five is the same in both; the cut one starts elsewhere.
        assert all(torch.equal(m[:5], whole.outcomes[alpha].robust[n][:5]) for n, m in found.robust.items())


def outcome(clean: int, robust: int, n: int = 1000) -> ModelOutcome:
    return ModelOutcome(torch.arange(n) < clean, {"a": torch.arange(n) < robust})


def test_choice_keeps_to_the_budget_and_takes_the_smaller_of_equals():
    outcomes = {0.0: outcome(900, 700), 0.1: outcome(899, 720), 0.2: outcome(898, 720), 0.3: outcome(896, 800)}
    assert _choose(outcomes, 0.003) == 0.1
    assert _choose(outcomes, 0.004) == 0.3
    assert _choose({0.0: outcome(900, 700), 0.1: outcome(900, 650)}, 0.003) == 0.0


def test_paired_difference_against_known_values():
    before = torch.arange(1000) < 700
    after = (torch.arange(1000) < 730) & (torch.arange(1000) >= 10)
    d = PairedDifference.of(before, after)
    assert d.estimate == pytest.approx(0.02)
    # Normal approximation of the paired difference: sqrt(40 - 20**2 / 1000) / 1000.
    half = 1.96 * (40 - 0.4) ** 0.5 / 1000
    assert (d.low, d.high) == (pytest.approx(0.02 - half, abs=1.5e-3), pytest.approx(0.02 + half, abs=1.5e-3))
    assert d.p_value == pytest.approx(0.00222, abs=2e-5)  # binomial test of 10 in 40, from tables
    same = PairedDifference.of(before, before)
    assert (same.estimate, same.low, same.high, same.p_value) == (0, 0, 0, 1)


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
    assert result.verdict.startswith(word)


def test_no_verdict_without_an_attacker_who_knows():
    n = torch.arange(1000)
    models = [ModelOutcome(n < 900, {"a/exact": n < robust}) for robust in (700, 760)]
    assert msfx.Evaluation(*models, 0.2, 0.1, "Linf", 10, 0, 0, 1.0).verdict.startswith("Not tested against")


def test_bad_input_has_its_own_error(sparse, test_set, net):
    x, y = test_set
    cases = [
        ((x * 255, y), {}, r"images must be in \[0, 1\]"),
        ([], {}, "no images"),
        ([x], {}, r"\(images, labels\)"),
        (test_set, {"attacks": ("pgd-9000",)}, "unknown attack 'pgd-9000'"),
        (test_set, {"attacks": ()}, "no attack asked for"),
        (test_set, {"eps": 0}, "eps must be positive"),
        (test_set, {"eps": 8}, "did you mean 8/255"),
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
