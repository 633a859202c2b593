"""Ranks and the few collectives that training needs. All of it works without a process group too."""

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def init_process_group(device: torch.device) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL for GPUs, else gloo."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        # Ranks may wait while rank 0 runs k-means or downloads from the Hub.
        timeout=datetime.timedelta(minutes=60),
    )


def under_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            # Collectives want dense row-major storage, which channels_last_3d weights are not.
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, src=0)
            tensor.detach().copy_(dense)


def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, as a new tensor if there are several."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, as a new tensor."""
    return all_sum(tensor) / world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank."""
    if not dist.is_initialized():
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=device)).item())
