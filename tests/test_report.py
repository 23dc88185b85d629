"""The report: its numbers, its pictures, and what its headline admits."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.alpha import AlphaSearch
from meansparse_fx.alpha.result import Move, Refinement
from meansparse_fx.errors import ArtifactError
from meansparse_fx.evaluate import Evaluation
from meansparse_fx.evaluate.attacks import AttackSettings
from meansparse_fx.evaluate.outcome import ModelOutcome
from meansparse_fx.evaluate.sanity import Check
from meansparse_fx.plots import histogram_figure
from meansparse_fx.report import band_shares, feature_histogram, headline, write_report
from meansparse_fx.tables import as_text


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
        sparse,
        evaluation(outcome(90, 72, 70)),
        images,
        model="a <tiny> net",
        search=search,
        data={"test": "twelve images"},
    )
    assert json.loads((out / "report.json").read_text()) == report
    assert report["alpha"] == 0.3
    assert report["n_test"] == 100
    assert report["base"]["worst_case"] == 0.6
    assert {name: report["sparse"][name] for name in ("clean", "robust", "worst_case")} == {
        "clean": 0.9,
        "robust": {"apgd-ce/exact": 0.72, "apgd-ce/identity": 0.7},
        "worst_case": 0.7,
    }
    assert report["sparse"]["images"]["clean"] == "1" * 90 + "0" * 10
    assert [row["alpha"] for row in report["search"]["rows"]] == [0.0, 0.3, 0.6]
    assert [site["name"] for site in report["sites"]] == list(statistics)
    assert all(0 < site["in_band"] < 1 for site in report["sites"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["data"] == {"test": "twelve images"}
    page = (out / "report.html").read_text()
    assert "a &lt;tiny&gt; net" in page
    assert page.count("data:image/png;base64,") == 8  # four plots, light and dark
    assert "http" not in page  # self-contained
    assert min(png_size(out / "alpha.png")) > 500
    assert min(png_size(out / "histogram.png")) > 500
    assert min(png_size(out / "tradeoff.png")) > 500
    drawn = {f"{name}.{form}" for name in ("alpha", "tradeoff", "evaluation", "histogram") for form in ("png", "pdf")}
    assert b"/Type3" not in (out / "alpha.pdf").read_bytes(), "publishers refuse such fonts"
    tables = {f"{name}.{form}" for name in ("search", "evaluation") for form in ("tex", "csv")}
    assert {p.name for p in out.iterdir()} == drawn | tables | {"report.html", "report.json"}
    assert msfx.Evaluation.load(out / "report.json").gain == evaluation(outcome(90, 72, 70)).gain
    assert AlphaSearch.load(out / "report.json").to_dict() == search.to_dict()
    assert "gradient ascent on cross-entropy with a step size" in page, "each attack's name in a line"
    assert "BPDA" in page
    assert "<td>unbounded attack, base</td>" in page
    assert "FAILED" in page
    assert "Gain real" in page
    assert '<tr class="strong">\n<td>worst case</td>\n<td class="number">60.0</td>' in page
    assert '<td class="number">+10.0 [' in page


def test_report_without_search(tmp_path, calibrated, images):
    write_report(tmp_path, calibrated[0], evaluation(outcome(90, 72, 70)), images, model="net", data={})
    assert {p.stem for p in tmp_path.iterdir()} == {"evaluation", "histogram", "report"}
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
    assert headline(evaluation(outcome(90, 60, 61), alpha=0.1)).startswith("No difference shown")
    same = evaluation(outcome(90, 60, 60), alpha=0.0)
    nothing = replace(same, **{side: replace(getattr(same, side), robust={}) for side in ("base", "sparse")})
    assert headline(nothing).startswith("Nothing compared: alpha is 0")
    assert "worst case" not in headline(nothing), "nobody has measured it"
    assert headline(same).startswith("No difference shown"), "with a base of its own alpha 0 is a comparison, too"


def test_histogram_is_of_the_operators_input_and_output(calibrated, images):
    sparse, _ = calibrated
    seen = []
    operator = msfx.operators(sparse)["gelu"]
    handle = operator.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    sparse(images)
    handle.remove()
    values = seen[0][..., 2].flatten().double()
    found = feature_histogram(sparse, images, ("gelu", 2), bins=10)
    assert re.fullmatch(r"gelu, channel 2, alpha [\d.]+: [\d.]+ % in the band", str(found))
    inside = (values - operator.mean[2]).abs() <= operator.threshold[2]
    assert found.share == pytest.approx(float(inside.double().mean()))
    middle = np.searchsorted(found.edges, found.mean) - 1
    assert found.after[middle] == pytest.approx(found.share, abs=0.02)  # the band, and the 0.1 % tails outside
    assert found.before.sum() == pytest.approx(1, abs=0.03)
    assert not operator._forward_pre_hooks


def test_histogram_chooses_the_channel_in_the_middle(calibrated, images):
    sparse, _ = calibrated
    shares = band_shares(sparse, images)
    found = feature_histogram(sparse, images)
    assert found.share == float(shares[found.site][found.channel])
    below, above = (
        sum(int(compare(s, found.share).sum()) for s in shares.values()) for compare in (torch.lt, torch.gt)
    )
    assert 0 <= above - below <= 1


def test_histogram_panels_share_bins_and_the_band_is_whole_bins(calibrated, images):
    sparse, _ = calibrated
    found = feature_histogram(sparse, images)
    for edge in (found.mean - found.threshold, found.mean + found.threshold):
        assert np.abs(found.edges - edge).min() < 1e-6 * found.threshold
    figure = histogram_figure(found)
    figure.draw_without_rendering()
    edges, limits = zip(*((panel.transData.transform([(x, 0) for x in panel.patches[-1].get_data().edges])[:, 0],
                           panel.get_xlim()) for panel in figure.axes), strict=True)  # fmt: skip
    assert np.array_equal(*edges)
    assert limits[0] == limits[1] == (found.edges[0], found.edges[-1])
    assert any("alpha 0.4" in text.get_text() for text in figure.axes[0].texts)


def test_histogram_with_the_operator_off(calibrated, images):
    sparse, _ = calibrated
    msfx.set_alpha(sparse, 0.0)
    found = feature_histogram(sparse, images)
    assert found.site == next(iter(msfx.operators(sparse)))
    assert found.share == 0
    assert np.array_equal(found.before, found.after)
    histogram_figure(found)


def test_features_of_a_fused_model_are_those_of_the_operators_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    model[1].running_mean.normal_()
    images = torch.rand(8, 3, 9, 9)
    x = model[:2](images)
    found = msfx.transform(model, images, fuse="all")
    msfx.calibrate(found, [images], progress=False)
    msfx.set_alpha(found, 0.4)
    deviation, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
    expected = ((x - mean).abs() <= 0.4 * deviation).double().mean((0, 2, 3))
    assert torch.allclose(band_shares(found, images)["2"], expected, atol=0.01)
    histogram = feature_histogram(found, images, ("2", 1))
    assert histogram.edges[0] == pytest.approx(float(x[:, 1].quantile(0.001)), abs=0.2)
    assert histogram.edges[-1] == pytest.approx(float(x[:, 1].quantile(0.999)), abs=0.2)
    assert histogram.share == pytest.approx(float(expected[1]), abs=0.01)


def early_search(alpha: float = 0.3) -> AlphaSearch:
    """0.2 was given up after 25 images: 1 fewer than the base's 15."""
    early = ModelOutcome(mask(90), {"apgd-ce/exact": mask(15, 25), "apgd-ce/identity": mask(14, 25)})
    base = ModelOutcome(mask(90), {"apgd-ce/exact": spread(60), "apgd-ce/identity": spread(60)})
    rows = {0.0: base, 0.2: early, 0.3: outcome(90, 72, 70), 0.6: outcome(85, 30, 2)}
    return AlphaSearch(alpha, rows, 0.003, threat=AttackSettings(0.1, "Linf", 20))


