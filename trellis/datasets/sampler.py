"""The order in which samples are seen, as a function of the seed and of how many were seen."""

from collections.abc import Iterator

from torch.utils.data import Dataset, Sampler

from ..utils.random_utils import permutation


class ResumableSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of one rank: lists of (sample id, dataset index).

    Sample ids count all samples of all ranks since training began; epoch after epoch, sample n is element
    n mod size of a permutation fixed by (seed, epoch). Each global batch is split into equal runs, one a
    rank, so the ranks together see what a single process with the same global batch would see.

    size: items of the dataset. batch_size: samples of this rank per batch. start: samples seen already.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int, world_size: int, seed: int, start: int):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        first = self.start + self.rank * self.batch_size
        while True:
            batch = []
            for sample_id in range(first, first + self.batch_size):
                if sample_id // self.size != epoch:
                    epoch = sample_id // self.size
                    order = permutation(self.size, "order", self.seed, epoch)
                batch.append((sample_id, int(order[sample_id % self.size])))
            yield batch
            first += self.batch_size * self.world_size


class Numbered(Dataset):
    """A dataset indexed by (sample id, index); items get the id as `sample_ids`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> dict:
        sample_id, index = key
        return {**self.dataset[index], "sample_ids": sample_id}
