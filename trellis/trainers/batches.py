"""The batches of one rank, on its device."""

import os
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..datasets.components import StandardDatasetBase
from ..datasets.sampler import Numbered, ResumableSampler
from ..utils import dist_utils
from ..utils.errors import DataError


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches loading processes too; training finishes its step and needs them until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def endless_batches(
    dataset: StandardDatasetBase,
    batch_size: int,
    *,
    seed: int,
    start: int,
    device: torch.device,
    num_workers: int | None,
    prefetch: bool,
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's batches without end. `sample_ids` stay on the CPU, all else is on the device.

    start: samples that all ranks together have seen. num_workers: loading processes; None chooses. prefetch:
    whether they work several batches ahead. Raises DataError for an item that cannot be read.
    """
    if num_workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist_utils.world_size()))
        # On a CPU the model itself needs every core.
        num_workers = min(8, (os.cpu_count() or 1) // local) if device.type == "cuda" else 0
    sampler = ResumableSampler(
        len(dataset),
        batch_size,
        rank=dist_utils.rank(),
        world_size=dist_utils.world_size(),
        seed=seed,
        start=start,
    )
    loader = DataLoader(
        Numbered(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
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
        yield {
            name: value if name == "sample_ids" else value.to(device, non_blocking=True)
            for name, value in batch.items()
        }