def spread(correct: int) -> torch.Tensor:
    """As many of 100, evenly: 15 of the first 25 if 60."""
    return torch.arange(100) % 5 < correct // 20


def overlaps(figure) -> list[tuple[str, str]]:
    """Return the pairs of texts that lie upon one another."""
    figure.draw_without_rendering()
    texts = [t for axes in figure.axes for t in (*axes.texts, axes.title, axes._left_title, axes.xaxis.label)]
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
    texts += [t for found in figure.legends for t in found.get_texts()] + (
        [figure._suptitle] if figure._suptitle else []
    )
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other) and a != b]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6])
def test_alpha_figure_says_what_was_measured_and_how_well(alpha):
    search = early_search(alpha)
    figure = search.figure()
    top, bottom = figure.axes
    assert f"chosen: alpha {alpha:g}" in [text.get_text() for text in top.texts]
    assert top.get_title("left") == "Clean accuracy, 100 images"
    assert bottom.get_title("left") == "Accuracy under attack, 100 images, Linf eps 0.1, 20 steps"
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"base", "worst case, 95 % interval", "apgd-ce/exact", "apgd-ce/identity"} <= legend
    assert overlaps(figure) == []
    # The interval at 0.3 is that of the paired change, from the base's accuracy on.
    change, base = search.change(search.outcomes[0.3]), search.comparable(search.base)
    bars = bottom.collections[0].get_segments()  # of those attacked to the end: 0, which has none, and 0.3
    assert [bar.size > 0 for bar in bars] == [False, True]
    assert [bar.size > 0 for bar in top.collections[0].get_segments()] == [False, True, True, True]
    assert bars[-1].tolist() == [pytest.approx([0.3, base + change.low]), pytest.approx([0.3, base + change.high])]
    assert "2 %" in [text.get_text() for text in bottom.texts], "what falls off the axes stands at the edge"


