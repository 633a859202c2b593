"""Members of zip archives, which 3MF files are too: sizes bounded, damage and encryption as one clear error."""

import errno
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...utils.errors import DataError

MAX_BYTES = 2**30  # unpacked; far beyond what is voxelized


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive. Raise DataError if it is none, or damaged; also for what the caller reads from it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"is not a zip archive, or damaged or cut off ({error})") from error
    except NotImplementedError as error:
        raise DataError(f"has a member in a compression that is not read ({error}): unpack it") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DataError("is a damaged zip archive: its directory leads out of the file") from error


def check_members(members: list[zipfile.ZipInfo]) -> None:
    """Raise DataError if one of the members is encrypted, or if they are too large together."""
    if encrypted := next((member for member in members if member.flag_bits & 1), None):
        raise DataError(f'"{encrypted.filename[:100]}" in it is encrypted: unpack it')
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES:
        raise DataError(f"has {total:,} bytes when unpacked, more than {MAX_BYTES:,}: unpack it")
