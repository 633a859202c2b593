"""The order of samples and their noise follow from seed and position alone."""

import itertools
import multiprocessing
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import ROOT, wait_for
from torch.utils.data import Dataset

from trellis.datasets.batches import endless_batches, load_batches
from trellis.datasets.sampler import Order, ResumableSampler, Share, shares_of_period
from trellis.utils.errors import DataError
from trellis.utils.random_utils import derive_seed, permutation, sample_noise

SIZE = 7


def take(
    batches: int, batch_size: int, *, rank=0, world_size=1, seed=3, start=0, size=SIZE, shares=None
) -> list[list[tuple]]:
    """Batches as lists of (sample id, index)."""
    sampler = ResumableSampler(
        size, batch_size, rank=rank, world_size=world_size, seed=seed, start=start, shares=shares
    )
    arrays = list(itertools.islice(sampler, batches))
    assert all(array.dtype == np.int64 and array.shape == (batch_size,) for pair in arrays for array in pair)
    return [list(zip(ids.tolist(), indices.tolist(), strict=True)) for ids, indices in arrays]


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_ranks_together_are_one_process(world_size, batch_size):
    """12 a step over a data set of 7, so that a step holds parts of several epochs."""
    ranks = [take(9, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == take(9, 12)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_goes_on_where_it_was(world_size):
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        whole = take(20, 3, **place)
        for done in (1, 2, 5, 13):
            assert take(20 - done, 3, **place, start=done * 3 * world_size) == whole[done:]


def test_a_resumed_run_may_have_other_ranks_and_another_batch():
    before = list(itertools.chain(*take(5, 4)))
    after = [list(itertools.chain(*take(5, 5, rank=rank, world_size=2, start=20))) for rank in range(2)]
    assert sorted(before + after[0] + after[1]) == sorted(itertools.chain(*take(70, 1)))


@pytest.mark.parametrize("size, batch_size", [(7, 1), (7, 3), (7, 7), (7, 20), (1, 4), (64, 16)])
def test_every_epoch_is_another_permutation_of_all_items(size, batch_size):
    flat = list(itertools.chain(*take(-(-5 * size // batch_size), batch_size, size=size)))[: 5 * size]
    assert [sample_id for sample_id, _ in flat] == list(range(5 * size))
    epochs = np.array([index for _, index in flat]).reshape(5, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
    if size > 1:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


def test_seeds_give_unrelated_orders_and_the_same_one_repeats():
    orders = {tuple(permutation(50, "order", seed, epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    assert take(5, 4, seed=9) == take(5, 4, seed=9) != take(5, 4, seed=10)


def test_the_first_item_is_uniform_over_epochs():
    first = np.bincount([permutation(5, "order", 0, epoch)[0] for epoch in range(5000)], minlength=5)
    assert ((first - 1000) ** 2 / 1000).sum() < 30  # chi-square of 4 degrees: 1e-5 of seeds would fail


# --- shares of parts ---

PARTS = [Share(3, 0.7), Share(1000, 0.2), Share(50, 0.1)]


def mixed(count: int, *, first=0, seed=3, parts=PARTS) -> np.ndarray:
    return Order(sum(part.size for part in parts), seed, parts).items(first, count)


def numbers_of(items: np.ndarray, parts=PARTS) -> list[np.ndarray]:
    """The items of each part, in the order of the samples, counted within the part."""
    firsts = np.cumsum([0, *(part.size for part in parts)])
    places = np.searchsorted(firsts, items, side="right") - 1
    return [items[places == part] - firsts[part] for part in range(len(parts))]


def test_samples_are_drawn_in_exact_shares_and_each_part_goes_through_its_own_epochs():
    period = sum(shares_of_period([part.weight for part in PARTS]))
    assert 512 <= period <= 1024 and period % 10 == 0
    items = mixed(20 * period)
    for start in range(0, len(items), period):
        counts = [len(found) for found in numbers_of(items[start : start + period])]
        assert counts == [period * 7 // 10, period * 2 // 10, period // 10]
    for found, part in zip(numbers_of(items), PARTS, strict=True):
        epochs = found[: len(found) // part.size * part.size].reshape(-1, part.size)
        assert len(epochs) > 2 and (np.sort(epochs, axis=1) == np.arange(part.size)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == (6 if part.size == 3 else len(epochs))
    first, second = (numbers_of(items[start : start + period])[1] for start in (0, period))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (4, 3)])
@pytest.mark.parametrize("start", [0, 12, 1020, 10_008])
def test_shares_are_the_same_on_any_ranks_and_after_a_resume(world_size, batch_size, start):
    ranks = [
        take(9, batch_size, rank=rank, world_size=world_size, start=start, size=1053, shares=PARTS)
        for rank in range(world_size)
    ]
    together = [pair for parts in zip(*ranks, strict=True) for pair in itertools.chain(*parts)]
    assert together == list(zip(range(start, start + 108), mixed(start + 108)[start:].tolist(), strict=True))


def test_the_pattern_of_parts_looks_random_and_follows_from_the_seed():
    parts = [Share(10_000, 1), Share(10_000, 1)]
    chosen = mixed(40_000, parts=parts) >= 10_000
    same = (chosen[1:] == chosen[:-1]).mean()
    assert abs(same - 0.5) < 0.01  # four standard deviations
    assert not np.array_equal(mixed(1000), mixed(1000, seed=4)) and np.array_equal(mixed(1000), mixed(1000))


@pytest.mark.parametrize(
    "weights, shares",
    [
        ([1, 2], [Fraction(1, 3), Fraction(2, 3)]),
        ([0.1, 0.2, 0.3], [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)]),
        ([1e-3, 0.999], [Fraction(1, 1000), Fraction(999, 1000)]),
        ([5], [Fraction(1)]),
    ],
)
def test_a_period_has_the_shares_as_they_are_written(weights, shares):
    counts = shares_of_period(weights)
    assert [Fraction(count, sum(counts)) for count in counts] == shares and sum(counts) <= 65536


@pytest.mark.parametrize("weights", [[np.pi, 1], [1e-9, 1], [1e-300, 1e300], [1 / 3, 1 / 3, 1 / 3 + 1e-12]])
def test_shares_that_need_a_long_period_are_rounded_to_one_of_its_samples(weights):
    counts = shares_of_period(weights)
    assert sum(counts) == 65536
    assert all(abs(count - 65536 * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))


def take_batches(number: int, data: Dataset, **options) -> list[dict]:
    place = {"seed": 3, "start": 8, "device": torch.device("cpu"), "num_workers": None, "prefetch": True}
    batches = endless_batches(data, 4, **{**place, **options})
    return list(itertools.islice(batches, number))


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_items_arrive_in_order_with_their_number(workers):
    got = take_batches(6, _Squares(), num_workers=workers)
    for batch, want in zip(got, take(6, 4, start=8), strict=True):
        assert batch.keys() == {"square", "form", "sample_ids"}
        assert batch["sample_ids"].tolist() == [sample_id for sample_id, _ in want]
        assert batch["form"].tolist() == [[3, sample_id] for sample_id, _ in want]
        assert batch["square"].tolist() == [index**2 for _, index in want]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loaded", [0, 1, 3])
def test_the_order_goes_on_where_items_are_no_longer_needed(workers, loaded):
    """Batches that a loading process has made ahead must not be skipped or repeated."""
    asked = itertools.count()
    data = _Squares()
    got = take_batches(
        8,
        data,
        num_workers=workers,
        needs_items=lambda: next(asked) < loaded,
        prepare=lambda batch, indices: {**batch, "indices": indices},
    )
    pairs = [list(zip(batch["sample_ids"].tolist(), batch["indices"].tolist(), strict=True)) for batch in got]
    assert pairs == take(8, 4, start=8)
    assert ["square" in batch for batch in got] == [True] * loaded + [False] * (8 - loaded)
    if workers == 0:
        assert data.loads == loaded


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_cannot_be_read_is_its_own_message(workers):
    """Not the traceback that a loading process wraps it in; the batches before it arrive."""
    loaded = load_batches(_Damaged(), np.arange(4)[:, None], torch.device("cpu"), num_workers=workers)
    assert [next(loaded)["square"].item() for _ in range(2)] == [0, 1]
    with pytest.raises(DataError) as error:
        next(loaded)
    assert str(error.value) == "2.ply: is damaged. Rerun voxelize.py."
    # Who holds the error does not hold the loading processes, which Python would wait for without end.
    assert wait_for(lambda: not multiprocessing.active_children())


def test_a_program_ends_that_still_holds_its_loader():
    program = """
import sys, numpy as np, torch
sys.path[:0] = sys.argv[1:]
from test_sampler import _Squares
from trellis.datasets.batches import load_batches
loaded = load_batches(_Squares(), np.arange(8)[:, None], torch.device("cpu"), num_workers=2)
print(next(loaded)["square"].item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, ROOT, ROOT / "tests"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


class _Squares(Dataset):
    in_memory = True
    shares = None

    def __init__(self):
        self.loads = 0

    def __len__(self):
        return SIZE

    def get_batch(self, indices):
        self.loads += 1
        return {"square": torch.from_numpy(indices**2)}

    def unpack_batch(self, batch):
        return batch

    def augment(self, batch, seed):
        ids = batch["sample_ids"]
        return {**batch, "form": torch.stack([torch.full_like(ids, seed), ids], 1)}


class _Damaged(_Squares):
    def get_batch(self, indices):
        if 2 in indices:
            raise DataError("2.ply: is damaged. Rerun voxelize.py.")
        return super().get_batch(indices)


# --- noise ---


def test_noise_belongs_to_the_sample_and_not_to_its_batch():
    ids = torch.tensor([5, 0, 2**40, 5])
    noise = sample_noise(ids, (4, 3, 3, 3), seed=1, device=torch.device("cpu"))
    assert noise.shape == (4, 4, 3, 3, 3) and noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[3])
    for row, sample_id in enumerate(ids):
        assert torch.equal(noise[row], sample_noise(sample_id[None], (4, 3, 3, 3), 1, torch.device("cpu"))[0])
    assert not torch.equal(noise, sample_noise(ids, (4, 3, 3, 3), 2, torch.device("cpu")))


def test_noise_leaves_the_global_generator_alone_and_is_not_moved_by_it():
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    first = sample_noise(torch.arange(3), (2,), 0, torch.device("cpu"))
    assert torch.equal(torch.randn(3), want)
    assert torch.equal(first, sample_noise(torch.arange(3), (2,), 0, torch.device("cpu")))


def test_noise_is_standard_normal_and_independent_between_samples():
    noise = sample_noise(torch.arange(4000), (16,), 0, torch.device("cpu")).double()
    assert abs(noise.mean()) < 5 / 64000**0.5 and abs(noise.var() - 1) < 5 * (2 / 64000) ** 0.5
    neighbors = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbors) < 5 / 64000**0.5


def test_seeds_do_not_depend_on_the_process_and_keep_parts_apart():
    code = "from trellis.utils.random_utils import derive_seed; print(derive_seed('noise', 3, 14))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert int(other.stdout) == derive_seed("noise", 3, 14)
    seeds = {derive_seed(*parts) for parts in (("a", 1, 23), ("a", 12, 3), ("a", 123), ("b", 1, 23), ("a1", 23))}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
