"""Sums that find a flipped bit in the files of a checkpoint.

A sum is the CRC-32 of all bytes of a file. It finds every change within 32 neighboring bits, and any other with a
probability of 1 - 2^-32, which is enough against faulty disks and memory. At 2 GB, zlib's CRC-32 takes 0.3 s on one
core, SHA-256 1 s. torch does not compare the CRC-32 of the zip archives that it reads.

The misc file lists the sums of the other files of its set, and has its own in the comment of its zip archive (a seal).
"""

import errno
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..utils.errors import CheckpointError

_CHUNK = 2**22
_SEAL = b"crc32:%08x"
_SEAL_SIZE = len(_SEAL % 0)
_LENGTH = 2  # bytes at the end of a zip archive that hold the length of its comment


class SumWriter:
    """A file for torch.save that sums what is written to it.

    torch writes to it in pieces and in order, and lets other threads run meanwhile; to a file that it opens itself it
    writes without letting go of the interpreter.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sum, self.size = file, 0, 0
        self.error: OSError | None = None  # the first one; torch hides it behind errors of its own

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sum = zlib.crc32(data, self.sum)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_summed(content: Any, path: Path, sealed: bool = False) -> int:
    """Write a file by torch.save, sync it, read it back and return its sum, of what was to be written.

    sealed: append the sum to the file. It is then the sum of all before the seal.
    Raise OSError if it cannot be written, CheckpointError if other bytes are read back.
    """
    with open(path, "wb") as file:
        writer = SumWriter(file)
        try:
            torch.save(content, writer)  # type: ignore[arg-type]  # write and flush are all that it calls
        except Exception:
            if writer.error is not None:
                raise writer.error from None
            raise
        if sealed:
            file.seek(-_LENGTH, os.SEEK_END)
            file.write(_SEAL_SIZE.to_bytes(_LENGTH, "little") + _SEAL % writer.sum)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # read from the disk or the file server, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not seal_holds(path) if sealed else (path.stat().st_size, file_sum(path)) != (writer.size, writer.sum):
        raise CheckpointError(f"{path.parent}: a file reads back other than it was written; check the disk and memory")
    return writer.sum


def file_sum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    with open(path, "rb") as file:
        return _sum(file.read, path.stat().st_size)


def _sum(read: Callable[[int], bytes], size: int, start: int = 0) -> int:
    """Return the CRC-32 of the next `size` bytes, after bytes with the sum `start`."""
    while size > 0 and (data := read(min(_CHUNK, size))):
        start = zlib.crc32(data, start)
        size -= len(data)
    return start


def seal_holds(path: Path) -> bool | None:
    """Return whether a file is as it was when `save_summed` sealed it; None if it has no seal."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < _SEAL_SIZE + _LENGTH:
            return None
        file.seek(size - _SEAL_SIZE - _LENGTH)
        length, seal = file.read(_LENGTH), file.read()
        if not seal.startswith(_SEAL[: _SEAL.index(b"%")]):
            return None
        file.seek(0)
        # Summed before the seal was appended, when the comment still had length 0.
        found = zlib.crc32(bytes(_LENGTH), _sum(file.read, size - _SEAL_SIZE - _LENGTH))
    return length == _SEAL_SIZE.to_bytes(_LENGTH, "little") and seal == _SEAL % found


def zip_holds(path: Path) -> bool | None:
    """Return whether the members of a zip archive, as torch.save writes it, have the CRC-32 that is stored with them;
    None if the file is no zip archive."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the file's beginning
            return False
        raise
    except Exception:  # zipfile and zlib end in many ways over damaged archives
        return False
