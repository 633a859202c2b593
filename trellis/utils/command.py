"""What programs do alike: choose a device, count cores, and turn errors into one line and an exit code.

Imports torch only when a device is chosen, since worker processes import a program's module again.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import signals
from .errors import ConfigError, UserError
from .processes import RankFailedError

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

    It is what the system has free, or what a container's limit or `ulimit -v` leaves if that is less.
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
    with contextlib.suppress(ImportError, OSError):  # not on Windows; only Linux has /proc
        import resource

        allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
        if allowed != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(max(0, allowed - taken))
    return min(found, default=None)


def check_output_folder(path: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """Return a folder that is to be written, as a path. It need not exist, and is not made.

    Raise ConfigError if it cannot be written or made, before time is spent on what it should get.
    """
    if not os.fspath(path):
        raise ConfigError(f"{flag} is empty; give a folder")
    folder = Path(path)
    nearest = next((each for each in (folder, *folder.absolute().parents) if os.path.lexists(each)), folder)
    if not os.path.isdir(nearest):
        raise ConfigError(f"{flag} {path}: {nearest} is not a folder. Give another {flag}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{flag} {path}: {nearest} cannot be written. Give another {flag}, or change its permissions."
        )
    return folder


def run_command(
    command: Callable[[Args], int | None], args: Args, interrupted: str = "interrupted", limit: float | None = None
) -> int:
    """Call a program's work with its arguments and return the exit code: the call's result, or 0 for None.

    UserError, OSError such as a full disk, and the end of a process become the line `error: …` on standard error and
    exit code 1. A signal becomes the line `interrupted`, and exit code 128 + its number, as shells have it. limit: as
    for `signals.handled`.
    Other exceptions are bugs and keep their traceback.
    """
    try:
        with signals.handled(limit):
            return command(args) or 0
    except KeyboardInterrupt as stopped:
        return report_interruption(stopped, interrupted)
    except OSError as error:
        print(f"error: {error_of_system(error)}", file=sys.stderr)
    except (UserError, RankFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
    except UnicodeEncodeError as error:
        print(f"error: a name is not UTF-8 text ({error.reason}): rename it, or set PYTHONUTF8=1", file=sys.stderr)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        print(
            "error: this user may start no more threads (ulimit -u): end other programs, or take fewer workers",
            file=sys.stderr,
        )
    return 1


def error_of_system(error: OSError, about: object = None) -> str:
    """Return an error of the system for people, such as "outputs/a.json: No space left on device".

    about: what it is about if the system does not say a file.
    """
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "standard output was closed by what reads it"
    if error.strerror is None:
        return str(error)
    named = isinstance(error.filename, (str, bytes, os.PathLike))  # it may be the number of an open file too
    name = os.fsdecode(error.filename) if named else about
    return error.strerror if name is None else f"{name}: {error.strerror}"


def report_interruption(stopped: KeyboardInterrupt, message: str) -> int:
    """Print a message about a signal that ended a program, and return the exit code."""
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
        print(message, file=sys.stderr)
    return 128 + (stopped.signum if isinstance(stopped, signals.Stopped) else signal.SIGINT)
