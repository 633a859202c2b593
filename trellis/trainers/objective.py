"""The loss as one module over everything that is trained, so that one DDP reduces all gradients together."""

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# A codebook's statistics are reduced over ranks where they arise; DDP must not overwrite them with rank 0's.
# torch 2.13 renamed the argument.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFER_SYNC = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


class Objective(nn.Module):
    """Calls `training_losses` with the entries of a batch."""

    def __init__(self, trained: dict[str, nn.Module], training_losses: Callable):
        super().__init__()
        self.models = nn.ModuleDict(trained)
        self.training_losses = training_losses

    def forward(self, batch: dict[str, Tensor]):
        return self.training_losses(**batch)


def objective(trained: dict[str, nn.Module], training_losses: Callable, device: torch.device) -> nn.Module:
    """The objective, under DDP where there are several ranks and gradients to reduce."""
    module = Objective(trained, training_losses)
    if not dist.is_initialized() or not any(True for _ in module.parameters()):
        return module
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **_WITHOUT_BUFFER_SYNC)