def points(axes, marker: str) -> list[tuple[float, float]]:
    """Return the places of an axes' markers, from left to right."""
    found = [line.get_xydata() for line in axes.lines if line.get_marker() == marker]
    return sorted({tuple(place) for line in found for place in line.round(6).tolist()})


def lines(axes) -> tuple[set[float], set[float]]:
    """Return where an axes' lines from edge to edge are: those up and down, and those across."""
    found = [np.round(line.get_xydata(), 6) for line in axes.lines if len(line.get_xydata()) == 2]
    upright = {float(ends[0, 0]) for ends in found if ends[:, 1].tolist() == [0, 1]}
    return upright, {float(ends[0, 1]) for ends in found if ends[:, 0].tolist() == [0, 1]}


def test_alpha_figure_has_a_clean_point_an_alpha_and_the_base_and_its_budget_as_lines():
    figure = early_search().figure()
    top, bottom = figure.axes
    assert points(top, "o") == [(0, 0.9), (0.2, 0.9), (0.3, 0.9), (0.6, 0.85)]
    assert [lines(axes) for axes in (top, bottom)] == [({0.3}, {0.9, 0.897}), ({0.3}, {0.54})]
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"clean, 95 % interval", "allowed: 0.3 points less", "worst case, given up early"} <= legend
    # At the edge, 10 points under the base's 54 %, stands only what lies under it: 0.6, with 2 %.
    assert points(bottom, "v") == [(0.6, 0.44)]
    for axes in figure.axes:
        assert [axes.yaxis.get_major_formatter()(y) for y in (0.5, -0.5)] == ["50 %", "\N{MINUS SIGN}50 %"]


def test_alpha_figure_leaves_what_was_given_up_early_apart():
    bottom = early_search().figure().axes[1]
    lines = [line for line in bottom.lines if line.get_marker() in tuple("os^")]
    joined = [list(line.get_xdata()) for line in lines if line.get_linestyle() != "None" and line.get_linewidth()]
    assert all(0.2 not in xs for xs in joined if len(xs) > 1)
    runs = {line.get_label(): np.round(line.get_ydata(), 6).tolist() for line in lines if "/" in line.get_label()}
    assert runs == {"apgd-ce/exact": [0.6, 0.72, 0.3], "apgd-ce/identity": [0.6, 0.7, 0.02]}
    hollow = [line for line in lines if 0.2 in np.atleast_1d(line.get_xdata())]
    # The base's 60 % under each attack and 54 % under both, less what was lost of 25 images.
    assert sorted(line.get_ydata()[0] for line in hollow) == pytest.approx([0.5, 0.56, 0.6])
    assert all(line.get_markerfacecolor() == "#ffffff" for line in hollow)


