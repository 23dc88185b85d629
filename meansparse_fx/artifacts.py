"""Floor 1: files written whole or not at all, and kept elsewhere where there is no place for them.

Also files of tensors with a JSON header, as safetensors, never unpickled, and hashes of tensors.

Knows nothing of what is in them. Imports errors only.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtifactError, WriteError, first_line


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values in their order, wherever and however it lies."""
    return tensor.detach().cpu().to_dense().contiguous().flatten().view(torch.uint8).numpy().data


def digest(*tensors: Tensor) -> str:
    """Return what stands for the values, types and shapes of tensors."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor_bytes(tensor))
    return state.hexdigest()


def write(
    path: str | Path,
    kind: str,
    version: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    rescue: bool = False,
) -> None:
    """Write tensors and a header of JSON as a file of that kind, as `write_whole` does; equal contents, equal bytes."""
    # One entry: the order in which safetensors writes several is random.
    entry = json.dumps({"format_version": version, **header})
    held = {k: v.contiguous().cpu() for k, v in tensors.items()}
    write_whole(path, lambda place: save_file(held, str(place), metadata={kind: entry}), rescue)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write values as a JSON file, as `write_whole` does; where it cannot be written it is kept elsewhere."""
    write_whole(path, lambda place: place.write_text(json.dumps(values, indent=2) + "\n", "utf-8"), rescue=True)


def read_json(path: str | Path, versions: Mapping[str, int]) -> dict[str, Any]:
    """Return the values of a JSON file of one of these formats, of its version here at most; else ArtifactError."""
    what = " or ".join(versions)
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        kind, version = str(values["format"]), int(values["version"])
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"  # the repr of a UnicodeDecodeError is the whole file
        raise ArtifactError(f"{path}: no {what} ({why}); if an older release wrote it, make it again") from error
    if kind not in versions:
        raise ArtifactError(f"{path}: holds {kind}, expected {what}")
    if version > versions[kind]:
        known = versions[kind]
        raise ArtifactError(f"{path}: {kind} of version {version}, this release reads {known}: update meansparse_fx")
    return values


def write_whole(path: str | Path, make: Callable[[Path], object], rescue: bool = False) -> None:
    """Make a file through a temporary one beside it, so that what a crash leaves is the old file or the new one.

    A device, such as ``/dev/stdout``, is written to and not replaced.

    Args:
        make: Writes the file at the path it is given.
        rescue: What cannot be written there took long to find: write it into the system's temporary folder instead.
    """
    path = Path(path)
    try:
        if _is_device(path):
            # By way of a file of its own: safetensors would put its file in the device's place.
            with tempfile.TemporaryDirectory(prefix="meansparse_fx-") as directory:
                make(place := Path(directory, path.name))
                path.write_bytes(place.read_bytes())
        else:
            _replace(path, make)
    except (OSError, SafetensorError) as error:
        kept = _rescued(path.name, make) if rescue else ""
        raise WriteError(f"{path}: cannot be written ({_reason(error)}){kept}") from error


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # some writers look at the suffix
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as the user's umask has it
        make(temporary)
        temporary.chmod(mode)  # safetensors gives its own files to their owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory, made if missing, as `write_whole` does with ``rescue``."""

    def fill(directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(directory / name, partial(Path.write_bytes, data=content))

    try:
        fill(path)
    except OSError as error:
        problem = str(error) if isinstance(error, WriteError) else f"{path}: cannot be written ({_reason(error)})"
        raise WriteError(problem + _rescued(path.name, fill)) from error


def require_place(path: Path | None, folder: bool = False) -> None:
    """Raise WriteError, before the work is done, where its result, a file or a folder of files, cannot be written."""
    if path is None or _is_device(path):
        return
    if path.is_dir() and not folder:
        raise WriteError(f"{path}: is a directory; give the name of a file in it")
    place = path.parent
    if folder:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not place.is_dir():
        raise WriteError(f"{place}: is a file, no directory" if folder else f"{path}: its directory does not exist")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({_reason(error)})") from error


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _rescued(name: str, make: Callable[[Path], object]) -> str:
    """Make it in the temporary folder and return where, as the end of a sentence."""
    directory = None
    try:
        directory = tempfile.mkdtemp(prefix="meansparse_fx-")
        make(place := Path(directory) / name)
    except (OSError, SafetensorError) as error:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        return f", and neither can the temporary folder ({_reason(error)})"
    return f"; it is kept as {place}: move it from there"


def _reason(error: Exception) -> str:
    """Return what went wrong, without the path."""
    return getattr(error, "strerror", None) or first_line(error)


def remove_partial(path: str | Path) -> None:
    """Remove what killed processes left of writing ``path``; no other process may be writing it now."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        left.unlink(missing_ok=True)


@contextmanager
def parsing(path: str | Path) -> Iterator[None]:
    """Raise ArtifactError where a file was read, and its contents are of another form than what wrote it gives them."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise ArtifactError(f"{path}: damaged, or not written by this package ({problem}): make it again") from error


def typed_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor that a file holds, or raise ValueError; a size of None may be any."""
    found = tensors[name]
    sizes = zip(found.shape, shape, strict=False)
    if found.dtype != dtype or found.dim() != len(shape) or any(asked not in (None, own) for own, asked in sizes):
        raise ValueError(f"{name} of another form")
    return found


def whole_number(value: Any) -> int:
    """Return a count that a header holds, or raise ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def read(path: str | Path, kind: str, version: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file that `write` made; ``what`` it should be is said where it is another."""
    try:
        with safe_open(str(path), framework="pt") as file:
            entries = file.metadata() or {}
            if kind not in entries:
                raise ArtifactError(f"{path}: a safetensors file, but not {what} of meansparse_fx")
            header = json.loads(entries[kind])
            if (found := header["format_version"]) != version:
                raise ArtifactError(f"{path}: format version {found}; this release reads {version}: make it again")
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: truncated or not {what} ({error})") from error
