"""load_images: every layout gives the same kind of tensors, every damaged one its own error."""

from __future__ import annotations

import gzip
import pickle

import numpy as np
import pytest
import torch

from meansparse_fx import bundled
from meansparse_fx.data import load_idx, load_images, read_idx
from meansparse_fx.errors import ArtifactError


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 5, 6), dtype=np.uint8)


@pytest.fixture
def idx(tmp_path, pictures):
    directory = tmp_path / "idx"
    directory.mkdir()
    (directory / "train-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
    (directory / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(7)))
    (directory / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pictures[:4])))
    (directory / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(4))))
    return directory


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(3):
            image.new("RGB", (40, 30), (100 * label, 0, 255)).save(tmp_path / "val" / name / f"{i}.png")
    return tmp_path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def as_sorted(found):
    """Return the set's images and labels by label: undoes the shuffled order where labels are distinct."""
    order = found.labels.argsort()
    return torch.stack([found[i][0] for i in order]), found.labels[order]


def test_idx_plain_and_gzipped(idx, pictures):
    for split, count in (("train", 7), ("t10k", 4)):
        images, labels = as_sorted(load_images(idx, split))
        assert torch.equal(labels, torch.arange(count))
        torch.testing.assert_close(images, torch.from_numpy(pictures[:count]).float().unsqueeze(1) / 255)
    images, labels = load_idx(idx, "t10k")
    assert images.shape == (4, 1, 5, 6)
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 5, 6), (1, 5, 6)), ((4, 1, 5, 6), (1, 5, 6)), ((4, 3, 5, 6), (3, 5, 6)), ((4, 5, 6, 3), (3, 5, 6))],
)
@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_npz_layouts(tmp_path, shape, expected, kind):
    raw = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    stored = raw if kind == "uint8" else raw / 255.0
    images, labels = as_sorted(load_images(npz(tmp_path / "a.npz", images=stored, labels=np.arange(4))))
    assert images.shape == (4, *expected)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    first = raw[2] if raw.ndim == 3 else np.moveaxis(raw[2], -1, 0) if shape[-1] == 3 else raw[2]
    torch.testing.assert_close(images[2], torch.from_numpy(first.reshape(expected)).float() / 255)


def test_npz_splits(tmp_path, pictures):
    labels = np.arange(7)
    path = npz(tmp_path / "a.npz", a_images=pictures, a_labels=labels, b_images=pictures[:2], b_labels=labels[:2])
    assert len(load_images(path, "b")) == 2
    with pytest.raises(ArtifactError, match="several splits; choose one of a, b"):
        load_images(path)
    with pytest.raises(ArtifactError, match="no split 'c'"):
        load_images(path, "c")


def test_image_folder(folder):
    found = load_images(folder, "val", image_size=14)
    assert found.labels.sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    for image, label in found:
        assert image.shape == (3, 14, 14)
        torch.testing.assert_close(image[:, 7, 7], torch.tensor([100 * label / 255, 0, 1]))
    images, labels = next(iter(found.loader(4)))
    assert images.shape == (4, 3, 14, 14)
    assert torch.equal(labels, found.labels[:4])


def test_limit_and_skip_cut_disjoint_parts_that_stay_the_same(idx):
    def take(**cut):
        return load_images(idx, "train", **cut).labels.tolist()

    assert take(limit=3) + take(skip=3, limit=2) + take(skip=5) == take()
    assert sorted(take()) == list(range(7))
    assert take(limit=3) == take(limit=3)
    with pytest.raises(ArtifactError, match="no images left of 7"):
        take(skip=7)


def test_labels_beyond_the_models_classes(idx):
    found = load_images(idx, "train")
    found.check_labels(7)
    with pytest.raises(ArtifactError, match="label 6 is out of range for a model of 6 classes"):
        found.check_labels(6)


def test_nothing_there(tmp_path):
    with pytest.raises(ArtifactError, match="no such file or directory"):
        load_images(tmp_path / "none")


