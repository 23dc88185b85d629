"""Calibration: exact over any split, indifferent to alpha, and plain about bad data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx.errors import CalibrationError, StateError


def test_statistics_are_those_of_the_base_models_own_values(net, images, sites):
    """Recomputed in NumPy from a hook on the untouched model."""
    seen = []
    net.bn.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone().double().numpy()))
    net(images)
    values = seen[0].transpose(1, 0, 2, 3).reshape(8, -1)
    stats = msfx.calibrate(msfx.transform(net, images), images.split(5), progress=False)
    assert list(stats) == list(sites)
    assert stats.images == 12
    assert stats["relu"].count == values.shape[1]
    # The captured convolution sees batches of 5, the hook one of 12: float32 convolutions differ in the last bits.
    np.testing.assert_allclose(stats["relu"].mean.numpy(), values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["relu"].std.numpy(), values.std(1), rtol=1e-5)


def test_alpha_plays_no_part_and_is_kept(net, images, sites):
    sparse = msfx.transform(net, images)
    first = msfx.calibrate(sparse, images.split(5), progress=False)
    msfx.set_alpha(sparse, 0.8)
    before = sparse(images)
    second = msfx.calibrate(sparse, images.split(5), progress=False)
    assert all(torch.equal(first[n].mean, second[n].mean) for n in sites)
    assert msfx.get_alpha(sparse) == pytest.approx(0.8)
    assert torch.equal(sparse(images), before)


def test_a_second_calibration_replaces_the_first(net, images, sites):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images * 0], progress=False)
    again = msfx.calibrate(sparse, [images], progress=False)
    fresh = msfx.calibrate(msfx.transform(net, images), [images], progress=False)
    assert all(torch.equal(again[n].m2, fresh[n].m2) for n in sites)


def test_loaders_of_images_with_labels(net, images, labels):
    data = torch.utils.data.TensorDataset(images, labels)
    stats = msfx.calibrate(msfx.transform(net, images), torch.utils.data.DataLoader(data, batch_size=5), progress=False)
    assert stats.images == 12


def test_bad_data_is_refused(net, images):
    sparse = msfx.transform(net, images)
    with pytest.raises(CalibrationError, match="no images"):
        msfx.calibrate(sparse, [], progress=False)
    bad = images.clone()
    bad[7, 0, 3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"relu: NaN or inf .* batch 1"):
        msfx.calibrate(sparse, bad.split(5), progress=False)
    with pytest.raises(CalibrationError, match="yielded str"):
        msfx.calibrate(sparse, ["x"], progress=False)
    with pytest.raises(StateError, match="train mode"):
        msfx.calibrate(sparse.train(), [images], progress=False)


def test_a_dead_channel_is_left_alone(net, images):
    with torch.no_grad():
        net.mlp.weight[2] = 0
    sparse = msfx.transform(net, images)
    stats = msfx.calibrate(sparse, [images], progress=False)
    assert float(stats["gelu"].std[2]) == 0
    msfx.set_alpha(sparse, 0.5)
    assert float(msfx.operators(sparse)["gelu"].threshold[2]) == -1
