"""Floor 1: a data set's indices, divided among processes. Imports torch only."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler


class ShardSampler(Sampler[int]):
    """The indices rank, rank + world, rank + 2 world, ... below a length.

    The shards of all ranks together are every index once, of uneven lengths where it does not divide:
    torch's DistributedSampler repeats images to make them even, which a measurement would count twice.

    Example:
        >>> [list(ShardSampler(5, rank, 2)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.indices = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
