"""What a mesh file holds, as its reader in `readers/` gives it to `meshes.load_mesh`."""

from typing import Literal, NamedTuple

import numpy as np

from ..utils.errors import DataError

Up = Literal["y", "z"]


class Geometry(NamedTuple):
    """All triangles of a file, with the transforms of its scene applied, in the file's units and axes.

    vertices: [V, 3] float64; float32 where the file stores single precision and nothing was applied to it, so that
        `load_mesh` can see how fine its coordinates are.
    faces: [F, 3] int64, indices of vertices; F is 0 for a cloud of points.
    up: the axis that the file itself, or the specification of its format, says is up. None if neither does.
    notes: what a user should know of this file, each a sentence without a full stop, such as "shown in the pose of its
        node weights"; nothing that holds for every file of the format.
    usual_up: the axis that is up in most files of the format, for files that do not say it themselves.
    """

    vertices: np.ndarray
    faces: np.ndarray
    up: Up | None = None
    notes: tuple[str, ...] = ()
    usual_up: Up | None = None


FLAT = 1e-12  # twice the area of a triangle that rounding makes of a line, in a mesh of edge 1
COARSEST = 1 / 64  # of the longest edge: coordinates with larger steps lose voxels of a grid


def check_precision(vertices: np.ndarray) -> None:
    """Raise DataError if the precision of the coordinates is too coarse for a mesh far from the origin.

    vertices: [V, 3] float32 or float64, V >= 1, finite, used by triangles or points.
    """
    extent = float((vertices.max(axis=0).astype(np.float64) - vertices.min(axis=0)).max())
    farthest = np.abs(vertices).max()
    step = float(np.spacing(farthest))
    if extent > 0 and step > COARSEST * extent:
        precision = "single" if vertices.dtype == np.float32 else "double"
        raise DataError(
            f"its coordinates are too coarse: {precision} precision has steps of {step:g} at {farthest:g}, but the "
            f"object is {extent:g} long. Move it to the origin where it is made, and export it again"
        )


def note_on_precision(vertices: np.ndarray) -> tuple[str, ...]:
    """Return a note if coordinates that were written in full look as if single precision had made them too coarse.

    vertices: [V, 3] float64, V >= 1, finite.
    """
    extent, farthest = float(np.ptp(vertices, axis=0).max()), float(np.abs(vertices).max())
    if not 0 < farthest < float(np.finfo(np.float32).max):
        return ()
    step = float(np.spacing(np.float32(farthest)))
    if step <= COARSEST * extent or not (vertices == vertices.astype(np.float32)).all():
        return ()
    return (
        f"all its coordinates are numbers of single precision, which has steps of {step:g} at {farthest:g}, and the "
        f"object is {extent:g} long: its shape may be rounded",
    )


def check_triangles(vertices: np.ndarray, faces: np.ndarray) -> None:
    """Raise DataError if no triangle has an area: all are points or lines.

    vertices: [V, 3] float64, finite.
    faces: [F, 3] int, F >= 1, indices of vertices.
    """
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    edge = (high - low).max()
    if not 0 < edge < np.inf:
        raise DataError(f"its longest edge is {edge:g}: nothing to scale to 1")
    corners = ((vertices - low) / edge)[faces]
    doubled = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    if np.abs(doubled).max() < FLAT:
        raise DataError(f"its {len(faces)} triangles have no area: each is a line or a point")
