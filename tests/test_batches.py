"""Intake of data: whatever a loader yields, the same images and labels reach the model, or an error says what to do."""

from __future__ import annotations

import collections
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import meansparse_fx as msfx
from meansparse_fx.batches import Intake, class_numbers, labelled
from meansparse_fx.errors import CalibrationError, DataError, EvaluationError

Named = collections.namedtuple("Named", ["label", "image"])  # not in the usual order


@dataclasses.dataclass
class Record:
    targets: object
    images: object
    path: str = "somewhere"


class Model(nn.Module):
    """Three logits of any images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * self.weight


class Samples(Dataset):
    """Single images with their labels; without an end that iteration would see."""

    def __init__(self, images, labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index % len(self)], int(self.labels[index % len(self)])


class Stream(IterableDataset):
    def __init__(self, elements) -> None:
        self.elements = elements

    def __iter__(self):
        return iter(self.elements)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y() -> torch.Tensor:
    return torch.tensor([2, 0, 1, 1, 0, 2])


def taken(data, model=None, batch_size=4):
    batches = list(labelled(data, batch_size, model or Model()))
    assert all(labels.dtype == torch.int64 and labels.dim() == 1 for _, labels in batches)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


LOADERS = {
    "tensors": lambda x, y: (x, y),
    "list of tensors": lambda x, y: [x, y],
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "tensor and list": lambda x, y: (x, y.tolist()),
    "dictionary of all": lambda x, y: {"image": x, "label": y},
    "list of batches": lambda x, y: [(x[:4], y[:4]), (x[4:], y[4:])],
    "tuple of batches": lambda x, y: ([x[:4], y[:4]], [x[4:], y[4:]]),
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), 4),
    "index as third": lambda x, y: DataLoader(TensorDataset(x, y, torch.arange(6)), 4),
    "Dataset": lambda x, y: Samples(x, y),
    "list of samples": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "no batching": lambda x, y: DataLoader(Samples(x, y), batch_size=None),
    "left as lists": lambda x, y: DataLoader(Samples(x, y), 4, collate_fn=list),
    "tuples of tensors": lambda x, y: DataLoader(Samples(x, y), 4, collate_fn=lambda s: tuple(zip(*s, strict=True))),
    "without length": lambda x, y: DataLoader(Stream(list(zip(x, y, strict=True))), 4),
    "IterableDataset": lambda x, y: Stream([{"pixel_values": i, "labels": j} for i, j in zip(x, y, strict=True)]),
    "dictionaries": lambda x, y: [{"pixel_values": x[:4], "labels": y[:4]}, {"pixel_values": x[4:], "labels": y[4:]}],
    "other keys": lambda x, y: [{"__key__": ["a"] * 6, "JPG": x, "cls": y}],
    "label in a dictionary": lambda x, y: [(x, {"target": y, "area": y})],
    "namedtuple": lambda x, y: [Named(y, x)],
    "dataclass": lambda x, y: [Record(y, x)],
    "UserDict": lambda x, y: [collections.UserDict(image=x, label=y)],
    "generator": lambda x, y: ((x[i : i + 2], y[i : i + 2]) for i in range(0, 6, 2)),
    "[N, 1]": lambda x, y: (x, y[:, None]),
    "one-hot": lambda x, y: (x, nn.functional.one_hot(y, 3)),
    "one-hot floats": lambda x, y: (x, nn.functional.one_hot(y, 3).float()),
    "one-hot bools": lambda x, y: (x, nn.functional.one_hot(y, 3).bool().numpy()),
    "int32": lambda x, y: (x, y.int()),
    "uint8": lambda x, y: (x, y.to(torch.uint8)),
    "uint16": lambda x, y: (x, y.numpy().astype(np.uint16)),
    "big-endian": lambda x, y: (x, y.numpy().astype(">i4")),
    "list of scalars": lambda x, y: [(x, list(y))],
    "float64": lambda x, y: (x.double(), y),
    "float64 array": lambda x, y: (x.numpy().astype(np.float64), y),
    "subclass": lambda x, y: (x.as_subclass(type("Image", (torch.Tensor,), {})), y),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_a_loader_yields(x, y, kind):
    images, labels = taken(LOADERS[kind](x, y))
    assert type(images) is torch.Tensor
    assert images.dtype == torch.float32
    assert torch.equal(images, x)
    assert torch.equal(labels, y)


@pytest.fixture(scope="module")
def sparse():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    return msfx.transform(net, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [k for k in LOADERS if k != "subclass"])
def test_calibrate_takes_the_same(sparse, x, y, kind):
    found = msfx.calibrate(sparse, LOADERS[kind](x, y), progress=False)
    whole = msfx.calibrate(sparse, [x], progress=False)
    assert found.images == 6
    assert found["1"].count == whole["1"].count
    torch.testing.assert_close(found["1"].mean, whole["1"].mean)


@pytest.mark.parametrize("data", [lambda x: x, lambda x: x.split(3), lambda x: TensorDataset(x), lambda x: x.numpy()])
def test_images_alone(sparse, x, data):
    found = msfx.calibrate(sparse, data(x), progress=False)
    assert (found.images, found["1"].count) == (6, 6 * 36)


def test_a_checkpoint_of_a_loader_without_length(sparse, x, y, tmp_path):
    def loader():
        return DataLoader(Stream(list(zip(x, y, strict=True))), 2)

    kept = {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    first = msfx.calibrate(sparse, loader(), **kept)
    assert torch.equal(msfx.calibrate(sparse, loader(), **kept)["1"].mean, first["1"].mean)


def test_the_verbs_share_it(sparse, x, y):
    quick = {"attacks": ("pgd",), "steps": 1, "progress": False}
    msfx.calibrate(sparse, DataLoader(Stream(list(zip(x, y, strict=True))), 4), progress=False)
    data = [{"image": (x * 255).to(torch.uint8), "label": nn.functional.one_hot(y, 3)}]
    with pytest.warns(UserWarning, match="scaled by 1/255"):
        found = msfx.evaluate(sparse, data, sanity_images=0, **quick)
    with pytest.warns(UserWarning, match="scaled by 1/255"):
        msfx.select_alpha(sparse, data, alphas=(0.1,), **quick)
    same = msfx.evaluate(sparse, ((x * 255).to(torch.uint8) / 255, y), sanity_images=0, **quick)
    assert torch.equal(found.base.clean, same.base.clean)
    assert found.n_test == 6
    for verb in (msfx.evaluate, msfx.select_alpha):
        with pytest.raises(DataError, match="image 0: label 9 is out of range for a model of 3 classes"):
            verb(sparse, (x, y + 7), **quick)


def test_bytes_are_scaled_and_said_so_once(x, y):
    stored = (x * 255).to(torch.uint8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images, _ = taken(DataLoader(TensorDataset(stored, y), 2))
    assert [str(w.message) for w in said] == ["images of uint8: scaled by 1/255 to [0, 1]"]
    assert torch.equal(images, stored / 255)


def test_images_take_the_models_dtype(x):
    for dtype, given, expected in (
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),  # such models may cast by themselves
    ):
        assert Intake(Model().to(dtype)).images(x.to(given)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attacked_models_take_float32(x, y, dtype):
    """Attacks give images of float32, whatever the test images were of: torch's own error came out of them."""
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).to(dtype), x.to(dtype)
    with pytest.raises(DataError, match=r"of another dtype, and attacks compute in float32: transform model.float\(\)"):
        list(labelled((images, y), 2, model))
    (found, _), *_ = labelled((images, y), 2, model.float())
    assert found.dtype == torch.float32


