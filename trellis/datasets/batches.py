"""The batches of one rank, on its device."""

import os
import signal
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..utils import dist_utils
from ..utils.errors import DataError
from .base import StandardDatasetBase
from .sampler import Numbered, ResumableSampler, Samples


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches loading processes too; training finishes its step and needs them until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


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
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's batches without end: stacked items on the device, and `sample_ids` [B] int64 on the CPU.

    seed: of the samples' order and of their augmentation. start: samples that all ranks together have seen.
    num_workers: loading processes; None chooses. prefetch: whether they work several batches ahead.
    needs_items: asked before each batch; from the first no on, batches are `sample_ids` alone, in the same
    order, and nothing is loaded. prepare: makes what is yielded of a batch and of the places of its items in the
    dataset, [B] int64 on the CPU. Raises DataError for an item that cannot be read.
    """
    world = dist_utils.world_size()

    def sampler() -> ResumableSampler:
        return ResumableSampler(
            len(dataset), batch_size, rank=dist_utils.rank(), world_size=world, seed=seed, start=start
        )

    if needs_items():
        for batch in _loaded(dataset, sampler(), device, num_workers, prefetch):
            start += batch_size * world
            batch = dataset.augment(batch, seed)
            yield prepare(batch, batch.pop("indices"))
            if not needs_items():
                break
    for sample_ids, indices in sampler():
        yield prepare({"sample_ids": torch.from_numpy(sample_ids)}, torch.from_numpy(indices))


def _loaded(
    dataset: StandardDatasetBase,
    sampler: ResumableSampler,
    device: torch.device,
    num_workers: int | None,
    prefetch: bool,
) -> Iterator[dict[str, Tensor]]:
    if num_workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist_utils.world_size()))
        # On a CPU the model itself needs every core; rows in memory only have to be put together.
        processes_pay = device.type == "cuda" and not dataset.in_memory
        num_workers = min(8, (os.cpu_count() or 1) // local) if processes_pay else 0
    loader = DataLoader(
        Numbered(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        prefetch_factor=(4 if prefetch else 1) if num_workers else None,
        worker_init_fn=_ignore_interrupt,
    )
    loaded = iter(loader)
    while True:
        try:
            batch = next(loaded)
        except DataError as error:
            # A loading process wraps the message in its traceback; the message is what the user needs.
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
        yield to_device(dataset, batch, device)


def to_device(dataset: StandardDatasetBase, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch of `dataset.get_batch` as stacked items on the device; `sample_ids` and `indices` stay on the CPU."""
    moved = {
        name: value if name in Samples._fields else value.to(device, non_blocking=True) for name, value in batch.items()
    }
    return dataset.unpack_batch(moved)