def test_alpha_figure_tells_runs_apart_without_colour():
    names = ("a/exact", "a/identity", "a/smooth", "a/annealed", "b/annealed", "square")
    rows = {alpha: ModelOutcome(mask(90), {name: mask(60) for name in names}) for alpha in (0.0, 0.1)}
    bottom = AlphaSearch(0.0, rows, 0.003).figure().axes[1]
    looks = {
        line.get_label(): (line.get_marker(), line._dash_pattern) for line in bottom.lines if line.get_label() in names
    }
    assert len({marker for marker, _ in looks.values()}) == len(names)
    assert len({str(dash) for name, (_, dash) in looks.items() if name[0] == "a"}) == 4


def test_tradeoff_figure_has_a_point_an_alpha_and_the_base_as_a_cross():
    early = ModelOutcome(mask(90), {"apgd-ce/exact": mask(25, 25), "apgd-ce/identity": mask(24, 25)})
    rows = {0.0: outcome(90, 60, 61), 0.2: early, 0.3: outcome(90, 72, 70), 0.6: outcome(85, 30, 2)}
    search = AlphaSearch(0.3, rows, 0.003, "mean", {"edge": {0.0: rows[0.0], 0.3: outcome(89, 65, 66)}})
    figure = search.figure(tradeoff=True)
    (axes,) = figure.axes
    words = [text.get_text() for text in axes.texts]
    assert {"0.2", "0.3, chosen", "edge 0.3", "base", "clean budget"} <= set(words)
    assert overlaps(figure) == []
    assert any(word.startswith("0.6") and "2 %" in word for word in words), (
        "the cliff stands at the edge with its value"
    )
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(0.9, 0.6)]
    hollow = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "none"]
    # Given up early: 1 of 25 images fewer than the base, so 4 points under the base's 60 %; and the choice's ring.
    assert sorted(line.get_ydata()[0] for line in hollow) == pytest.approx([0.56, 0.7])
    assert lines(axes) == ({0.897}, {0.6}), "the clean budget, 0.3 points under the base, and the base's worst case"
    (budget,) = (text for text in axes.texts if text.get_text() == "clean budget")
    assert budget.xy == pytest.approx((0.897, 0)), "the words stand at the foot of their line"


def test_tradeoff_figure_of_a_search_by_site():
    """It is a place of its own; an accuracy far below the base's stretches neither axis."""
    search = early_search()
    search.outcomes[1.0] = outcome(20, 30, 2)
    for alpha, diamonds in (({"relu": 0.3, "gelu": 0.2}, [(0.89, 0.71)]), (0.3, [])):
        refined = replace(search, alpha=alpha, refinement=Refinement(0.3, outcome(89, 73, 71), ()))
        (axes,) = refined.figure(tradeoff=True).axes
        assert points(axes, "D") == diamonds
        assert ("by site" in {text.get_text() for text in axes.texts}) == bool(diamonds)
        assert axes.get_xlim()[0] > 0.8
        assert axes.get_ylim()[0] > 0.4


def test_tradeoff_figure_where_the_base_is_the_choice(search):
    words = [text.get_text() for text in AlphaSearch(0.0, search.outcomes, 0.003).figure(tradeoff=True).axes[0].texts]
    assert "base, chosen" in words


