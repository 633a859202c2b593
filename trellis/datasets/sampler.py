"""The order in which samples are seen: a function of the seed and of how many were seen before."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..utils.random_utils import permutation


class Samples(NamedTuple):
    """The samples of one batch."""

    sample_ids: np.ndarray  # [B] int64, running numbers since training began
    indices: np.ndarray  # [B] int64, their items in the dataset


class Order:
    """The items that samples are of, epoch after epoch. size: items of the dataset."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)  # the last one asked for

    def items(self, first: int, count: int) -> np.ndarray:
        """Return the items [count] int64 of samples `first` and up."""
        runs, filled = [], 0  # one run per epoch: a batch may hold the end of one, or several whole ones
        while filled < count:
            epoch, position = divmod(first + filled, self.size)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.size, "order", self.seed, epoch)
            runs.append(self._order[position : position + count - filled])
            filled += len(runs[-1])
        return np.concatenate(runs)


class ResumableSampler(Sampler[Samples]):
    """Endless batches of one rank.

    Sample ids count all samples of all ranks since training began. Epoch after epoch, sample n is element n mod size
    of a permutation fixed by (seed, epoch). Each global batch is split into equal runs, one per rank, so the ranks
    together see what a single process with the same global batch would see.

    size: items of the dataset.
    batch_size: samples of this rank per batch.
    start: samples seen already by all ranks.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int, world_size: int, seed: int, start: int):
        self.batch_size, self.rank, self.world_size, self.start = batch_size, rank, world_size, start
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[Samples]:
        order = Order(self.size, self.seed)
        first = self.start + self.rank * self.batch_size
        while True:
            sample_ids = np.arange(first, first + self.batch_size)
            yield Samples(sample_ids, order.items(first, self.batch_size))
            first += self.batch_size * self.world_size
