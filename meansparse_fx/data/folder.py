"""Floor 1: images in a directory for each class, as torchvision's ImageFolder has them, and Tiny-ImageNet's own layout.

Left out is what systems and notebooks leave behind. The classes are those of the training images: a class that is
missing among the validation images does not shift the numbers of those after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import ArtifactError
from .image_files import DEFAULT_SIZE, ImageFiles, common_size
from .image_set import LAYOUTS, ImageSet, describe

_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing")
_LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
LOOKED_AT = 500  # files whose sizes are looked up; that of each is checked when it is read
_UNREAD = {".gif", ".jfif", ".jp2", ".jxl", ".avif", ".heic", ".heif"}  # nor by torchvision
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet


def open_folder(path: Path, split: str | None, image_size: int | None) -> ImageSet:
    """Return the images of a folder, unread but for the sizes of some, if no size is asked for."""
    root = path / split if split else path
    if not root.is_dir():
        raise ArtifactError(f"{path}: has no subdirectory {split!r}")
    distributed = (root / _ANNOTATIONS).is_file() and _has_images(root / "images")
    samples = _annotated(root) if distributed else _by_directory(root)
    paths, labels = zip(*samples, strict=True)
    own = common_size(paths[:: max(1, len(paths) // LOOKED_AT)]) if image_size is None else None
    images = ImageFiles(list(paths), image_size or DEFAULT_SIZE, own)
    return ImageSet(images, torch.tensor(labels), f"{describe(path, split)}, {images.description}")


def _by_directory(root: Path) -> Sequence[tuple[str, int]]:
    directories = _directories(root)
    unread = (f for d in directories for f in d.iterdir() if f.suffix.lower() in _UNREAD and _visible(f.name))
    if (file := next(unread, None)) is not None:
        raise ArtifactError(f"{file}: images of this kind are not read, and none is left out: save them as PNG")
    if not any(_has_images(d) or _has_images(d / "images") for d in directories):
        _refuse(root, directories)

    def wanted(file: str) -> bool:
        inside = Path(file).relative_to(root)
        return inside.suffix.lower() in IMG_EXTENSIONS and all(map(_visible, inside.parts))

    names = [d.name for d in directories]
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        warnings.warn(
            f"{root}: classes are numbered by their names in alphabetical order, as torchvision's ImageFolder does, so "
            f"{names[1]!r} is class 1. If the names are class numbers, write them with as many digits each",
            stacklevel=2,
        )
    found = make_dataset(root, {name: i for i, name in enumerate(names)}, is_valid_file=wanted, allow_empty=True)
    filled = {names[label] for _, label in found}
    classes = _training_classes(root, filled)
    if classes is None:
        if empty := [name for name in names if name not in filled]:
            raise ArtifactError(f"{root}: no images in {', '.join(empty[:5])}: a class without images, or no class?")
        return found
    number = {name: i for i, name in enumerate(classes)}
    return [(file, number[names[label]]) for file, label in found]


def _annotated(root: Path) -> list[tuple[str, int]]:
    """Return the validation images of Tiny-ImageNet as it is distributed: all in one directory, classes in a file."""
    rows = [line.split("\t") for line in (root / _ANNOTATIONS).read_text("utf-8").splitlines() if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise ArtifactError(f"{root / _ANNOTATIONS}: {short[0]} is no file and class, with a tab between them")
    listed = {row[0]: row[1] for row in rows}
    there = {f.name for f in (root / "images").iterdir() if _is_image(f)}
    if different := sorted(there ^ listed.keys()):
        problem = "is not there" if different[0] in listed else "has no class"
        raise ArtifactError(f"{root / _ANNOTATIONS}: {different[0]} {problem} ({len(different)} such files)")
    held = set(listed.values())
    words = next((f for f in (root / "wnids.txt", root.parent / "wnids.txt") if f.is_file()), None)
    known = _training_classes(root, held) or (held if words is None else words.read_text("utf-8").split())
    number = {name: i for i, name in enumerate(sorted(known))}
    if unknown := sorted(held - number.keys()):
        raise ArtifactError(f"{root / _ANNOTATIONS}: {unknown[0]} is none of the classes in {words}")
    return [(str(root / "images" / file), number[name]) for file, name in listed.items()]


def _training_classes(root: Path, held: set[str]) -> list[str] | None:
    """Return the classes of the training images beside ``root``, of which those held must be; None without such."""
    here = root.resolve()
    beside = [d for d in _directories(here.parent) if d.name.lower() in _TRAIN and d != here]
    classes = [d.name for d in _directories(beside[0])] if beside else []
    foreign = sorted(held - {*classes})
    # A folder of another name, with other classes, is another data set that happens to lie there.
    unrelated = here.name.lower() not in _HELD_OUT and len(foreign) == len(held)
    if not classes or here.name.lower() in _TRAIN or unrelated:
        return None
    if foreign:
        raise ArtifactError(
            f"{root}: {foreign[0]} is none of the classes in {beside[0]} ({len(foreign)} such): labels would not mean "
            "the same in both; name the directories alike"
        )
    return classes


def _refuse(root: Path, directories: Sequence[Path]) -> None:
    if flat := sum(map(_is_image, root.iterdir())):
        annotated = (root.parent / _ANNOTATIONS).is_file()
        cure = f"give {root.parent}, which has their classes" if annotated else "sort them into one directory per class"
        raise ArtifactError(
            f"{root}: {flat} images directly in it, without directories of classes, so they have no labels (a list of "
            f"labels beside them, as ImageNet's, is not read): {cure}"
        )
    names = ", ".join(d.name for d in directories[:5])
    hint = f" (a split of it? it holds {names})" if names else ""
    raise ArtifactError(f"{root}: not a layout this package reads{hint}; expected {LAYOUTS}")


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in _LEFT_BEHIND


def _directories(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if _visible(d.name) and d.is_dir())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMG_EXTENSIONS and _visible(file.name) and file.is_file()


def _has_images(directory: Path) -> bool:
    return directory.is_dir() and any(map(_is_image, directory.iterdir()))
