"""load_images: every layout gives the same kind of tensors, every damaged one its own error."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import sys
import warnings
import zlib

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
    with pytest.raises(ArtifactError, match="no split 'c'; choose one of a, b"):
        load_images(path, "c")
    single = npz(tmp_path / "b.npz", images=pictures, labels=labels)
    assert len(load_images(single)) == 7
    with pytest.raises(ArtifactError, match="no split 'test'; its images are one split without a name: leave the name"):
        load_images(single, "test")


def test_image_folder(folder):
    found = load_images(folder, "val", image_size=14)
    assert found.labels.sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    for image, label in found:
        assert image.shape == (3, 14, 14)
        torch.testing.assert_close(image[:, 7, 7], torch.tensor([100 * label / 255, 0, 1]))
    images, labels = next(iter(found.loader(4)))
    assert images.shape == (4, 3, 14, 14)
    assert torch.equal(labels, found.labels[:4])


def test_directories_named_by_numbers_say_their_order(folder):
    for name in ("1", "2", "10"):
        shutil.copytree(folder / "val" / "ant", folder / "numbers" / name)
    with pytest.warns(UserWarning, match="in alphabetical order.* '10' is class 1"):
        load_images(folder / "numbers", image_size=14)
    (folder / "numbers" / "1").rename(folder / "numbers" / "01")
    (folder / "numbers" / "2").rename(folder / "numbers" / "02")
    load_images(folder / "numbers", image_size=14)  # warnings are errors here


@pytest.mark.parametrize("suffix", [".gif", ".JFIF"])
def test_images_that_would_be_left_out_are_refused(folder, suffix):
    shutil.copy(folder / "val" / "ant" / "0.png", folder / "val" / "bee" / f"9{suffix}")
    with pytest.raises(ArtifactError, match=rf"9{suffix}: images of this kind are not read.*save them as PNG"):
        load_images(folder, "val", image_size=14)


def test_limit_and_skip_cut_disjoint_parts_that_stay_the_same(idx):
    def take(**cut):
        return load_images(idx, "train", **cut).labels.tolist()

    assert take(limit=3) + take(skip=3, limit=2) + take(skip=5) == take()
    assert sorted(take()) == list(range(7))
    assert take(limit=3) == take(limit=3)
    with pytest.raises(ArtifactError, match="no images left of 7"):
        take(skip=7)
    for name, wrong in (("limit", -1), ("skip", -3), ("limit", 2.5)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 0"):
            take(**{name: wrong})


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


# Image files


def ramp(dtype=np.uint8, white=255):
    return (np.linspace(0, 1, 1600).reshape(40, 40) * white).round().astype(dtype)


def tiff(values: np.ndarray, sample_format: int, bits: int | None = None, photometric: int = 1) -> bytes:
    """Return a TIFF of one strip, written by hand: Pillow writes few of the kinds that it reads."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    photometric = 2 if samples == 3 else photometric
    data, bits = values.tobytes(), bits or 8 * values.itemsize
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: height}
    numbers |= {279: len(data), 339: sample_format}
    first = 8 + 2 + 12 * len(numbers) + 4  # past the directory
    per_sample = {258: struct.pack(f"<{samples}H", *[bits] * samples)} if samples > 2 else {}
    numbers[273] = first + sum(map(len, per_sample.values()))
    entries = b""
    for tag, number in numbers.items():
        if tag in per_sample:
            entries += struct.pack("<HHII", tag, 3, samples, first)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, number)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(numbers))
    return head + entries + struct.pack("<I", 0) + b"".join(per_sample.values()) + data


