"""Files that are either whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new path beside `path`; when the block ends without an error, sync that file and rename it.

    A reader therefore sees the old file or the whole new one, also after a crash. The name is hidden and
    carries the process id, so that several processes may write the same file; the last one wins.
    After an error the file is removed and `path` is untouched.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
