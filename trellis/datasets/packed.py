"""Packed files: the grids of many objects as bits in one .npz file.

`bits` uint8 [N, R^3 / 8] (see grids.voxels.unpack_bits) and optional [N] text arrays `name`, `source`, `sha256`
(default: of the row's bytes), `split`, `up_axis` and `normalization`.
"""

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..utils.errors import DataError

TEXT_ARRAYS = ("name", "source", "sha256", "split", "up_axis", "normalization")


def load_packed(path: Path) -> dict[str, np.ndarray]:
    """Load `bits` uint8 [N, R^3 / 8], `sha256` [N], and those of the other TEXT_ARRAYS that a file has.

    Nothing is unpickled. Raises DataError where the file is missing, damaged or without `bits`, where an
    array has another type or length, and where a grid is empty.
    """
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            arrays = {key: file[key] for key in ("bits", *TEXT_ARRAYS) if key in getattr(file, "files", ())}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is not a readable .npz file ({error}). Make it anew by pack.py.") from error
    if "bits" not in arrays:
        raise DataError(f"{path}: has no array `bits`. pack.py writes packed files.")
    bits = arrays["bits"]
    if bits.dtype != np.uint8 or bits.ndim != 2 or not bits.size:
        raise DataError(
            f"{path}: bits is {bits.dtype} {list(bits.shape)}; it must be uint8 [N, R^3 / 8], "
            "N >= 1. pack.py writes packed files."
        )
    for key in arrays.keys() - {"bits"}:
        if arrays[key].dtype.kind != "U" or arrays[key].shape != (len(bits),):
            raise DataError(
                f"{path}: {key} is {arrays[key].dtype} {list(arrays[key].shape)}; "
                f"it must be text [{len(bits)}], one for each row of bits"
            )
    empty = ~bits.any(axis=1)
    if empty.any():
        raise DataError(
            f"{path}: row {int(np.argmax(empty))} of bits has no occupied cell "
            f"({int(empty.sum())} such rows in all). Remove them."
        )
    if "sha256" not in arrays:
        arrays["sha256"] = np.array([hashlib.sha256(row).hexdigest() for row in bits])
    return arrays


def packed_resolution(bits: np.ndarray) -> int | None:
    """Return the R of rows [N, R^3 / 8], None where no R fits."""
    resolution = round((bits.shape[1] * 8) ** (1 / 3))
    return resolution if resolution**3 == bits.shape[1] * 8 else None


def check_resolution(path: Path, bits: np.ndarray, resolution: int) -> None:
    found = packed_resolution(bits)
    if found != resolution:
        what = f"hold grids of resolution {found}" if found else "are no cube"
        raise DataError(
            f"{path}: rows of {bits.shape[1]} bytes {what}, but resolution is {resolution}. "
            "Set the config's resolution or choose another file."
        )
