"""Occupancy grids as files: PLY points at cell centres, as TRELLIS stores them, and packed bits.

The grid divides the cube [-0.5, 0.5)^3 into R^3 cells; cell (i, j, k) covers x in [i/R - 0.5, (i+1)/R - 0.5),
likewise y and z.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from plyfile import PlyData, PlyElement, PlyListProperty, PlyParseError

from ..utils.errors import DataError
from ..utils.files import written_aside

if TYPE_CHECKING:  # torch only where a tensor is made: voxelize.py's workers do without
    from torch import Tensor

CENTRE_TOLERANCE = 1e-3  # cells; float32 rounding is 1e-5 of a cell at 256^3
HEADER_LIMIT = 1 << 16  # bytes; a voxel file's header has about 120
ELEMENT = re.compile(rb"[\r\n]\s*element\s+\S+\s+(\S+)")
FACES = re.compile(rb"[\r\n]\s*element\s+(?:face|tristrips)\s+(\d+)")
VERTEX = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4")])


def read_ply(path: str | os.PathLike) -> np.ndarray:
    """Read the points of an ASCII or binary PLY file. Other elements and properties are ignored.

    Returns [N, 3] float64, N >= 1, as stored: neither range nor finiteness is checked here.
    Raises DataError naming the file where it is missing, empty, truncated or not such a PLY.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _check_counts(file.read(HEADER_LIMIT), os.fstat(file.fileno()).st_size)
            file.seek(0)
            ply = PlyData.read(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Rerun voxelize.py.") from error
    except (PlyParseError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{path}: is not a PLY file, or truncated or damaged ({error}). Delete it and rerun voxelize.py."
        ) from error
    scalars = {
        element.name: [prop.name for prop in element.properties if not isinstance(prop, PlyListProperty)]
        for element in ply
    }
    if not {"x", "y", "z"} <= set(scalars.get("vertex", ())):
        raise DataError(
            f"{path}: has the elements and properties {scalars}, but a voxel file has `vertex` "
            "with x, y, z. Delete it and rerun voxelize.py."
        )
    if not len(ply["vertex"]):
        raise DataError(f"{path}: has no points (element vertex 0). Delete it and rerun voxelize.py.")
    return np.stack([ply["vertex"][axis] for axis in "xyz"], axis=1).astype(np.float64)


def has_faces(path: str | os.PathLike) -> bool:
    """Whether the header of a PLY file says that it has faces: then it is a mesh, and else points.

    Raises DataError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_LIMIT).partition(b"end_header")[0]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return any(int(count) > 0 for count in FACES.findall(header))


def _check_counts(head: bytes, size: int) -> None:
    """Raise ValueError where the header at the start of `head` promises more rows than the file has bytes.

    plyfile checks this only where it maps memory; for ASCII and for lists it allocates by the count alone.
    """
    header, end, _ = head.partition(b"end_header")
    if not end:
        raise ValueError(f"no end_header in the first {len(head)} of {size} bytes")
    for count in ELEMENT.findall(header):
        if not 0 <= int(count) <= size:
            raise ValueError(f"{int(count)} rows of an element in a file of {size} bytes")


def write_ply(path: str | os.PathLike, points: np.ndarray) -> None:
    """Write points as binary little-endian float32 x y z, aside and renamed.

    points: [N, 3] float, N >= 1; see `cell_centres`.
    """
    vertices = np.ascontiguousarray(points, dtype="<f4").view(VERTEX).squeeze(1)
    with written_aside(path) as aside:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(aside)


def cell_centres(indices: np.ndarray, resolution: int) -> np.ndarray:
    """Return the centres of cells, [N, 3] float32, for indices [N, 3] int in [0, resolution)."""
    return ((np.asarray(indices, dtype=np.float64) + 0.5) / resolution - 0.5).astype(np.float32)


def points_to_occupancy(points: np.ndarray, resolution: int, name: str = "points") -> "Tensor":
    """Mark the cells whose centres are given. A cell may be given more than once.

    points: [N, 3] float, x y z, each in [-0.5, 0.5) and within 1e-3 of a cell of a cell centre.
    name: what the errors call the points, such as their file.
    Returns [1, R, R, R] uint8, 0 or 1, axes x y z.
    Raises DataError naming the first point outside the cube, not finite, or off its cell's centre; where the
    points are the centres of another usual resolution, the error says which.
    """
    import torch

    points = np.asarray(points, dtype=np.float64)
    inside = ((points >= -0.5) & (points < 0.5)).all(axis=1)  # false for NaN too
    if not inside.all():
        first = int(np.argmin(inside))
        raise DataError(
            f"{name}: point {first} is {_coordinates(points[first])}; each coordinate must lie "
            "in [-0.5, 0.5). Delete the file and rerun voxelize.py."
        )
    centred = _on_centres(points, resolution)
    if not centred.all():
        first = int(np.argmin(centred))
        fitting = [r for r in (16, 32, 64, 128, 256) if _on_centres(points, r).all()]
        remedy = "rerun voxelize.py"
        if fitting:
            remedy = f"the points fit resolution {fitting[0]}, so set that"
        raise DataError(
            f"{name}: point {first} is {_coordinates(points[first])}, not the centre of a cell "
            f"at resolution {resolution}: {remedy}."
        )
    cells = np.floor((points + 0.5) * resolution).astype(np.int64)
    grid = torch.zeros(1, resolution, resolution, resolution, dtype=torch.uint8)
    grid.view(-1)[torch.from_numpy(np.ravel_multi_index(tuple(cells.T), (resolution,) * 3))] = 1
    return grid


def _on_centres(points: np.ndarray, resolution: int) -> np.ndarray:
    """Return [N] bool: whether all three coordinates are within CENTRE_TOLERANCE of a cell centre."""
    offset = (points + 0.5) * resolution - 0.5
    return (np.abs(offset - np.rint(offset)) <= CENTRE_TOLERANCE).all(axis=1)


def _coordinates(point: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.7g}" for value in point) + ")"


def occupancy_to_points(grid: "np.ndarray | Tensor") -> np.ndarray:
    """Return the centres of the occupied cells, [N, 3] float32 in C order of the grid [R, R, R]."""
    grid = np.asarray(grid)
    return cell_centres(np.argwhere(grid), grid.shape[0])


def pack_bits(grids: "np.ndarray | Tensor") -> np.ndarray:
    """Pack grids [N, R, R, R], zero or not, into [N, R^3 / 8] uint8; R must be even. See `unpack_bits`."""
    grids = np.asarray(grids)
    if grids.ndim != 4 or len(set(grids.shape[1:])) != 1 or grids.shape[1] % 2:
        raise ValueError(f"grids must be [N, R, R, R] with an even R, not {list(grids.shape)}")
    return np.packbits(grids.reshape(len(grids), -1) != 0, axis=1)


def unpack_bits(rows: np.ndarray, resolution: int) -> "Tensor":
    """Unpack rows [N, R^3 / 8] uint8 into [N, R, R, R] uint8, 0 or 1.

    Eight cells make a byte, the first in its highest bit (numpy's default), in C order of the axes x, y, z.
    Raises ValueError where the rows have another length.
    """
    import torch

    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] * 8 != resolution**3:
        raise ValueError(
            f"rows must be uint8 [N, {resolution**3 // 8}] at resolution {resolution}, "
            f"not {rows.dtype} {list(rows.shape)}"
        )
    bits = np.unpackbits(rows, axis=1).reshape(-1, resolution, resolution, resolution)
    return torch.from_numpy(bits)


def unpack_bits_on_device(bits: "Tensor", resolution: int) -> "Tensor":
    """`unpack_bits` by tensor operations: on the device of the rows, and without waiting for it.

    bits: [B, ceil(R^3 / 8)] uint8; bits that fill up the last byte are dropped.
    Returns [B, 1, R, R, R] uint8, 0 or 1. Raises ValueError where the rows have another length.
    """
    import torch

    cells = resolution**3
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != -(-cells // 8):
        raise ValueError(
            f"bits must be uint8 [B, {-(-cells // 8)}] at resolution {resolution}, not {bits.dtype} {list(bits.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    unpacked = (bits[:, :, None] >> shifts) & 1  # [B, bytes, 8]
    return unpacked.flatten(1)[:, :cells].reshape(-1, 1, resolution, resolution, resolution)
