"""Files and folders that are either whole or absent."""

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DataError

LEFTOVER = re.compile(r"\..*\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Let an OSError of the block name a file: a full disk says in `write` that it is full, not where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path beside `path`; sync and rename it when the block ends.

    A reader sees the old file or the whole new one, also after a crash. The temporary name is hidden and carries the
    machine, the process id and a random number, so that several processes and threads may write the same file; the
    last one wins. After an error in the block the temporary file is removed and `path` is untouched. The file may be
    read and written by whom the umask allows, whatever the library that writes it thinks (safetensors: its owner).
    An OSError names `path`.
    """
    path = Path(path)
    partial = _beside(path)
    try:
        # A new file has the mode by umask. os.umask cannot be asked without a change, which other threads would see.
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        partial.unlink()
        yield partial
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        with open(partial, "r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        if error.errno is not None and error.filename in (None, partial, str(partial)):  # a name that nobody knows
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # pyarrow has words of its own
        raise
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`, which gets that name if the block ends well, and goes if it does not.

    What killed processes of this machine have left of the same folder goes first. Raise DataError if `path` exists by
    the end. An OSError names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name[:100]}.*.tmp"):
        if _is_left(left):
            shutil.rmtree(left)
    partial = _beside(path)
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            raise DataError(f"{path}: another program has made it meanwhile. Give another name.")
        partial.rename(path)
    except OSError as error:
        # A name that nobody knows, or none, as `write` raises if the disk is full.
        if error.errno is not None and str(partial) in str(error.filename or partial):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a temporary name beside a path, see LEFTOVER."""
    return path.with_name(f".{path.name[:100]}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _is_left(path: Path, ended: Collection[tuple[str, int]] = ()) -> bool:
    """Return whether a path is the temporary one of a process that has ended. ended: as for `remove_leftovers`."""
    found = LEFTOVER.fullmatch(path.name)
    if not found:
        return False
    host, pid = found["host"], int(found["pid"])
    return (host, pid) in ended or (host == host_name() and not is_running(pid))


def _remove(partial: Path) -> None:
    """Remove a temporary file after an error, which counts more than that this may fail too (a read-only disk)."""
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last through a loss of power. Windows and some network drives cannot be asked to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows, or a folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, ended: Collection[tuple[str, int]] = ()) -> None:
    """Remove the temporary files of `atomic_write` that killed processes of this machine have left in a folder.

    ended: also those of processes of other machines, by host name and number, which have ended.
    """
    for path in folder.glob(".*.tmp"):
        if _is_left(path, ended):
            path.unlink(missing_ok=True)


def host_name() -> str:
    """Return the name of this machine as part of a file name: letters, digits and hyphens."""
    return re.sub("[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "-"


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs. On Windows, where it cannot be asked harmlessly, return True."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:  # a process that has ended, but whose parent has not asked for its exit code, can still be signaled
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # macOS has no /proc
        return True
