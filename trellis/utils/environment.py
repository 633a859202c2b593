"""Versions that a run was made with, and settings of the C library and of cuDNN."""

import contextlib
import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy
import torch

from .. import __version__


@cache
def versions() -> dict[str, str | None]:
    """Return the versions of this package, Python, torch, numpy and CUDA, and the git commit of the source.

    The commit ends in "+" if files differ from it; it is None outside a checkout.
    """
    return {
        "trellis": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=False)

    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except FileNotFoundError:  # git is not installed
        return None
    return commit.stdout.strip() + ("+" if changed else "")


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the process's next allocation. Do nothing with another C library.

    By default glibc maps each large block and unmaps it when it is freed, so that every training step on a CPU faults
    in its activations page by page. With this the process holds its peak of memory until it ends.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has held, None on Windows, which does not say."""
    if (found := linux_memory("VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def linux_memory(name: str) -> int | None:
    """Return a value of Linux's /proc/self/status in bytes, such as VmRSS or VmHWM; None elsewhere.

    The system's other count of the peak (getrusage) starts with that of the process that has started this one.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")]
    return found[0] if found else None


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@contextlib.contextmanager
def tuned_convolutions(tuned: bool) -> Iterator[None]:
    """Let cuDNN time a few algorithms for each new shape and take the fastest.

    With `tuned` false, and outside the block, cuDNN takes the algorithm that it expects to be fast.
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = tuned, 3
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before
