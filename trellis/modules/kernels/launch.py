"""Facts about the device that every kernel launch needs."""

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Triton's own requirement. Older GPUs have no bfloat16 either.
LEAST_CAPABILITY = (8, 0)


@cache
def obstacle(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a GPU, with the remedy, or None if they can."""
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
    """Return whether x is on a GPU that can run the kernels."""
    return x.is_cuda and obstacle(x.device) is None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which Triton, which launches on the current device, launches on the device of x.

    Triton's interpreter takes CPU tensors, which need no context.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, or a stand-in of 2 for Triton's interpreter."""
    return _multiprocessors(device) if device.type == "cuda" else 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
