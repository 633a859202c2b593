"""Ranks and the few collectives that training needs. All of it works without a process group too."""

import datetime
import hashlib
import socket
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def init_process_group(device: torch.device, store: dist.Store, rank: int, world: int) -> None:
    """Join the process group of the ranks that share a store: NCCL for GPUs, else gloo."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        # The last resort behind `watch`: ranks may wait while rank 0 runs k-means or downloads from the Hub.
        timeout=datetime.timedelta(hours=2),
        device_id=device if cuda else None,
    )


def agree(facts: dict[str, str], error: type[Exception] = ConfigError) -> None:
    """Raise an error on every rank if the facts of any rank differ from rank 0's. facts: {what: a short text}."""
    if not dist.is_initialized():
        return
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, {"": socket.gethostname(), **facts})
    first = gathered[0]
    for number, other in enumerate(gathered):
        differing = [name for name in facts if other.get(name) != first.get(name)]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            details = "; ".join(f"{name} ({other.get(name)}, not {first.get(name)})" for name in differing[:3])
            raise error(
                f"rank {number} on {other['']} differs from rank 0 on {first['']} in {details}{more}; start all ranks "
                "with the same command, code and files"
            )


def digest(tensor: Tensor) -> str:
    """Return text that differs for other values, to the bit."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(values.data).hexdigest()[:12]


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
