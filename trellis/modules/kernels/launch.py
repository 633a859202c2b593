"""What every kernel launch needs to know of the device."""

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Triton's own bound; before it, GPUs have no bfloat16 either.
LEAST_CAPABILITY = (8, 0)


@cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU, with the remedy, or None where they can."""
    if importlib.util.find_spec("triton") is None:  # torch brings it on Linux
        return "Triton is not installed; pip install triton"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than what Triton compiles for"
    # Triton builds its launcher when the first kernel runs.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler; install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(headers, "Python.h").exists():
        return f"Triton needs {headers}/Python.h; install Python's headers, on Debian python3-dev"
    return None


def kernels_run(x: Tensor) -> bool:
    """Whether x is on a GPU that the kernels can run on."""
    return x.is_cuda and obstacle(x.device) is None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's. Triton's interpreter takes CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 stand in for them in Triton's interpreter."""
    return _multiprocessors(device) if device.type == "cuda" else 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
