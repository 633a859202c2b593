"""What programs do alike: choose a device, count cores, and turn errors into one line and an exit code.

Imports torch only when a device is chosen, since worker processes import a program's module again.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
"""Choices of `--device`; auto takes a GPU if torch finds one."""

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroups 2 and 1

Args = TypeVar("Args")


def pick_device(name: str) -> "torch.device":
    """Return the device for one of DEVICES. Raise ConfigError for cuda without a GPU."""
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and found else "cpu")


def available_cores() -> int:
    """Return the number of cores that this process may use, or all of the machine's if the system does not say."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return how many bytes this process may still take, None if the system does not say.

    It is what the system has free, or a container's limit if that is less.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        found = []
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTAINER_LIMITS:
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found, default=None)


def run_command(command: Callable[[Args], int | None], args: Args, interrupted: str = "interrupted") -> int:
    """Call a program's work with its arguments and return the exit code: the call's result, or 0 for None.

    UserError, and OSError such as a full disk, become the line `error: …` on standard error and exit code 1.
    KeyboardInterrupt becomes the line `interrupted` and exit code 130, which shells use for SIGINT.
    Other exceptions are bugs and keep their traceback.
    """
    try:
        return command(args) or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