def test_layouts_that_are_not_understood(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no images")
    for name in ("empty", "text.txt"):
        with pytest.raises(ArtifactError, match="not a layout this package reads"):
            load_images(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"a split of it\? it holds .*val"):
        load_images(folder)
    with pytest.raises(ArtifactError, match="no subdirectory 'train'"):
        load_images(folder, "train")


@pytest.mark.parametrize(("name", "keep"), [("t10k-images-idx3-ubyte.gz", 60), ("t10k-labels-idx1-ubyte.gz", 12)])
def test_truncated_gzip(idx, name, keep):
    (idx / name).write_bytes((idx / name).read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated"):
        load_images(idx, "t10k")


@pytest.mark.parametrize("keep", [0, 3, 9, 100])
def test_truncated_idx(idx, keep):
    path = idx / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"truncated|not an IDX file"):
        read_idx(path)


def test_idx_without_its_labels(idx):
    (idx / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ArtifactError, match="no train-labels-idx1-ubyte file"):
        load_images(idx, "train")


def test_truncated_npz(tmp_path, pictures):
    path = npz(tmp_path / "a.npz", images=pictures, labels=np.arange(7))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="truncated"):
        load_images(path)


def test_truncated_image(folder):
    file = folder / "val" / "ant" / "0.png"
    file.write_bytes(file.read_bytes()[:30])
    found = load_images(folder, "val", image_size=14)
    with pytest.raises(ArtifactError, match="truncated or not an image"):
        list(found)


def test_pickles_are_refused(tmp_path):
    path = npz(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object), labels=np.arange(1))
    with pytest.raises(ArtifactError, match="plain arrays"):
        load_images(path)
    (tmp_path / "b.npz").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ArtifactError, match="plain arrays"):
        load_images(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"images": np.zeros((4, 5), np.uint8), "labels": np.arange(4)}, "expected .N, H, W."),
        ({"images": np.zeros((4, 5, 6), np.uint8), "labels": np.arange(3)}, "expected .N, H, W."),
        ({"images": np.zeros((4, 2, 5, 6), np.uint8), "labels": np.arange(4)}, "no axis of 1 or 3 channels"),
        ({"images": np.zeros((4, 5, 6), np.int32), "labels": np.arange(4)}, "images of int32"),
        ({"images": np.full((4, 5, 6), 255.0), "labels": np.arange(4)}, "values from 255 to 255"),
        ({"images": np.full((4, 5, 6), np.nan), "labels": np.arange(4)}, "values from nan"),
        ({"images": np.zeros((4, 5, 6), np.uint8), "labels": np.zeros(4)}, "labels must be integers from 0"),
        ({"images": np.zeros((4, 5, 6), np.uint8), "labels": np.arange(4) - 1}, "labels must be integers from 0"),
        ({"images": np.zeros((4, 5, 6), np.uint8)}, "no images and labels in it"),
        ({"a_images": np.zeros((4, 5, 6), np.uint8)}, "no a_labels"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, problem):
    with pytest.raises(ArtifactError, match=problem):
        load_images(npz(tmp_path / "a.npz", **arrays))


def test_image_size_is_for_folders(idx):
    with pytest.raises(ArtifactError, match="image folders only"):
        load_images(idx, "train", image_size=32)


def test_bundled_splits_are_disjoint():
    seen = set()
    for name in bundled.SPLITS:
        images, labels = bundled.load_split(name)
        assert images.shape == (2000, 1, 28, 28)
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.bincount().min() > 150
        keys = {image.numpy().tobytes() for image in images}
        assert not seen & keys
        seen |= keys


def test_bundled_model_is_accurate():
    model = bundled.load_model()
    images, labels = bundled.load_split("test")
    with torch.inference_mode():
        accuracy = (model(images[:500]).argmax(1) == labels[:500]).double().mean()
    assert not model.training
    assert accuracy > 0.8
