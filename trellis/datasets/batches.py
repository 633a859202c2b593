"""Batches of one rank: loaded in the order of the sampler, and put onto the device.

A grid's way: `dataset.get_batch` reads files and packs bits, in a loading process if there are any; `to_device` moves
the bits, and `dataset.unpack_batch` makes grids of them there; `dataset.augment` turns grids for training.
"""

import atexit
import os
import traceback
from collections.abc import Callable, Generator, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..utils import dist_utils, signals
from ..utils.command import available_cores
from ..utils.errors import ConfigError, DataError, UserError
from .base import StandardDatasetBase
from .sampler import ResumableSampler

MOST_WORKERS = 8
# A larger number of loading processes a core is a mistake: each takes memory, and none would wait for the disk.
WORKERS_PER_CORE, WORKERS_ALLOWED = 4, 32
# Less of it cannot even hold the queues of loading processes, in bytes.
LEAST_SHM = 2**18
# What torch says in a loading process, or of one, if /dev/shm is full.
SHORT_OF_SHM = ("shared memory", "unable to write to file </torch", "unable to mmap", "unable to resize file </torch")


def check_num_workers(num_workers: int | None, where: str) -> None:
    """Raise ConfigError for more loading processes than this machine can run. where: what errors call the number."""
    cores = available_cores()
    most = max(WORKERS_ALLOWED, WORKERS_PER_CORE * cores)
    if num_workers is not None and num_workers > most:
        raise ConfigError(
            f"{where} is {num_workers}, but each is a process, and this machine has {cores} cores; use at most {most} "
            "or null, which chooses"
        )


def endless_batches(
    dataset: StandardDatasetBase,
    batch_size: int,
    *,
    seed: int,
    start: int,
    device: torch.device,
    num_workers: int | None,
    prefetch: bool,
    needs_items: Callable[[], bool] = lambda: True,
    prepare: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]] = lambda batch, indices: batch,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield this rank's batches without end: stacked items on the device, and `sample_ids` [B] int64 on the CPU.

    seed: decides the order of samples and their augmentation.
    start: samples that all ranks together have seen.
    num_workers, prefetch: see `load_batches`.
    needs_items: called before each batch. After it has returned False, batches are `sample_ids` alone, in the same
        order, and nothing is loaded any more.
    prepare: called with each batch and the indices of its items in the dataset, [B] int64 on the CPU; returns what is
        yielded.
    Raise DataError for an item that cannot be read.
    """
    world = dist_utils.world_size()
    sampler = ResumableSampler(
        len(dataset),
        batch_size,
        rank=dist_utils.rank(),
        world_size=world,
        seed=seed,
        start=start,
        shares=dataset.shares,
    )
    loaded = load_batches(
        dataset,
        (indices for _, indices in sampler),
        device,
        num_workers=num_workers,
        prefetch=prefetch,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
    )
    loading = True
    for sample_ids, indices in sampler:
        batch = {"sample_ids": torch.from_numpy(sample_ids)}
        loading = loading and needs_items()
        if loading:
            batch = dataset.augment({**to_device(dataset, next(loaded), device), **batch}, seed)
        else:
            loaded.close()  # ends the loading processes
        yield prepare(batch, torch.from_numpy(indices))


def load_batches(
    dataset: StandardDatasetBase,
    batches: Iterable[np.ndarray],
    device: torch.device,
    *,
    num_workers: int | None = None,
    prefetch: bool = True,
    processes: int = 1,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield `dataset.get_batch(indices)` for each of the batches' indices, in order, pinned for a GPU.

    num_workers: loading processes; None chooses by the device and the cores, which `processes` programs share.
    prefetch: let loading processes work several batches ahead.
    Raise DataError for an item that cannot be read, ConfigError if loading processes run out of shared memory.
    """
    if num_workers is None:
        # On a CPU the model itself needs every core; rows in memory only have to be put together.
        workers_pay = device.type == "cuda" and not dataset.in_memory
        num_workers = min(MOST_WORKERS, available_cores() // processes) if workers_pay else 0
    free = _free_shm()
    if num_workers and free is not None and free < LEAST_SHM:
        raise _short_of_shm(num_workers)
    loader = DataLoader(
        _Batches(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]  # torch's types know lists of indices only
        num_workers=num_workers,
        collate_fn=_collated,  # type: ignore[arg-type]  # gets what __getitems__ returns, no list
        pin_memory=device.type == "cuda",
        prefetch_factor=(4 if prefetch else 1) if num_workers else None,
        worker_init_fn=_ignore_signals,
    )
    # Loading processes ignore the signal by which Python ends them when a program ends, and would then be waited for
    # without end. They end with the iterator, so nothing may hold it any longer: no generator that somebody keeps, no
    # error of it as the context of ours, no frame of that error.
    opened = [iter(loader)]
    atexit.register(opened.clear)
    failure: UserError
    try:
        while True:
            try:
                batch = next(opened[0])
            except StopIteration:
                return
            yield batch
    except DataError as error:
        # A loading process wraps the message in its traceback; the message is what the user needs.
        failure = DataError(str(error).rsplit("DataError: ", 1)[-1].strip())
        traceback.clear_frames(error.__traceback__)
    except RuntimeError as error:
        if not any(text in str(error) for text in SHORT_OF_SHM):
            raise
        failure = _short_of_shm(num_workers)
        traceback.clear_frames(error.__traceback__)
    finally:
        atexit.unregister(opened.clear)
        opened.clear()
    raise failure


def _short_of_shm(num_workers: int) -> ConfigError:
    free = _free_shm()
    return ConfigError(
        f"{num_workers} loading processes (trainer.args.num_workers) do not get enough shared memory: /dev/shm has "
        f"{0 if free is None else free / 2**20:.0f} MiB free. Set trainer.args.num_workers to 0, which needs none, or "
        "give the container more (docker run --shm-size=8g)"
    )


def _free_shm() -> int | None:
    """Return how many bytes are free in /dev/shm, None if the system has none."""
    try:
        size = os.statvfs("/dev/shm")
    except OSError:
        return None
    return size.f_bavail * size.f_frsize


class _Batches(Dataset):
    """A dataset that is asked for whole batches."""

    def __init__(self, dataset: StandardDatasetBase):
        self.dataset = dataset

    def __getitems__(self, indices: np.ndarray) -> dict[str, Tensor]:  # torch's name for reading a whole batch
        return self.dataset.get_batch(indices)


def _collated(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a batch into shared memory, in a loading process.

    The queue would do it too, but in a thread whose error torch prints and forgets: training would wait forever.
    """
    if get_worker_info() is not None:
        for value in batch.values():
            value.share_memory_()
    return batch


def _ignore_signals(worker: int) -> None:
    """Ignore what asks a run to stop, and reaches loading processes too: training finishes its step and needs them."""
    signals.ignore()


def to_device(dataset: StandardDatasetBase, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch of `dataset.get_batch` as stacked items on the device. Does not wait for the device."""
    return dataset.unpack_batch({name: value.to(device, non_blocking=True) for name, value in batch.items()})
