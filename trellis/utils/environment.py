"""What a run was made with, and what it asks of the operating system."""

import contextlib
import ctypes
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy
import torch

from .. import __version__


@cache
def versions() -> dict[str, str | None]:
    """Versions of this package, Python, torch, numpy and CUDA, and the git commit of the source ("+" where
    files differ from it; None outside a checkout)."""
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


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the process's next allocation.

    glibc maps every large block anew and unmaps it when it is freed, so each step of training on a CPU would fault
    in all its activations page by page. The process then holds its peak until it ends. Does nothing where the C
    library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def tuned_convolutions(tuned: bool) -> Iterator[None]:
    """Inside, cuDNN times a few of its algorithms for each new shape and takes the quickest; with `tuned` false, and
    outside, it takes the one that it expects to be quick."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = tuned, 3
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before
