"""What a mesh file holds, as its reader in `readers/` gives it to `meshes.load_mesh`."""

from typing import Literal, NamedTuple

import numpy as np

Up = Literal["y", "z"]


class Geometry(NamedTuple):
    """All triangles of a file, with the transforms of its scene applied, in the file's units and axes.

    vertices: [V, 3] float64; float32 where the file stores single precision and nothing was applied to it, so that
        `load_mesh` can see how fine its coordinates are.
    faces: [F, 3] int64, indices of vertices; F is 0 for a cloud of points.
    up: the axis that the file itself, or the specification of its format, says is up. None if neither does.
    notes: what a user should know of this file, each a sentence without a full stop, such as "shown in the pose of its
        node weights"; nothing that holds for every file of the format.
    """

    vertices: np.ndarray
    faces: np.ndarray
    up: Up | None = None
    notes: tuple[str, ...] = ()
