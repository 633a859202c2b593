"""Cells of VTK's data sets, as its legacy and XML files have them, to triangles."""

from typing import NamedTuple

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from .polygons import triangulate
from .strips import split_strips


class Cells(NamedTuple):
    """Cells of one kind: the points [C] int64 of all, one cell after the other, and the number [N] int64 of each."""

    corners: np.ndarray
    sizes: np.ndarray


NO_CELLS = Cells(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def surface(points: np.ndarray, polygons: Cells, strips: Cells, has_lines: object) -> Geometry:
    """Return the triangles of polygons and strips. Raise DataError if there are none, but lines, or a wrong index."""
    if points.dtype.kind != "f":
        points = points.astype(np.float64)
    for cells in (polygons, strips):
        if len(cells.corners) and (cells.corners.min() < 0 or cells.corners.max() >= len(points)):
            raise DataError(f"its cells use points {cells.corners.min()} to {cells.corners.max()} of {len(points)}")
    faces = np.concatenate([triangulate(points, *polygons), split_strips(*strips)])
    if not len(faces) and has_lines:
        raise DataError("has no triangles, only lines")
    return Geometry(points, faces)


def cells_of_offsets(offsets: np.ndarray, corners: np.ndarray) -> Cells:
    """Return cells from where each ends among the corners, [N] int64. Raise DataError if these do not fit."""
    sizes = np.diff(offsets, prepend=0)
    if (sizes < 0).any() or (offsets[-1] if len(offsets) else 0) != len(corners):
        raise DataError(
            f"the offsets of its cells do not go up to their {len(corners)} points: the file is damaged or cut off"
        )
    return Cells(corners, sizes)
