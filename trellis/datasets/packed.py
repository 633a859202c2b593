"""Packed files: the grids of many objects as bits in one .npz file. This is format 1.

dataset_toolkits/pack.py writes them; sparse_structure.py reads grids, and metadata.py single text arrays.

Arrays of a file with N grids of resolution R, an even number, so that R^3 divides by 8:

    bits           uint8 [N, R^3 / 8]: the grids, see grids.voxels.pack_bits
    sha256         text [N], optional: names of the objects; default: sha256 of each row of bits
    name           text [N], optional: mesh file
    source         text [N], optional: collection that an object comes from
    kind           text [N], optional: what an object is, such as "anatomy", for scores by kind
    split          text [N], optional: "train" or "val"
    up_axis        text [N], optional: how mesh files were turned, see grids.placing
    normalization  text [N], optional: how meshes were scaled, see grids.placing
    mm_per_cell    text [N], optional: edge of a voxel in mm, of objects of scans
    fill           text [N], optional: "solid" if the inside is occupied too; blank: "surface"
    frame          text [N], optional: where an object's grid lies in its scan, JSON, see grids.volumes.Frame
    format         integer, optional: the format; default: 1

A blank text says that the object has none. Other arrays are ignored. Every program reads its own format and all older
ones; it refuses a newer one, which it could misread.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import DataError
from ..utils.files import atomic_write
from ..utils.formats import check_version
from ..utils.inputs import require_file, require_memory

FORMAT_VERSION = 1
TEXT_ARRAYS = ("name", "source", "kind", "sha256", "split", "up_axis", "normalization", "fill", "mm_per_cell", "frame")


def load_packed(path: Path) -> dict[str, np.ndarray]:
    """Load `bits`, `sha256` and the other TEXT_ARRAYS that a file has.

    Raise DataError if the file is missing, damaged, of a newer format or without `bits`, if an array has another type
    or length, or if a grid is empty.
    """
    arrays = _read(path, ("bits", *TEXT_ARRAYS))
    if "bits" not in arrays:
        raise DataError(f"{path}: has no array `bits`. pack.py writes packed files.")
    _check(path, arrays)
    if "sha256" not in arrays:
        arrays["sha256"] = np.array([hashlib.sha256(row).hexdigest() for row in arrays["bits"]])
    return arrays


def load_text(path: Path, name: str) -> list[str] | None:
    """Load one of TEXT_ARRAYS without the grids, None if the file lacks it. Raise DataError as `load_packed`."""
    arrays = _read(path, (name,))
    return arrays[name].tolist() if name in arrays else None


def save_packed(path: Path, bits: np.ndarray, texts: Mapping[str, np.ndarray]) -> None:
    """Write a packed file, compressed and atomically.

    bits: [N, R^3 / 8] uint8.
    texts: some of TEXT_ARRAYS, [N] text each.
    Raise DataError for what `load_packed` would refuse.
    """
    arrays: dict[str, Any] = {"bits": bits, **texts}
    _check(path, arrays)
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, format=np.array(FORMAT_VERSION), **arrays)


def _read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the arrays of these names that a file has. Unpickle nothing."""
    require_file(path, DataError, "pack.py writes packed files")
    try:
        with open(path, "rb") as stream:
            if stream.peek(1)[:2] not in (b"PK", b"\x93N"):  # numpy takes everything else for pickled objects
                raise ValueError("it is no zip archive")
            file = np.load(stream, allow_pickle=False)
            present = getattr(file, "files", ())  # a single array has none
            if len(set(present)) < len(present):
                raise ValueError("it has two arrays of one name")
            wanted = [name for name in names if name in present]
            if present:
                sizes = [file.zip.getinfo(f"{name}.npy").file_size for name in wanted]
                require_memory(sum(sizes), f"{path}: takes", DataError, "pack fewer grids into a file")
            if "format" in present:
                check_version(_array(file, "format").tolist(), FORMAT_VERSION, path, DataError)
            return {name: _array(file, name) for name in wanted}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # numpy, zipfile and what decompresses raise many types for one damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: is not a readable .npz file ({reason:.200}). Make it anew by pack.py.") from error


def _array(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """Return an array of an open file. Raise ValueError for what is none; numpy gives its bytes."""
    array = file[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
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
            f"{path}: row {int(np.argmax(empty))} of bits has no occupied voxel "
            f"({int(empty.sum())} such rows in all). Remove them."
        )


def packed_resolution(bits: np.ndarray) -> int | None:
    """Return the R of rows [N, R^3 / 8], None if no R fits."""
    resolution = round((bits.shape[1] * 8) ** (1 / 3))
    return resolution if resolution**3 == bits.shape[1] * 8 else None


def check_resolution(path: Path, bits: np.ndarray, resolution: int) -> None:
    """Raise DataError if rows [N, R^3 / 8] have another resolution."""
    found = packed_resolution(bits)
    if found != resolution:
        what = f"hold grids of resolution {found}" if found else "are not a cube"
        raise other_resolution(path, f"rows of {bits.shape[1]} bytes {what}", resolution)


def other_resolution(path: Path | str, found: str, resolution: int) -> DataError:
    """Return the error for a file of grids of another resolution. found: what it has."""
    return DataError(
        f"{path}: {found}, but resolution is {resolution}. "
        "Ask for that (dataset.args.resolution of a configuration, --resolution of a program), or give other data."
    )