REFUSED = {
    "labels beyond": (
        lambda x, y: [(x[:4], y[:4]), (x[4:], y[4:] + 1)],
        "image 5: label 3 is out of range",
    ),
    "negative": (lambda x, y: (x, y - 1), "image 1: label -1 is out of range"),
    "of another width": (lambda x, y: (x, nn.functional.one_hot(y, 5)), "one-hot labels of 5 classes for a model of 3"),
    "soft": (lambda x, y: (x, torch.full((6, 3), 1 / 3)), "neither class numbers nor one-hot"),
    "several": (lambda x, y: (x, torch.ones(6, 3)), "neither class numbers nor one-hot"),
    "float": (lambda x, y: (x, y.double()), "integers from 0, found torch.float64"),
    "words": (lambda x, y: [(x, ["cat"] * 6)], r"words \(cat, ...\) where a tensor of labels .* class numbers"),
    "one for all": (lambda x, y: (x, y[0]), "6 images and 1 labels"),
    "too few": (lambda x, y: (x, y[:5]), "6 images and 5 labels"),
    "too few in a batch": (lambda x, y: [(x, y[:5])], r"labels \[5\] for 6 images"),
    "masks": (lambda x, y: [(x, torch.zeros(6, 8, 8))], r"labels \[6, 8, 8\] for 6 images"),
    "none": (lambda x, y: [x], "there are no labels"),
    "0 to 255": (lambda x, y: (x * 255, y), "must be in .0, 1. .* divide them by 255"),
    "normalised": (lambda x, y: (x * 4 - 2, y), "put the normalisation into the model"),
    "NaN": (lambda x, y: (x * torch.nan, y), "must be in .0, 1. .found nan"),
    "int64 images": (lambda x, y: ((x * 255).long(), y), r"images of torch.int64: .*to\(torch.uint8\)"),
    "several shapes": (
        lambda x, y: [([x[0], x[1, :, :4]], y[:2])],
        "make no batch, resize them: .*equal size",
    ),
    "samples of several shapes": (lambda x, y: [(x[0], 1), (x[1, :, :4], 2)], "resize"),
    "words for images": (lambda x, y: ["x"], "yielded str|no labels"),
    "objects": (lambda x, y: Samples([object()] * 6, y), "ToTensor"),
    "unknown keys": (lambda x, y: [{"a": x, "b": y}], "keys 'a', 'b': none of them says that it is the images"),
    "two of a kind": (lambda x, y: [{"image": x, "img": x, "label": y}], "which of 'image', 'img' are the images"),
    "a path": (lambda x, y: "imagenet/val", "is a path: open it"),
    "no loader": (lambda x, y: 3, "int is no loader"),
    "empty": (lambda x, y: [], "no images: the loader yielded none"),
    "empty loader": (lambda x, y: DataLoader(Stream([])), "no images: the loader yielded none"),
    "no images": (lambda x, y: (x[:0], y[:0]), "no images"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_cure(x, y, kind):
    data, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        list(labelled(data(x, y), 4, Model()))


def test_channels_last_are_refused_with_the_cure(y):
    with pytest.raises(DataError, match=r"channels last: images.permute\(0, 3, 1, 2\)"):
        list(labelled((torch.rand(6, 8, 8, 3), y), 4, nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())))


UNFIT = {
    "channels": lambda x, y: (x[:, :1], y),
    "size": lambda x, y: (nn.functional.pad(x, (0, 1)), y),
    "order": lambda x, y: [(y, x)],
    "two views": lambda x, y: [((x, x), y)],
    "numbered": lambda x, y: enumerate([(x, y)]),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_images_that_a_model_cannot_take_are_said(kind, x, y):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    sparse = msfx.transform(model, x)
    with pytest.raises(DataError, match=r"images \[.*\] of torch"):
        msfx.calibrate(sparse, UNFIT[kind](x, y), progress=False)
    msfx.calibrate(sparse, [x], progress=False)
    with pytest.raises(DataError, match=r"images|labels"):
        msfx.evaluate(sparse, UNFIT[kind](x, y), attacks=("pgd",), steps=1, sanity_images=0, progress=False)


def test_a_list_of_images_is_no_list_of_batches(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with pytest.raises(DataError, match=r"images \[3, 8, 8\].*image.unsqueeze\(0\) is a batch of one image"):
        msfx.calibrate(msfx.transform(model, x), list(x), progress=False)


def test_a_generator_used_twice_is_an_error_that_says_it(sparse, x, y):
    generator = (batch for batch in [(x, y)])
    msfx.calibrate(sparse, generator, progress=False)
    for verb in (msfx.calibrate, msfx.select_alpha, msfx.evaluate):
        with pytest.raises(DataError, match=r"a generator .* can be read once only, and this one is used up"):
            verb(sparse, generator, progress=False)


def test_calibrate_refuses_images_up_to_255(sparse, x):
    with pytest.raises(DataError, match=r"from .* to 25.*: expected .0, 1.; divide them by 255"):
        msfx.calibrate(sparse, [x * 255], progress=False)
    assert msfx.calibrate(sparse, [x * 8 - 4], progress=False).images == 6  # normalised ones are the model's affair


def test_errors_of_data_are_those_of_the_verb(sparse, x):
    with pytest.raises(CalibrationError):
        msfx.calibrate(sparse, ["x"], progress=False)
    with pytest.raises(EvaluationError):
        msfx.evaluate(sparse, [x], progress=False)


def test_class_numbers_of_one_image():
    assert class_numbers(3, 1)[0].tolist() == [3]
    assert class_numbers([[1]], 1)[0].tolist() == [1]
