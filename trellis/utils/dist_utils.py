"""Ranks and the few collectives that training needs. Everything works without a process group too."""

import datetime
import os
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
    """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL for GPUs, else gloo."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        # A rank may wait while rank 0 runs k-means or a Hub download is under way.
        timeout=datetime.timedelta(minutes=60),
    )


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_(tensors) -> None:
    """Overwrite each tensor with rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            # Collectives want dense row-major storage, which channels_last_3d weights are not.
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, src=0)
            tensor.detach().copy_(dense)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, as a new tensor."""
    return all_sum(tensor) / world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if not dist.is_initialized():
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=device)).item())
