"""Floor 1: files of tensors with a JSON header, as safetensors: written whole or not at all, never unpickled.

Knows nothing of what is in them. Imports errors only.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtifactError


def write(path: str | Path, kind: str, version: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file atomically, through a temporary one beside it; equal contents give equal bytes.

    Args:
        path: What a crash leaves is the old file or the new one.
        kind: Name of the format, such as ``meansparse_fx.statistics``.
        version: Of the format.
        header: Values that JSON can hold.
        tensors: By name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # One entry: the order in which safetensors writes several is random.
    entry = json.dumps({"format_version": version, **header})
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(temporary), metadata={kind: entry})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partial(path: str | Path) -> None:
    """Remove what killed processes left of writing ``path``; no other process may be writing it now."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        left.unlink(missing_ok=True)


def read(path: str | Path, kind: str, version: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file that `write` made.

    Args:
        path: The file.
        kind: The format expected.
        version: The version expected.
        what: The format in words, for messages: "a statistics file".

    Raises:
        FileNotFoundError: There is none.
        ArtifactError: It is truncated, not safetensors, of another kind or version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            entries = file.metadata() or {}
            if entries.get("format") == kind:  # version 1 kept its header in several entries
                found = entries.get("format_version")
            elif kind not in entries:
                raise ArtifactError(f"{path}: a safetensors file, but not {what} of meansparse_fx")
            else:
                header = json.loads(entries[kind])
                found = header["format_version"]
            if found != version:
                raise ArtifactError(
                    f"{path}: format version {found}; this release reads {version}: make the file again"
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: truncated or not {what} ({error})") from error
