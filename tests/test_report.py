"""The report: its numbers, its pictures, and what its headline admits."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx.alpha import AlphaSearch
from meansparse_fx.evaluate import Evaluation
from meansparse_fx.evaluate.outcome import ModelOutcome
from meansparse_fx.evaluate.sanity import Check
from meansparse_fx.histogram import band_shares, feature_histogram
from meansparse_fx.plots import alpha_figure, histogram_figure, tradeoff_figure
from meansparse_fx.report import headline, write_report


def mask(correct: int, n: int = 100) -> torch.Tensor:
    return torch.arange(n) < correct


def outcome(clean: int, exact: int, identity: int) -> ModelOutcome:
    return ModelOutcome(mask(clean), {"apgd-ce/exact": mask(exact), "apgd-ce/identity": mask(identity)})


def evaluation(sparse: ModelOutcome, alpha: float = 0.3) -> Evaluation:
    checks = (Check("unbounded attack, base", True, "0 survive"), Check("more steps, base", False, "they help"))
    return Evaluation(outcome(90, 60, 61), sparse, alpha, 0.1, "Linf", 20, 500, 0, 1.5, checks=checks)


@pytest.fixture
def search() -> AlphaSearch:
    rows = {0.0: outcome(90, 60, 61), 0.3: outcome(90, 72, 70), 0.6: outcome(85, 30, 2)}
    return AlphaSearch(0.3, rows, 0.003)


@pytest.fixture
def calibrated(net, images):
    sparse = msfx.transform(net, images)
    statistics = msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    return sparse, statistics


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_report_has_its_files_and_keys(tmp_path, calibrated, images, search):
    sparse, statistics = calibrated
    out = tmp_path / "deep" / "out"
    report = write_report(
        out,
        model="a <tiny> net",
        plan=msfx.inspect(sparse),
        statistics=statistics,
        evaluation=evaluation(outcome(90, 72, 70)),
        search=search,
        histogram=feature_histogram(sparse, images),
        shares=band_shares(sparse, images),
        data={"test": "twelve images"},
    )
    assert json.loads((out / "report.json").read_text()) == report
    assert report["alpha"] == 0.3
    assert report["n_test"] == 100
    assert report["base"]["worst_case"] == 0.6
    assert report["sparse"] == {
        "clean": 0.9,
        "robust": {"apgd-ce/exact": 0.72, "apgd-ce/identity": 0.7},
        "worst_case": 0.7,
    }
    assert [row["alpha"] for row in report["search"]["rows"]] == [0.0, 0.3, 0.6]
    assert [site["name"] for site in report["sites"]] == list(statistics)
    assert all(0 < site["in_band"] < 1 for site in report["sites"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["data"] == {"test": "twelve images"}
    page = (out / "report.html").read_text()
    assert "a &lt;tiny&gt; net" in page
    assert page.count("data:image/png;base64,") == 6  # three plots, light and dark
    assert "http" not in page  # self-contained
    assert min(png_size(out / "alpha.png")) > 500
    assert min(png_size(out / "histogram.png")) > 500
    assert min(png_size(out / "tradeoff.png")) > 500
    files = ["alpha.png", "histogram.png", "report.html", "report.json", "tradeoff.png"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert "gradient ascent on cross-entropy with a step size" in page, "each attack's name in a line"
    assert "BPDA" in page
    assert "<td>unbounded attack, base</td>" in page
    assert "FAILED" in page


def test_report_without_search_or_histogram(tmp_path, calibrated):
    sparse, statistics = calibrated
    write_report(
        tmp_path,
        model="net",
        plan=msfx.inspect(sparse),
        statistics=statistics,
        evaluation=evaluation(outcome(90, 72, 70)),
        data={},
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert "How alpha was chosen" not in (tmp_path / "report.html").read_text()


def test_headline_tells_a_gain():
    text = headline(evaluation(outcome(90, 72, 70)))
    assert "Gain real" in text
    assert "from 60.0 % to 70.0 %" in text
    assert "clean loss" not in text


def test_headline_admits_a_clean_loss_where_a_budget_was_agreed(search):
    lost = evaluation(outcome(89, 72, 70))
    assert "The clean loss of 1.0 points is more than the 0.3" in headline(lost, search)
    assert "clean loss" not in headline(lost, replace(search, clean_budget=0.01))
    assert "clean loss" not in headline(lost), "nobody asked for a budget"


def test_headline_admits_that_something_else_was_chosen(search):
    shown = evaluation(outcome(90, 61, 61))
    assert "The search itself chose alpha 0: it found nothing" in headline(shown, replace(search, alpha=0.0))
    assert "The search itself" not in headline(shown, search)
    by_site = replace(shown, alpha={"a": 0.30000001192092896, "b": 0.0})
    assert "The search itself" not in headline(by_site, replace(search, alpha={"a": 0.3, "b": 0.0}))
    assert "The search itself" in headline(by_site, search)


def test_headline_admits_that_the_evaluation_is_in_doubt():
    assert "In doubt, 1 of the checks failed: more steps, base: they help." in headline(evaluation(outcome(90, 72, 70)))


def test_headline_admits_that_nothing_was_won():
    assert headline(evaluation(outcome(90, 60, 61), alpha=0.0)).startswith("No difference shown")


def test_histogram_is_of_the_operators_input_and_output(calibrated, images):
    sparse, _ = calibrated
    seen = []
    operator = msfx.operators(sparse)["gelu"]
    handle = operator.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    sparse(images)
    handle.remove()
    values = seen[0][..., 2].flatten().double()
    found = feature_histogram(sparse, images, "gelu", 2, bins=10)
    inside = (values - operator.mean[2]).abs() <= operator.threshold[2]
    assert found.share == pytest.approx(float(inside.double().mean()))
    middle = np.searchsorted(found.edges, found.mean) - 1
    assert found.after[middle] == pytest.approx(found.share, abs=0.02)  # the band, and the 0.1 % tails outside
    assert found.before.sum() == pytest.approx(1, abs=0.03)
    assert not operator._forward_pre_hooks


def test_histogram_chooses_the_channel_with_most_values_in_its_band(calibrated, images):
    sparse, _ = calibrated
    shares = band_shares(sparse, images)
    found = feature_histogram(sparse, images)
    assert found.share == max(float(s.max()) for s in shares.values())
    assert found.share == float(shares[found.site][found.channel])


def test_histogram_with_the_operator_off(calibrated, images):
    sparse, _ = calibrated
    msfx.set_alpha(sparse, 0.0)
    found = feature_histogram(sparse, images)
    assert found.site == next(iter(msfx.operators(sparse)))
    assert found.share == 0
    assert np.array_equal(found.before, found.after)
    histogram_figure(found)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_alpha_figure_marks_any_choice(search, alpha):
    figure = alpha_figure(AlphaSearch(alpha, search.outcomes, 0.003))
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert f"chosen: alpha {alpha:g}" in words
    assert "base 60.0 %" in words
    assert any(word.startswith("worst case") for word in words)
    assert {"apgd-ce/exact", "apgd-ce/identity"} <= {word.split(" ")[0] for word in words}


def test_tradeoff_figure_has_a_point_an_alpha_and_the_base_as_a_cross():
    early = ModelOutcome(mask(90), {"apgd-ce/exact": mask(25, 25), "apgd-ce/identity": mask(24, 25)})
    rows = {0.0: outcome(90, 60, 61), 0.2: early, 0.3: outcome(90, 72, 70), 0.6: outcome(85, 30, 2)}
    search = AlphaSearch(0.3, rows, 0.003, "mean", {"edge": {0.0: rows[0.0], 0.3: outcome(89, 65, 66)}})
    (axes,) = tradeoff_figure(search).axes
    words = [text.get_text() for text in axes.texts]
    assert {"0.2", "0.3", "edge 0.3", "chosen", "base", "clean budget"} <= set(words)
    assert any(word.startswith("0.6") and "2 %" in word for word in words), (
        "the cliff stands at the edge with its value"
    )
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(0.9, 0.6)]
    hollow = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "none"]
    # Given up early: 1 of 25 images fewer than the base, so 4 points under the base's 60 %; and the choice's ring.
    assert sorted(line.get_ydata()[0] for line in hollow) == pytest.approx([0.56, 0.7])


def test_tradeoff_figure_where_the_base_is_the_choice(search):
    words = [text.get_text() for text in tradeoff_figure(AlphaSearch(0.0, search.outcomes, 0.003)).axes[0].texts]
    assert "base, chosen" in words
