"""Occupancy and label arrays without a scan: NumPy's .npy and .npz, and binvox.

binvox: https://www.patrickmin.com/binvox/binvox.html.
"""

import re
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ...utils.errors import DataError
from .volume import DEFLATE_RATIO, as_labels, check_size, reasons, times

ARRAY_SUFFIXES = (".npy", ".npz", ".binvox")
LONGEST_HEADER = 1 << 16  # bytes
BINVOX = re.compile(rb"#binvox ([12])\s*\n(.*?\n)?\s*data[ \t\r]*\n", re.DOTALL)


def read_occupancy(path: Path) -> np.ndarray:
    """Read an array of occupied and empty voxels, bool [X, Y, Z] of any size.

    It may be bool, or 0 and one other number. A .npz file must hold one array of three axes.
    Raise DataError with the reason, which does not name the file; for an array of several labels it names the flag
    that reads it as a label map.
    """
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes)")
    labels = as_labels(read_array(path))
    occupied = labels != 0
    values = labels[occupied]
    if not len(values):
        raise DataError("has no occupied voxel")
    if (values != values[0]).any():
        other = values[values != values[0]][0]
        raise DataError(
            f"has the values {values[0]} and {other} beside 0: it is a map of labels, not of occupancy. Give --labels"
        )
    return occupied


def turn_mask_to_z_up(mask: np.ndarray) -> np.ndarray:
    """Turn a mask [X, Y, Z] from y-up to z-up: x y z becomes x -z y, as `placing.turn_to_z_up`."""
    return mask.transpose(0, 2, 1)[:, ::-1]


def read_array(path: Path) -> np.ndarray:
    """Read the array [X, Y, Z] of a .npy, .npz or .binvox file. Raise DataError with the reason."""
    suffix = path.suffix.lower()
    with reasons():
        if suffix == ".binvox":
            array = _read_binvox(path)
        elif suffix == ".npy":
            with open(path, "rb") as file:
                array = _read_npy(file, path.stat().st_size)
        else:
            array = _read_npz(path)
    while array.ndim > 3 and 1 in (array.shape[0], array.shape[-1]):  # channels or batches of one
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 3:
        raise DataError(f"has the shape {times(array.shape)}, not that of a volume, X x Y x Z")
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type that the header of a .npy file states (NEP 1)."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read an array; header and numbers have at most `size` bytes."""
    shape, dtype = _header(file)
    if dtype.hasobject:
        raise DataError("holds Python objects, which are not read. Save an array of numbers")
    check_size(shape or (1,), dtype.itemsize, size - file.tell())
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_npz(path: Path) -> np.ndarray:
    """Read the one array of three axes in a .npz file."""
    with zipfile.ZipFile(path) as archive:
        shapes = {}
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    shapes[member.filename] = _header(file)[0]
        if "bits.npy" in shapes and len(shapes["bits.npy"]) == 2:
            raise DataError(
                "is a packed file of grids: give it as --data_dir, or make a folder of it with pack.py --unpack"
            )
        volumes = [name for name, shape in shapes.items() if len(shape) >= 3]
        if len(volumes) != 1:
            listed = ", ".join(f"{name.removesuffix('.npy')} ({times(shape)})" for name, shape in shapes.items())
            raise DataError(
                f"holds {len(volumes)} arrays of three axes: {listed or 'none'}. Save one array X x Y x Z in a file"
            )
        member = archive.getinfo(volumes[0])
        with archive.open(member) as file:
            return _read_npy(file, min(member.file_size, member.compress_size * DEFLATE_RATIO + LONGEST_HEADER))


def _read_binvox(path: Path) -> np.ndarray:
    """Read a binvox file, [X, Y, Z] uint8. Its runs go along y first, then z, then x."""
    content = path.read_bytes()
    found = BINVOX.match(content[:LONGEST_HEADER])
    if not found:
        raise DataError("is not a binvox file: it does not begin with #binvox 1 or 2 and a header that ends in data")
    shape = re.search(rb"^[ \t]*dim[ \t]+(\d{1,9})[ \t]+(\d{1,9})[ \t]+(\d{1,9})\s*$", found[2] or b"", re.MULTILINE)
    if not shape:
        raise DataError("its header has no line dim with three numbers")
    depth, height, width = map(int, shape.groups())  # along x, z, y
    runs = np.frombuffer(content, np.uint8, offset=found.end())
    values, counts = runs[0::2], runs[1::2]
    total = int(counts.sum(dtype=np.int64))
    if len(runs) % 2 or total != depth * height * width:
        raise DataError(
            f"is truncated or damaged: its runs make {total} voxels, and {times((depth, width, height))} are "
            f"{depth * height * width}"
        )
    check_size((depth, height, width), 1, total)
    return np.repeat(values, counts).reshape(depth, height, width).transpose(0, 2, 1)