@pytest.mark.parametrize("cumulative", [False, True])
def test_evaluation_figure_says_what_its_rows_and_colours_are(cumulative):
    figure = replace(evaluation(outcome(90, 72, 70), 0.25), cumulative=cumulative).figure()
    left, right = figure.axes
    words = figure._suptitle.get_text()
    assert ("each row: what survives it and all rows above" in words) == cumulative
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "alpha 0.25"]
    assert [axes.get_title("left") for axes in (left, right)] == ["Accuracy", "Change in points, 95 % interval"]
    assert lines(right)[0] == {0}, "no change"
    above, below = left.get_ylim()[::-1]
    assert above < 0 < 3 < below, "the first row is the highest"
    assert [right.xaxis.get_major_formatter()(x) for x in (0.05, -0.05)] == ["5", "\N{MINUS SIGN}5"]
    assert [left.xaxis.get_major_formatter()(x) for x in (0.5, 1)] == ["50 %", "100 %"]
    marks = [bar.get_segments()[0] for bar in right.collections]
    assert [sorted(round(float(x), 6) for x in mark[:, 0]) for mark in marks] == [
        [pytest.approx(change.low, abs=1e-6), pytest.approx(change.high, abs=1e-6)]
        for *_, change in evaluation(outcome(90, 72, 70)).rows()
    ]


def test_evaluation_figure_of_sound_checks_and_alphas_by_site():
    figure = replace(evaluation(outcome(90, 72, 70)), alpha={"relu": 0.1}, checks=()).figure()
    assert "checks failed" not in figure._suptitle.get_text()
    assert figure.legends[0].get_texts()[1].get_text() == "MeanSparse, alphas by site"


def test_evaluation_figure_has_both_models_and_the_change_with_its_interval(tmp_path):
    result = evaluation(outcome(90, 72, 70))
    figure = result.figure()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "clean",
        "apgd-ce/exact",
        "apgd-ce/identity",
        "worst case",
    ]
    assert [list(line.get_xdata()) for line in left.lines] == [[0.9, 0.6, 0.61, 0.6], [0.9, 0.72, 0.7, 0.7]]
    low, high = right.collections[-1].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((result.gain.low, result.gain.high))
    assert "100 images, Linf eps 0.1, 20 steps; 1 of 2 checks failed" in figure._suptitle.get_text()
    assert overlaps(figure) == []
    figure.savefig(tmp_path / "x.pdf")
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def printed(result) -> list[str]:
    """Return the lines of a result's table that have cells, cells apart by a blank."""
    lines = as_text(result.table(), 120).splitlines()
    cells = [" ".join(re.split("[ │┃]+", line)).strip() for line in lines if re.search("[│┃]", line)]
    return cells[-result.table().row_count - 1 :]  # of headers in two lines the second


def test_results_come_back_from_their_files(tmp_path):
    by_site = Refinement(0.3, outcome(89, 73, 71), (Move("relu", 0.2, 0.9, 25, None, False),
                         Move("gelu", 0.2, 0.9, 100, evaluation(outcome(90, 72, 70)).gain, True)))  # fmt: skip
    search = replace(early_search(), alpha={"relu": 0.3, "gelu": 0.2}, refinement=by_site,
                     others={"edge": {0.0: early_search().base, 0.3: outcome(89, 65, 66)}})  # fmt: skip
    search.save(tmp_path / "s.json")
    back = AlphaSearch.load(tmp_path / "s.json")
    assert back.to_dict() == search.to_dict()
    assert (back.uniform, back.leader, back.threat) == (search.uniform, search.leader, search.threat)
    assert torch.equal(back.base.robust["apgd-ce/exact"], search.base.robust["apgd-ce/exact"])
    assert (str(back), back.to_csv(), back.to_latex()) == (str(search), search.to_csv(), search.to_latex())
    # 0.2 met the first 25 images, of which the base stands on 15.
    assert printed(search) == [
        "alpha clean attacked exact identity case against base",
        "0 90.0 100 60.0 60.0 54.0",
        "mean 0.2 90.0 25 (60.0) (56.0) (56.0) -4.0 [-32.2, +24.7]",
        "mean 0.3 90.0 100 72.0 70.0 70.0 +16.0 [+3.2, +28.5] chosen",
        "mean 0.6 85.0 100 30.0 2.0 2.0 -52.0 [-62.1, -41.8]",
        "edge 0.3 89.0 100 65.0 66.0 65.0 +11.0 [-2.1, +23.9]",
        "by site 89.0 100 73.0 71.0 71.0 +17.0 [+4.5, +29.3] chosen",
    ]
    assert (search.table().title, search.table().caption) == (
        "100 held-out images, 100 of them attacked, Linf eps 0.1, 20 steps; at most 0.3 points of clean loss; in "
        "parentheses: given up early, of fewer images, so that only the change against base compares",
        "Site by site from alpha 0.3, 2 moves tried: gelu to 0.2",
    )
    unmoved = replace(search, alpha=0.3, refinement=replace(by_site, moves=by_site.moves[:1]))
    assert printed(unmoved) == printed(search)[:-1]
    assert unmoved.table().caption.endswith("1 moves tried: none was better beyond noise")
    finished = AlphaSearch(0.3, {a: o for a, o in search.outcomes.items() if a != 0.2}, 0.003)
    assert finished.table().title.endswith("points of clean loss")
    assert finished.table().caption is None
    result = evaluation(outcome(90, 72, 70), alpha={"relu": 0.3})
    result.save(tmp_path / "e.json")
    again = Evaluation.load(tmp_path / "e.json")
    assert again.to_dict() == result.to_dict()
    assert printed(replace(result, alpha=0.3)) == [
        "accuracy in % base alpha 0.3 change, 95 % interval",
        "clean 90.0 90.0 +0.0 [-3.6, +3.6]",
        "apgd-ce/exact 60.0 72.0 +12.0 [+6.3, +20.0]",
        "apgd-ce/identity 61.0 70.0 +9.0 [+3.6, +16.4]",
        "worst case 60.0 70.0 +10.0 [+4.5, +17.6]",
    ]
    assert "alpha per site" in printed(result)[0]
    title, caption = "100 images, Linf eps 0.1, 20 steps", "Checks of the evaluation itself: 1 of 2 passed."
    assert (result.table().title, result.table().caption) == (title, caption)
    assert [row.style for row in result.table().rows] == [None, None, None, "bold"]
    assert str(again) == str(result)


