"""The order in which samples are seen: a function of the seed and of how many were seen before."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..utils.random_utils import permutation

# Samples of a period of a mixture: enough that it looks random, few enough to keep its pattern.
SHORTEST_PERIOD, LONGEST_PERIOD = 1024, 65536


class Samples(NamedTuple):
    """The samples of one batch."""

    sample_ids: np.ndarray  # [B] int64, running numbers since training began
    indices: np.ndarray  # [B] int64, their items in the dataset


class Share(NamedTuple):
    """A part of the items, and how many of the samples are of it."""

    size: int  # items, which follow those of the part before
    weight: float  # > 0; relative to those of the other parts


class Order:
    """The items that samples are of, epoch after epoch.

    size: items of the dataset.
    shares: parts of the items to draw from by their weights, each epoch after epoch of its own; None: all items alike.
    """

    def __init__(self, size: int, seed: int, shares: Sequence[Share] | None = None):
        self.size, self.seed = size, seed
        self._mixture = None if shares is None else _Mixture([share.weight for share in shares], seed)
        sizes = [size] if shares is None else [share.size for share in shares]
        self._parts = [_Epochs(own, seed, () if shares is None else (part,)) for part, own in enumerate(sizes)]
        self._firsts = np.cumsum([0, *sizes])
        if self._firsts[-1] != size:
            raise ValueError(f"shares of {int(self._firsts[-1])} items, but the dataset has {size}")

    def items(self, first: int, count: int) -> np.ndarray:
        """Return the items [count] int64 of samples `first` and up."""
        if self._mixture is None:
            return self._parts[0].items(first, count)
        parts, numbers = self._mixture.samples(first, count)
        items = np.empty(count, np.int64)
        for part in np.unique(parts).tolist():
            chosen = parts == part
            own = numbers[chosen]  # consecutive, as those of a part follow one another
            items[chosen] = self._firsts[part] + self._parts[part].items(int(own[0]), len(own))
        return items


class _Epochs:
    """Items in a new order in each epoch. size: their number. part: makes the orders those of a part."""

    def __init__(self, size: int, seed: int, part: tuple[int, ...]):
        self.size, self.seed, self.part = size, seed, part
        self._epoch, self._order = -1, np.empty(0, np.int64)  # the last one asked for

    def items(self, first: int, count: int) -> np.ndarray:
        runs, filled = [], 0  # one run per epoch: a batch may hold the end of one, or several whole ones
        while filled < count:
            epoch, position = divmod(first + filled, self.size)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.size, "order", self.seed, *self.part, epoch)
            runs.append(self._order[position : position + count - filled])
            filled += len(runs[-1])
        return np.concatenate(runs)


class _Mixture:
    """Which part each sample is of. In each period every part has the same number of samples, in an order fixed by the
    seed and the period: so a sample's part, and its number among the part's samples, follow from its own number.

    The period is a multiple of the least in which all shares are whole, or LONGEST_PERIOD if that is longer.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.counts = np.array(shares_of_period(weights))
        self._pattern = np.repeat(np.arange(len(self.counts)), self.counts)
        self._period, self._parts, self._numbers = -1, self._pattern, self._pattern

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of samples `first` and up, and their numbers among the samples of their parts, [count]."""
        length = len(self._pattern)
        parts, numbers, filled = [], [], 0
        while filled < count:
            period, position = divmod(first + filled, length)
            if period != self._period:
                self._period, self._parts = period, self._pattern[permutation(length, "mixture", self.seed, period)]
                # The sort gives the places of the first part in their order, then those of the second, and so on.
                within = np.arange(length) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
                self._numbers = np.empty(length, np.int64)
                self._numbers[np.argsort(self._parts, kind="stable")] = within + np.repeat(
                    period * self.counts, self.counts
                )
            parts.append(self._parts[position : position + count - filled])
            numbers.append(self._numbers[position : position + count - filled])
            filled += len(parts[-1])
        return np.concatenate(parts), np.concatenate(numbers)


def shares_of_period(weights: Sequence[float]) -> list[int]:
    """Return how many samples of a period are of each part. weights: > 0.

    Exactly in the ratio of the weights as they are written in decimals, if a period of LONGEST_PERIOD samples can be;
    else rounded to whole samples of it, by largest remainders. A part may then have none.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    whole = [weight * lcm(*(each.denominator for each in exact)) for weight in exact]
    least = [int(weight / Fraction(gcd(*map(int, whole)))) for weight in whole]
    total = sum(least)
    if total <= LONGEST_PERIOD:
        return [count * max(1, SHORTEST_PERIOD // total) for count in least]
    wanted = [Fraction(count * LONGEST_PERIOD, total) for count in least]
    counts = [int(share) for share in wanted]
    remainders = sorted(range(len(counts)), key=lambda part: (counts[part] - wanted[part], part))
    for part in remainders[: LONGEST_PERIOD - sum(counts)]:
        counts[part] += 1
    return counts


class ResumableSampler(Sampler[Samples]):
    """Endless batches of one rank.

    Sample ids count all samples of all ranks since training began. Epoch after epoch, sample n is element n mod size
    of a permutation fixed by (seed, epoch). Each global batch is split into equal runs, one per rank, so the ranks
    together see what a single process with the same global batch would see. With shares, the same goes for each part.

    size, shares: see `Order`.
    batch_size: samples of this rank per batch.
    start: samples seen already by all ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        start: int,
        shares: Sequence[Share] | None = None,
    ):
        self.batch_size, self.rank, self.world_size, self.start = batch_size, rank, world_size, start
        self.size, self.seed, self.shares = size, seed, shares

    def __iter__(self) -> Iterator[Samples]:
        order = Order(self.size, self.seed, self.shares)
        first = self.start + self.rank * self.batch_size
        while True:
            sample_ids = np.arange(first, first + self.batch_size)
            yield Samples(sample_ids, order.items(first, self.batch_size))
            first += self.batch_size * self.world_size