def png16(values: np.ndarray, colour: int) -> bytes:
    """Return a PNG of 16 bits a sample, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(values, suffix: str, mode: str | None = None, **options) -> bytes:
    image = pytest.importorskip("PIL.Image").fromarray(values)
    file = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(file, suffix, **options)
    return file.getvalue()


def colour(dtype=np.uint8, white=255):
    return np.stack([ramp(dtype, white)] * 3, -1)


U2, WHITE = np.uint16, 65535
READ = {
    "8 bits": ("png", lambda: saved(ramp(), "PNG")),
    "RGB": ("png", lambda: saved(colour(), "PNG")),
    "RGBA": ("png", lambda: saved(colour(), "PNG", "RGBA")),
    "LA": ("png", lambda: saved(ramp(), "PNG", "LA")),
    "CMYK": ("tif", lambda: saved(colour(), "TIFF", "CMYK")),
    "CMYK JPEG": ("jpg", lambda: saved(colour(), "JPEG", "CMYK", quality=100)),
    "BMP": ("bmp", lambda: saved(colour(), "BMP")),
    "16-bit PNG": ("png", lambda: saved(ramp(U2, WHITE), "PNG")),
    "16-bit RGB PNG": ("png", lambda: png16(colour(U2, WHITE), 2)),
    "16-bit LA PNG": ("png", lambda: png16(np.stack([ramp(U2, WHITE)] * 2, -1), 4)),
    "16-bit TIFF": ("tif", lambda: saved(ramp(U2, WHITE), "TIFF")),
    "16-bit TIFF, white is 0": ("tiff", lambda: tiff(WHITE - ramp(U2, WHITE), 1, photometric=0)),
    "16-bit RGB TIFF": ("tiff", lambda: tiff(colour(U2, WHITE), 1)),
    "16-bit PGM": ("pgm", lambda: b"P5 40 40 65535\n" + ramp(">u2", WHITE).tobytes()),
    "12-bit PGM": ("pgm", lambda: b"P5 40 40 4095\n" + ramp(">u2", 4095).tobytes()),
    "float TIFF": ("tif", lambda: saved((ramp(U2, WHITE) / WHITE).astype(np.float32), "TIFF")),
}


def one_file(tmp_path, name: str, content: bytes):
    """Return a folder of one class with one file in it, opened."""
    (tmp_path / "one").mkdir(exist_ok=True)
    (tmp_path / "one" / name).write_bytes(content)
    return load_images(tmp_path, image_size=35)  # resized to the file's own 40, and cut


@pytest.mark.parametrize("kind", READ)
def test_image_files_of_every_depth_hold_the_same_ramp(tmp_path, kind):
    suffix, content = READ[kind]
    image = one_file(tmp_path, f"a.{suffix}", content())[0][0]
    expected = torch.linspace(0, 1, 1600).reshape(40, 40)[2:37, 2:37].expand(3, -1, -1)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected, atol=0.015 if "JPEG" in kind else 0.004, rtol=0)


@pytest.mark.parametrize("kind", ["1", "P", "transparent palette", "EXIF"])
def test_image_files_that_torchvision_reads_right_are_read_alike(tmp_path, kind):
    """Palettes lose their transparency there, and an orientation in EXIF is left alone."""
    folder = pytest.importorskip("torchvision.datasets.folder")
    exif = pytest.importorskip("PIL.Image").Exif()
    exif[274] = 6
    content = {
        "1": lambda: saved(colour(), "PNG", "1"),
        "P": lambda: saved(colour(), "PNG", "P"),
        "transparent palette": lambda: saved(colour(), "PNG", "P", transparency=bytes(range(256))),
        "EXIF": lambda: saved(colour(), "JPEG", exif=exif),
    }[kind]()
    found = one_file(tmp_path, "a.jpg" if kind == "EXIF" else "a.png", content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.array(folder.default_loader(found.images.paths[0]))[2:37, 2:37]
    torch.testing.assert_close(found[0][0], torch.from_numpy(theirs).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lambda: saved(ramp(np.int32, 255), "TIFF"), "32-bit integers, of which no value is white"),
        (lambda: tiff(ramp(np.int16, 255), 2), "signed or 32-bit integers"),
        (lambda: tiff(ramp(np.uint32, 2**32 - 1), 1), "32-bit integers"),
        (lambda: saved(ramp(np.float32, 255), "TIFF"), "floats from 0 to 255; expected .0, 1."),
        (lambda: saved(ramp(np.float32, np.nan), "TIFF"), "floats from nan"),
        (lambda: tiff(colour(np.float32, 1), 3), "not an image that Pillow reads"),
    ],
)
def test_image_files_without_a_certain_range_are_refused(tmp_path, content, problem):
    found = one_file(tmp_path, "a.tif", content())
    with pytest.raises(ArtifactError, match=rf"one.a\.tif: .*{problem}"):
        found[0]


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_named_wherever_they_end(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = saved(noise, suffix)
    for end in (0, 5, len(content) // 9, len(content) // 2):
        found = one_file(tmp_path, f"a.{suffix.lower()}", content[:end])
        with pytest.raises(ArtifactError, match=rf"a\.{suffix.lower()}: truncated or not an image"):
            found[0]


@pytest.mark.parametrize("limit", [900, 500])  # Pillow warns up to twice its limit, and raises above
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    found = one_file(tmp_path, "a.png", saved(ramp(), "PNG"))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ArtifactError, match=rf"a\.png: more than the {limit} pixels .* bomb"):
        found[0]


# Folders


def fill(directory, *files):
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(saved(ramp()[:8, :8], "PNG"))


def by_file(found):
    return {path.rpartition("/")[2]: int(label) for path, label in zip(found.images.paths, found.labels, strict=True)}


def test_what_systems_leave_behind_is_no_image_and_no_class(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png", ".ipynb_checkpoints/3.png", "__MACOSX/a/4.png", "b/.ipynb_checkpoints/5.png")
    fill(tmp_path, "a/._1.png", "b/@eaDir/6.png", ".DS_Store", "Thumbs.db", "a/Thumbs.db", "a/.DS_Store", "stray.png")
    assert by_file(load_images(tmp_path)) == {"1.png": 0, "2.png": 1}


@pytest.mark.parametrize("how", ["split", "path"])
def test_classes_are_those_of_the_training_images(tmp_path, how):
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/4.png", "val/c/5.png")
    (tmp_path / "val/b").mkdir()
    found = load_images(tmp_path, "val") if how == "split" else load_images(tmp_path / "val")
    assert by_file(found) == {"4.png": 0, "5.png": 2}
    fill(tmp_path, "val/d/6.png", "other/x/7.png")
    with pytest.raises(ArtifactError, match=r"d is none of the classes in .*train"):
        load_images(tmp_path, "val")
    assert by_file(load_images(tmp_path, "other")) == {"7.png": 0}
    (tmp_path / "other/y").mkdir()
    with pytest.raises(ArtifactError, match="no images in y"):
        load_images(tmp_path, "other")


@pytest.mark.parametrize("classes_from", ["train", "wnids.txt", "annotations"])
@pytest.mark.parametrize("how", ["split", "path"])
def test_tiny_imagenet_as_distributed(tmp_path, classes_from, how):
    names = ["n3", "n1", "n3", "n2"] if classes_from == "annotations" else ["n4", "n2", "n4", "n3"]
    fill(tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(4)))
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t1\t1\n" for i, name in enumerate(names)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    if classes_from == "wnids.txt":
        (tmp_path / "wnids.txt").write_text("n3\nn1\nn2\nn4\n")
    if classes_from == "train":
        fill(tmp_path, *(f"train/n{i}/images/n{i}_0.JPEG" for i in (3, 1, 2, 4)))
        assert by_file(load_images(tmp_path, "train")) == {f"n{i}_0.JPEG": i - 1 for i in (1, 2, 3, 4)}
    found = load_images(tmp_path, "val") if how == "split" else load_images(tmp_path / "val")
    labels = [2, 0, 2, 1] if classes_from == "annotations" else [3, 1, 3, 2]
    assert by_file(found) == {f"val_{i}.JPEG": label for i, label in enumerate(labels)}
    fill(tmp_path, "val/images/val_9.JPEG")
    with pytest.raises(ArtifactError, match=r"val_9\.JPEG has no class"):
        load_images(tmp_path, "val")


def test_tiny_imagenet_repacked(tmp_path):
    fill(tmp_path, "train/n1/images/1.JPEG", "train/n2/images/2.JPEG", "val/n2/images/3.JPEG", "val/n1/4.JPEG")
    (tmp_path / "val/images").mkdir()
    (tmp_path / "val/val_annotations.txt").write_text("3.JPEG\tn2\n")
    assert by_file(load_images(tmp_path, "val")) == {"3.JPEG": 1, "4.JPEG": 0}


def test_flat_folders_are_refused(tmp_path):
    fill(tmp_path, "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
    (tmp_path / "val/ground_truth.txt").write_text("1\n2\n")
    with pytest.raises(ArtifactError, match=r"2 images directly in it, .*no labels .*one directory per class"):
        load_images(tmp_path / "val")


# Arrays


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("train_images", "train_labels", "train"),
        ("x_test", "y_test", "test"),
        ("X", "Y", None),
        ("images", "labels", None),
        ("data", "targets", None),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy", "file"])
def test_names_of_arrays(tmp_path, pictures, images, labels, split, kind):
    """MedMNIST's, Keras' and the usual ones; labels [N, 1], as MedMNIST has them."""
    path = tmp_path / "data"
    path.mkdir()
    arrays = {images: pictures, labels: np.arange(7, dtype=np.uint8)[:, None]}
    if split is not None:
        arrays |= {images.replace(split, "val"): pictures[:3], labels.replace(split, "val"): np.arange(3)}
    if kind == "npz":
        np.savez(path / "a.npz", **arrays)
        path = path / "a.npz"
    else:
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    found = load_images(path / f"{images}.npy") if kind == "file" else load_images(path, split)
    got, numbers = as_sorted(found)
    assert torch.equal(numbers, torch.arange(7))
    torch.testing.assert_close(got, torch.from_numpy(pictures).float().unsqueeze(1) / 255)


def test_labels_in_files(tmp_path, pictures):
    found = load_images(npz(tmp_path / "a.npz", images=pictures, labels=np.eye(7)))
    assert sorted(found.labels.tolist()) == list(range(7))
    with pytest.raises(ArtifactError, match="neither class numbers nor one-hot"):
        load_images(npz(tmp_path / "b.npz", images=pictures, labels=np.ones((7, 14), np.uint8)))
    np.savez(tmp_path / "c.npz", pictures, np.arange(7))
    with pytest.raises(ArtifactError, match="no images and labels in it, but arr_0, arr_1"):
        load_images(tmp_path / "c.npz")


def test_npy_files_are_not_unpickled(tmp_path):
    np.save(tmp_path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "labels.npy", np.arange(1))
    with pytest.raises(ArtifactError, match=r"images\.npy: .*plain array"):
        load_images(tmp_path)


# CIFAR


@pytest.fixture
def cifar() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8), np.array([3, 1, 0, 2, 5, 4])


def check_cifar(found, images, labels):
    got, numbers = as_sorted(found)
    order = np.argsort(labels)
    assert numbers.tolist() == labels[order].tolist()
    torch.testing.assert_close(got, torch.from_numpy(images[order].reshape(-1, 3, 32, 32)).float() / 255)


def distributed(monkeypatch, directory, kind: str, held: dict[str, dict]) -> None:
    """Write pickled batches and a ``meta`` to a directory, and let torchvision take them for the distributed ones."""
    datasets = pytest.importorskip("torchvision.datasets")
    files = {name: pickle.dumps(values) for name, values in held.items()}
    for name, raw in files.items():
        (directory / name).write_bytes(raw)
    sums = {name: [name, hashlib.md5(raw).hexdigest()] for name, raw in files.items()}
    meta, *test = sorted((n for n in files if "meta" in n or "test" in n), key=lambda name: "meta" not in name)
    monkeypatch.setattr(getattr(datasets, kind), "test_list", [sums[name] for name in test])
    monkeypatch.setattr(getattr(datasets, kind), "train_list", [s for n, s in sums.items() if n not in (meta, *test)])
    key = next(iter(held[meta]))
    monkeypatch.setattr(getattr(datasets, kind), "meta", {"filename": meta, "key": key, "md5": sums[meta][1]})


def cifar_10(images, labels):
    def batch(part):
        return {"data": images[part], "labels": labels[part].tolist(), "filenames": ["a.png"]}

    batches = {"data_batch_1": batch(slice(0, 2)), "data_batch_2": batch(slice(2, 5)), "test_batch": batch(slice(5, 6))}
    return batches | {"batches.meta": {"label_names": ["a", "b"]}}


def test_cifar_python(tmp_path, cifar, monkeypatch):
    images, labels = cifar
    distributed(monkeypatch, tmp_path, "CIFAR10", cifar_10(images, labels))
    check_cifar(load_images(tmp_path, "train"), images[:5], labels[:5])
    check_cifar(load_images(tmp_path, "test"), images[5:], labels[5:])
    with pytest.raises(ArtifactError, match="several splits; choose one of test, train"):
        load_images(tmp_path)


def test_cifar_binary(tmp_path, cifar):
    images, labels = cifar
    rows = np.concatenate([labels[:, None].astype(np.uint8), images], 1)
    rows[:4].tofile(tmp_path / "data_batch_1.bin")
    rows[4:5].tofile(tmp_path / "data_batch_2.bin")
    rows[5:].tofile(tmp_path / "test_batch.bin")
    check_cifar(load_images(tmp_path, "train"), images[:5], labels[:5])
    check_cifar(load_images(tmp_path, "test"), images[5:], labels[5:])
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        load_images(tmp_path, "test")


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar_100_has_its_fine_labels(tmp_path, cifar, kind, monkeypatch):
    images, labels = cifar
    if kind == "python":
        batch = {"data": images, "fine_labels": labels.tolist(), "coarse_labels": [0] * 6}
        meta = {"fine_label_names": ["a", "b"]}
        distributed(monkeypatch, tmp_path, "CIFAR100", {"train": batch, "test": batch, "meta": meta})
    else:
        coarse = np.zeros((6, 1), np.uint8)
        np.concatenate([coarse, labels[:, None].astype(np.uint8), images], 1).tofile(tmp_path / "train.bin")
    check_cifar(load_images(tmp_path, "train"), images, labels)


class Attack:
    """Makes a directory where it is unpickled."""

    def __init__(self, place) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"])
def test_other_pickles_than_cifars_are_not_read(tmp_path, cifar, monkeypatch, name):
    distributed(monkeypatch, tmp_path, "CIFAR10", cifar_10(*cifar))
    whole = (tmp_path / name).read_bytes()
    for raw in (pickle.dumps({b"data": Attack(tmp_path / "made"), b"labels": [0]}), whole[:-20], b""):
        (tmp_path / name).write_bytes(raw)
        for split in ("train", "test"):
            with pytest.raises(ArtifactError, match="not CIFAR10's own batches, all of them, by their checksums"):
                load_images(tmp_path, split)
    assert not (tmp_path / "made").exists()
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match="not CIFAR10's own batches, all of them"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize("layout", ["folder", "cifar"])
def test_what_needs_torchvision_says_so(tmp_path, folder, cifar, monkeypatch, layout):
    if layout == "cifar":
        distributed(monkeypatch, folder / "val", "CIFAR10", cifar_10(*cifar))
    for name in [name for name in sys.modules if name.startswith(("torchvision", "meansparse_fx.data.folder"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ArtifactError, match=r"torchvision is needed: pip install 'meansparse_fx\[zoo\]'"):
        load_images(folder / "val", "train" if layout == "cifar" else None)


# The bundled network


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


def pictures_of(root, sizes):
    image = pytest.importorskip("PIL.Image")
    for i, size in enumerate(sizes):
        place = root / "train" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((size[1], size[0], 3), 50 * i, np.uint8)).save(place / f"{i}.png")
    return root


def test_a_folder_of_one_size_is_left_as_it_is(tmp_path):
    found = load_images(pictures_of(tmp_path, [(32, 24)] * 5), "train")
    assert "24x32 as stored" in found.description
    for image, _ in found:
        assert image.shape == (3, 24, 32)
        assert (image * 255).round().unique().numel() == 1
    assert load_images(tmp_path, "train", image_size=16)[0][0].shape == (3, 16, 16)


def test_a_folder_of_several_sizes_says_what_it_is_resized_to(tmp_path):
    found = load_images(pictures_of(tmp_path, [(32, 32), (40, 32)]), "train")
    assert found[0][0].shape == (3, 224, 224)
    assert "resized to 256 and cut to 224x224" in found.description


def test_a_size_that_was_not_looked_at_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("meansparse_fx.data.folder.LOOKED_AT", 2)
    found = load_images(pictures_of(tmp_path, [(32, 32), (32, 32), (32, 32), (40, 32)]), "train")
    with pytest.raises(ArtifactError, match="40x32, where others are 32x32"):
        list(found)
