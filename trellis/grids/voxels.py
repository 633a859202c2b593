"""Occupancy grids as indices of voxels, as PLY points at voxel centers (TRELLIS's files), and as packed bits.

The grid divides the cube [-0.5, 0.5)^3 into R^3 voxels. Voxel (i, j, k) covers x in [i/R - 0.5, (i+1)/R - 0.5),
likewise y and z.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from plyfile import PlyData, PlyElement, PlyListProperty, PlyParseError

from ..utils.errors import DataError
from ..utils.files import atomic_write
from ..utils.inputs import require_file

if TYPE_CHECKING:  # torch is imported only to make a tensor: the workers of voxelize.py need none
    from torch import Tensor

CENTER_TOLERANCE = 1e-3  # voxels; float32 rounding is 1e-5 of a voxel at 256^3
HEADER_LIMIT = 1 << 16  # bytes; a voxel file's header has about 120
ELEMENT = re.compile(rb"[\r\n]\s*element\s+\S+\s+(\S+)")
FACES = re.compile(rb"[\r\n]\s*element\s+(?:face|tristrips)\s+(\d+)")
VERTEX = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4")])


def read_ply(path: str | os.PathLike) -> np.ndarray:
    """Read the points of an ASCII or binary PLY file; ignore other elements and properties.

    Return [N, 3] float64, N >= 1, as stored: neither range nor finiteness is checked here.
    Raise DataError naming the file if it is missing, empty, truncated or not such a PLY.
    """
    path = Path(path)
    require_file(path, DataError, "rerun voxelize.py")
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
    """Return whether a PLY file is a mesh: its header declares faces. Otherwise it holds points.

    A file whose header does not end counts as a mesh, since only a mesh's reader has a word for every damaged file.
    Raise DataError if the file cannot be read.
    """
    require_file(path, DataError, "give a file of voxels or a mesh")
    try:
        with open(path, "rb") as file:
            header, end, _ = file.read(HEADER_LIMIT).partition(b"end_header")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return not end or any(int(count) > 0 for count in FACES.findall(header))


def _check_counts(head: bytes, size: int) -> None:
    """Raise ValueError if the header at the start of `head` promises more rows than the file has bytes.

    plyfile checks this only when it maps memory; for ASCII and for lists it allocates by the count alone.
    """
    header, end, _ = head.partition(b"end_header")
    if not end:
        raise ValueError(f"no end_header in the first {len(head)} of {size} bytes")
    for count in ELEMENT.findall(header):
        if not 0 <= int(count) <= size:
            raise ValueError(f"{int(count)} rows of an element in a file of {size} bytes")


def write_ply(path: str | os.PathLike, points: np.ndarray) -> None:
    """Write points as binary little-endian float32 x y z, atomically.

    points: [N, 3] float, N >= 1; see `voxel_centers`.
    """
    vertices = np.ascontiguousarray(points, dtype="<f4").view(VERTEX).squeeze(1)
    with atomic_write(path) as partial:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(partial)


def voxel_centers(voxels: np.ndarray, resolution: int) -> np.ndarray:
    """Return the centers of voxels [N, 3] int in [0, R), as [N, 3] float32."""
    return ((np.asarray(voxels, dtype=np.float64) + 0.5) / resolution - 0.5).astype(np.float32)


def points_to_voxels(points: np.ndarray, resolution: int, name: str = "points") -> np.ndarray:
    """Return the voxels whose centers are given, [N, 3] int64 in [0, R), in the order of the points.

    points: [N, 3] float, x y z, each in [-0.5, 0.5) and within 1e-3 of a voxel of a voxel center.
    name: what errors call the points, such as their file.
    Raise DataError naming the first point outside the cube, not finite, or off its voxel's center; if the points are
    the centers of another usual resolution, the error says which.
    """
    points = np.asarray(points, dtype=np.float64)
    inside = ((points >= -0.5) & (points < 0.5)).all(axis=1)  # false for NaN too
    if not inside.all():
        first = int(np.argmin(inside))
        raise DataError(
            f"{name}: point {first} is {_coordinates(points[first])}; each coordinate must lie "
            "in [-0.5, 0.5). Delete the file and rerun voxelize.py."
        )
    centered = _on_centers(points, resolution)
    if not centered.all():
        first = int(np.argmin(centered))
        fitting = [r for r in (16, 32, 64, 128, 256) if _on_centers(points, r).all()]
        remedy = "rerun voxelize.py"
        if fitting:
            remedy = f"the points fit resolution {fitting[0]}, so set that"
        raise DataError(
            f"{name}: point {first} is {_coordinates(points[first])}, not the center of a voxel "
            f"at resolution {resolution}: {remedy}."
        )
    return np.floor((points + 0.5) * resolution).astype(np.int64)


def _on_centers(points: np.ndarray, resolution: int) -> np.ndarray:
    """Return [N] bool: whether all three coordinates are within CENTER_TOLERANCE of a voxel center."""
    offset = (points + 0.5) * resolution - 0.5
    near = np.abs(offset - np.rint(offset)) <= CENTER_TOLERANCE
    return np.all(near, axis=1)


def _coordinates(point: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.7g}" for value in point) + ")"


def voxels_to_grid(voxels: np.ndarray, resolution: int) -> np.ndarray:
    """Return the grid [R, R, R] uint8 that is 1 at the voxels, [N, 3] int in [0, R), and 0 elsewhere.

    A voxel may be given more than once.
    """
    grid = np.zeros((resolution,) * 3, dtype=np.uint8)
    grid[tuple(voxels.T)] = 1
    return grid


def points_to_occupancy(points: np.ndarray, resolution: int, name: str = "points") -> "Tensor":
    """Mark the voxels whose centers are given, [1, R, R, R] uint8, 0 or 1, axes x y z. See `points_to_voxels`."""
    import torch

    return torch.from_numpy(voxels_to_grid(points_to_voxels(points, resolution, name), resolution))[None]


def occupancy_to_points(grid: "np.ndarray | Tensor") -> np.ndarray:
    """Return the centers of the occupied voxels, [N, 3] float32 in C order of the grid [R, R, R]."""
    grid = np.asarray(grid)
    return voxel_centers(np.argwhere(grid), grid.shape[0])


def pack_bits(grids: "np.ndarray | Tensor") -> np.ndarray:
    """Pack grids [N, R, R, R], occupied where not zero, into [N, ceil(R^3 / 8)] uint8.

    Eight voxels make a byte, the first in its highest bit (numpy's default), in C order of the axes x, y, z. Zeros
    fill up the last byte of an odd R.
    """
    grids = np.asarray(grids)
    if grids.ndim != 4 or len(set(grids.shape[1:])) != 1:
        raise ValueError(f"grids must be [N, R, R, R], not {list(grids.shape)}")
    return np.packbits(grids.reshape(len(grids), -1) != 0, axis=1)


def count_voxels(bits: np.ndarray) -> int:
    """Return the number of occupied voxels of a grid as bits, [ceil(R^3 / 8)] uint8."""
    if hasattr(np, "bitwise_count") and len(bits) % 8 == 0:  # numpy 2
        return int(np.bitwise_count(bits.view(np.uint64)).sum(dtype=np.int64))
    return int.from_bytes(bits.tobytes()).bit_count()


def unpack_bits(rows: np.ndarray, resolution: int) -> "Tensor":
    """Undo `pack_bits`: rows [N, ceil(R^3 / 8)] uint8 to [N, R, R, R] uint8, 0 or 1.

    Raise ValueError if the rows have another length.
    """
    import torch

    size = packed_size(resolution)
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != size:
        raise ValueError(
            f"rows must be uint8 [N, {size}] at resolution {resolution}, not {rows.dtype} {list(rows.shape)}"
        )
    bits = np.unpackbits(rows, axis=1, count=resolution**3)
    return torch.from_numpy(bits.reshape(-1, resolution, resolution, resolution))


def unpack_bits_on_device(bits: "Tensor", resolution: int) -> "Tensor":
    """Undo `pack_bits` by tensor operations, on the device of the rows and without waiting for it.

    bits: [B, ceil(R^3 / 8)] uint8.
    Return [B, 1, R, R, R] uint8, 0 or 1. Raise ValueError if the rows have another length.
    """
    import torch

    size = packed_size(resolution)
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != size:
        raise ValueError(
            f"bits must be uint8 [B, {size}] at resolution {resolution}, not {bits.dtype} {list(bits.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    unpacked = (bits[:, :, None] >> shifts) & 1  # [B, bytes, 8]
    return unpacked.flatten(1)[:, : resolution**3].reshape(-1, 1, resolution, resolution, resolution)


def packed_size(resolution: int) -> int:
    """Return the bytes of a packed grid, ceil(R^3 / 8)."""
    return -(-(resolution**3) // 8)
