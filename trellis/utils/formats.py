"""Versions of the file formats that users keep.

A version is a whole number. It rises when an older reader would misread what is written now. A reader takes every
version up to its own; a file without a version is version 1.
"""

from pathlib import Path
from typing import Any

from .. import __version__
from .errors import UserError


def check_version(found: Any, newest: int, path: str | Path, error: type[UserError]) -> None:
    """Raise `error` if a file's format version is newer than `newest`, or is not a version."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise error(
            f"{path}: its format version is {found!r:.80}, but must be a whole number of at least 1; the file is "
            "damaged"
        )
    if found > newest:
        raise error(
            f"{path}: its format version is {found}, but trellis-vqvae {__version__} reads versions up to {newest}; "
            "install a newer trellis-vqvae"
        )
