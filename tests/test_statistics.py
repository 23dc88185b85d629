"""The artifact: exact merge, safe files, and refusal of what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from meansparse_fx.errors import ArtifactError, StatisticsError
from meansparse_fx.nn import ChannelMoments
from meansparse_fx.statistics import ChannelStatistics, Statistics, fingerprint


def observed(x: torch.Tensor, splits: list[int], dim: int = 1) -> ChannelStatistics:
    moments = ChannelMoments("site", x.shape[dim], dim)
    for part in x.split(splits):
        assert moments(part) is part
    return moments.moments()


@given(
    splits=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
    offset=st.sampled_from([0.0, 1e4, -3e6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_moments_do_not_depend_on_the_split(splits, offset, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(splits), 3, 4, 5, generator=g) + offset
    got = observed(x, splits)
    flat = x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    assert got.count == flat.shape[1]
    np.testing.assert_allclose(got.mean.numpy(), flat.mean(1), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(got.std.numpy(), flat.std(1), rtol=1e-9)


def test_half_precision_is_measured_exactly():
    x = (torch.randn(64, 4, 8, 8) + 100).bfloat16()
    flat = x.double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    got = observed(x, [10, 54])
    np.testing.assert_allclose(got.mean.numpy(), flat.mean(1), rtol=1e-13)
    np.testing.assert_allclose(got.std.numpy(), flat.std(1), rtol=1e-10)


def some(seed: int = 0, fingerprint: str = "abc") -> Statistics:
    x = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    tokens = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(seed))
    sites = {"a.act": observed(x, [20]), "b": observed(tokens, [20], dim=2)}
    return Statistics(sites, fingerprint, 20, {"data": "noise"})


def test_file_round_trip(tmp_path):
    stats = some()
    stats.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    assert list(back) == list(stats)
    assert (back.fingerprint, back.images, back.metadata) == ("abc", 20, {"data": "noise"})
    for name in stats:
        assert back[name].count == stats[name].count
        assert torch.equal(back[name].mean, stats[name].mean)
        assert torch.equal(back[name].m2, stats[name].m2)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    some(0).save(path)
    before = path.read_bytes()

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("meansparse_fx.statistics.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        some(1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_truncated_and_foreign_files_are_refused(tmp_path):
    good, cut, text, other = (tmp_path / n for n in ("good", "cut", "text", "other"))
    some().save(good)
    cut.write_bytes(good.read_bytes()[:-40])
    text.write_text("hello")
    save_file({"w": torch.zeros(2)}, other)
    for path in (cut, text):
        with pytest.raises(ArtifactError, match="truncated or not a statistics file"):
            Statistics.load(path)
    with pytest.raises(ArtifactError, match="not statistics of meansparse_fx"):
        Statistics.load(other)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "missing")


def test_merge_is_the_whole():
    a, b = some(0), some(1)
    whole = a.merge(b)
    assert whole.images == 40
    x = torch.cat([torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    direct = observed(x, [40])
    torch.testing.assert_close(whole["a.act"].mean, direct.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(whole["a.act"].m2, direct.m2, rtol=1e-12, atol=0)


def test_merge_refuses_another_model():
    with pytest.raises(StatisticsError, match="different models"):
        some().merge(some(fingerprint="other"))


@pytest.mark.parametrize(
    ("channels", "mark", "message"),
    [
        ({"a.act": 3, "b": 4}, "other", "other weights"),
        ({"a.act": 3}, "abc", "1 site.* the model lacks: b"),
        ({"a.act": 3, "b": 4, "c": 2}, "abc", "lack 1 site.*: c"),
        ({"a.act": 7, "b": 4}, "abc", "a.act: statistics of 3 channels for a site of 7"),
    ],
)
def test_what_does_not_fit_is_refused(channels, mark, message):
    with pytest.raises(StatisticsError, match=message):
        some().check(channels, mark)


def test_non_finite_statistics_are_refused():
    stats = some()
    stats["b"].mean[1] = float("nan")
    with pytest.raises(StatisticsError, match="b: statistics hold NaN"):
        stats.check({"a.act": 3, "b": 4})


def test_fingerprint_sees_weights_and_not_our_own_buffers(net):
    before = fingerprint(net)
    net.add_module("meansparse", torch.nn.BatchNorm1d(3))
    assert fingerprint(net) == before
    with torch.no_grad():
        net.head.bias[0] += 1
    assert fingerprint(net) != before
