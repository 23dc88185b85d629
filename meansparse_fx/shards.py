"""Floor 1: work divided among processes, and what they found brought together.

Imports torch and errors, and torch.distributed only if there is a group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArtifactError, first_line

_calls: Counter[tuple[int, ...]] = Counter()  # of `gather` by group: each call gets keys of its own


def place(group: Any) -> tuple[int, int]:
    """Return this process's rank and the number of processes in a group of torch.distributed; alone without one."""
    return (0, 1) if group is None else (group.rank(), group.size())


def own_file(path: Path, rank: int, world: int) -> Path:
    """Return the file of one of several processes: ``PATH.rank0-of-2``; of one, ``PATH`` itself."""
    others = {int(f.name.rpartition("-of-")[2]) for f in path.parent.glob(f"{path.name}.rank*-of-*")}
    others |= {1} if path.exists() else set()
    if strangers := others - {world}:
        raise ArtifactError(
            f"{path}: a checkpoint of {strangers.pop()} process(es), and now there are {world}: start as many again, "
            "or remove it to start from the beginning"
        )
    return path if world == 1 else path.with_name(f"{path.name}.rank{rank}-of-{world}")


def gather(value: Any, group: Any) -> list[Any]:
    """Return the value of every process of a group, in order, once all have come here, however long that takes.

    Values travel pickled. The launcher must see to it that no process waits for one that is gone, as torchrun does.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store  # the only store that every group has

    rank, world = place(group)
    # Wait by the store: a collective would time out where one process has an hour more to do.
    members = tuple(dist.get_process_group_ranks(group))
    _calls[members] += 1
    store = dist.PrefixStore(f"meansparse_fx.gather/{members}/{_calls[members]}", _get_default_store())
    store.set(str(rank), "here")
    while not store.check([str(other) for other in range(world)]):
        time.sleep(0.2)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value, group=group)
    return found


@contextmanager
def peer_lost(kind: type[Exception]) -> Iterator[None]:
    """Raise ``kind`` in the place of what torch.distributed raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        lost = f"lost another process ({first_line(error)})"
        raise kind(f"{lost}. Checkpoints, if asked for, are kept: start again") from error
