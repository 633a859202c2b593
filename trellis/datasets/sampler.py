"""The order in which samples are seen, as a function of the seed and of how many were seen."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..utils.random_utils import permutation
from .base import StandardDatasetBase


class Samples(NamedTuple):
    """The samples of one batch."""

    sample_ids: np.ndarray  # [B] int64, running numbers since training began
    indices: np.ndarray  # [B] int64, which items of the dataset they are


class ResumableSampler(Sampler[Samples]):
    """Endless batches of one rank.

    Sample ids count all samples of all ranks since training began; epoch after epoch, sample n is element
    n mod size of a permutation fixed by (seed, epoch). Each global batch is split into equal runs, one a
    rank, so the ranks together see what a single process with the same global batch would see.

    size: items of the dataset. batch_size: samples of this rank per batch. start: samples seen already.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int, world_size: int, seed: int, start: int):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[Samples]:
        epoch, order = -1, np.empty(0, np.int64)
        first = self.start + self.rank * self.batch_size
        while True:
            sample_ids = np.arange(first, first + self.batch_size)
            runs, filled = [], 0  # one run an epoch: a batch may hold the end of one, or several whole ones
            while filled < self.batch_size:
                here, place = divmod(first + filled, self.size)
                if here != epoch:
                    epoch, order = here, permutation(self.size, "order", self.seed, here)
                runs.append(order[place : place + self.batch_size - filled])
                filled += len(runs[-1])
            yield Samples(sample_ids, np.concatenate(runs))
            first += self.batch_size * self.world_size


class Numbered(Dataset):
    """Batches of a dataset by their `Samples`: its `get_batch` with these as `sample_ids` and `indices`."""

    def __init__(self, dataset: StandardDatasetBase):
        self.dataset = dataset

    def __getitems__(self, samples: Samples) -> dict[str, Tensor]:  # torch's name for what takes a whole batch
        ids = {name: torch.from_numpy(array) for name, array in samples._asdict().items()}
        return {**self.dataset.get_batch(samples.indices), **ids}
