"""Files that come from outside: is it a file that can be read to its end, and does its content fit into memory?"""

import os
import stat
from pathlib import Path

from . import units
from .command import available_memory
from .errors import UserError

KINDS = (  # of what is no regular file
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def obstacle(path: str | os.PathLike) -> str | None:
    """Return why a path is no file that could be opened, None if it is one. Reading a pipe or device may never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if path.is_symlink():
            return "is a link to what is not there"
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no file")
    return f"is {kind} and not a file"


def require_file(path: str | os.PathLike, error: type[UserError], remedy: str, largest: int | None = None) -> None:
    """Raise `error` unless a path is a regular file, or a link to one. Call it before `open`, which may wait forever.

    remedy: what to give instead; the message's end.
    largest: bytes that the file may have.
    """
    reason = obstacle(path)
    if reason is not None:
        raise error(f"{path}: {reason}; {remedy}")
    if largest is not None and (size := os.stat(path).st_size) > largest:
        raise error(f"{path}: has {units.size(size)}, and at most {units.size(largest)} are read; {remedy}")


def require_memory(needed: int, what: str, error: type[UserError], remedy: str) -> None:
    """Raise `error` if so many bytes are more than this machine has free.

    what: what takes them; the message's start.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise error(f"{what} {units.size(needed)} of memory, and {units.size(free)} are free; {remedy}")