@pytest.mark.parametrize("kind", [AlphaSearch, Evaluation])
def test_a_results_file_is_of_the_schema_that_others_read(kind, tmp_path):
    """Its name and number are in every file written so far: another number is for another schema."""
    result = early_search() if kind is AlphaSearch else evaluation(outcome(90, 72, 70))
    name = "search" if kind is AlphaSearch else "evaluation"
    result.save(tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["format"], found["version"]) == (f"meansparse_fx.{name}", 1)


def test_results_of_another_schema_are_refused_with_the_cure(tmp_path):
    path = tmp_path / "e.json"
    result = evaluation(outcome(90, 72, 70))
    for change, words in (({"version": 99}, "update meansparse_fx"), ({"format": "x"}, "holds x")):
        path.write_text(json.dumps(result.to_dict() | change))
        for kind in (Evaluation, AlphaSearch):
            with pytest.raises(ArtifactError, match=words):
                kind.load(path)
    path.write_text(json.dumps(result.to_dict()))
    with pytest.raises(ArtifactError, match="without a search"):
        AlphaSearch.load(path)
    path.write_text(json.dumps({"alpha": 0.2}))
    with pytest.raises(ArtifactError, match="make it again"):
        Evaluation.load(path)


def test_tables_for_papers():
    result = evaluation(outcome(90, 72, 70))
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [row["row"] for row in rows] == ["clean", "apgd-ce/exact", "apgd-ce/identity", "worst case"]
    assert (float(rows[-1]["sparse"]), float(rows[-1]["low"])) == (0.7, result.gain.low)
    latex = result.to_latex()
    assert "\\begin{tabular}{lrrr}" in latex
    assert "% 100 images, Linf eps 0.1, 20 steps" in latex
    assert r"accuracy in \% & base & alpha 0.3" in latex
    assert latex.count(r"\\") == 5
    found = list(csv.DictReader(io.StringIO(early_search().to_csv())))
    assert [(row["alpha"], row["attacked"]) for row in found] == [
        ("0.0", "100"),
        ("0.2", "25"),
        ("0.3", "100"),
        ("0.6", "100"),
    ]


def test_the_verdict_is_said_once():
    result = evaluation(outcome(90, 72, 70))
    assert " ".join(str(result).split()).count("Gain real") == 1
    assert "Gain real" not in as_text(result.table()), "the headline that commands print begins with it"
