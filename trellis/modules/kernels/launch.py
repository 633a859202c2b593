"""What every kernel launch needs to know of the device."""

import contextlib
import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is installed. CUDA builds of torch bring it, but for Windows."""
    return importlib.util.find_spec("triton") is not None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's. Triton's interpreter takes CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 stand in for them in Triton's interpreter."""
    return _multiprocessors(device) if device.type == "cuda" else 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
