"""Placing a mesh in the cube of the grid: its up axis, its scale, and the way back.

The grid divides the cube [-0.5, 0.5)^3 and is z-up.

Which axis is up is a property of a mesh file. A setting `up_axis` says how to find it:

    auto  what the file or the specification of its format says (glTF y, COLLADA and 3MF as the file says, STL z).
          A format that says nothing (OBJ, PLY, OFF, VTK) is taken as "keep", or with normalization "shapellm" as y-up
    y, z  every file has this axis up, whatever it says itself
    keep  the axes stay as they are, without saying what they are

Files are written with the axes that the same setting would find in them, so under "auto" a GLB is y-up and an STL z-up,
and OBJ and PLY have the axes of the grid, or with normalization "shapellm" are y-up.

`normalization` says how the mesh is scaled into the cube: "cube" and "shapellm" as the functions below do, None not at
all.
"""

from typing import Literal

import numpy as np

from ..utils.errors import ConfigError, DataError
from .formats import FORMATS

Axis = Literal["y", "z", "keep"]  # of a file: y-up, turned to z-up; z-up already; not known, left alone
UP_AXES = ("auto", "y", "z", "keep")
Z_UP = ("auto", "y", "z")  # the settings whose grids are known to be z-up
NORMALIZATIONS = ("cube", "shapellm")
OUTSIDE_TOLERANCE = 1e-3  # TRELLIS's meshes may exceed the cube by rounding


def check_settings(up_axis: str, normalization: str) -> None:
    """Raise ConfigError for an unknown up axis or normalization, or two that do not go together."""
    if up_axis not in UP_AXES:
        raise ConfigError(f"up_axis {up_axis!r}: must be one of {', '.join(UP_AXES)}.")
    if normalization not in NORMALIZATIONS:
        raise ConfigError(f"normalization {normalization!r}: must be one of {', '.join(NORMALIZATIONS)}.")
    if normalization == "shapellm" and up_axis not in ("auto", "y"):
        raise ConfigError(
            f'up_axis {up_axis!r}: normalization "shapellm" takes meshes as y-up and turns them to '
            'z-up itself. Set it to "auto" or "y", or take normalization "cube".'
        )


def axis_of_file(up_axis: str, said: Literal["y", "z"] | None, normalization: str | None) -> Axis:
    """Return how the axes of one file are taken.

    up_axis: the setting, one of UP_AXES.
    said: the axis that the file or its format says is up, None if neither does.
    normalization: "shapellm" takes files that say nothing as y-up, as ShapeLLM-Omni takes all files.
    """
    if up_axis == "auto":
        return said or ("y" if normalization == "shapellm" else "keep")
    return "y" if up_axis == "y" else "z" if up_axis == "z" else "keep"


def axis_to_write(up_axis: str, suffix: str, normalization: str | None) -> Axis:
    """Return the axis that a mesh file of a grid is written with: "y" for y-up, else the grid's axes.

    up_axis: the setting, one of UP_AXES.
    suffix: of the file, such as ".glb".
    normalization: as `axis_of_file` takes it.
    Raise ConfigError for an unknown setting.
    """
    if up_axis not in UP_AXES:
        raise ConfigError(f"up_axis {up_axis!r}: must be one of {', '.join(UP_AXES)}.")
    known = FORMATS.get(suffix.lower())
    return axis_of_file(up_axis, known.up if known else None, normalization)


def turn_to_z_up(points: np.ndarray) -> np.ndarray:
    """Turn points [..., 3] by +90 degrees about x, from y-up to z-up: x y z becomes x -z y."""
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def turn_to_y_up(points: np.ndarray) -> np.ndarray:
    """Turn points [..., 3] by -90 degrees about x, from z-up to y-up: x y z becomes x z -y. Undoes `turn_to_z_up`."""
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], axis=-1)


def turn_voxels_to_z_up(voxels: np.ndarray, resolution: int) -> np.ndarray:
    """Turn voxel indices [..., 3] as `turn_to_z_up` turns their centers: about the middle of the grid, -z is R-1-k."""
    return np.stack([voxels[..., 0], resolution - 1 - voxels[..., 2], voxels[..., 1]], axis=-1)


def normalize_cube(vertices: np.ndarray) -> np.ndarray:
    """Center the bounding box of vertices [V, 3] at 0 and make its longest edge 1. Raise DataError without a size."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    edge = (high - low).max()
    if not 0 < edge < np.inf:
        raise DataError(f"its longest edge is {edge:g}: nothing to scale to 1")
    return (vertices - (low + high) / 2) / edge


def normalize_shapellm(vertices: np.ndarray) -> np.ndarray:
    """Scale vertices [V, 3] as ShapeLLM-Omni does (arXiv:2506.01853): one minimum and one maximum for all axes.

    The smallest of all coordinates becomes -0.5 and the largest 0.5, so in general no axis is centered.
    Raise DataError without a size.
    """
    low, high = vertices.min(), vertices.max()
    if not 0 < high - low < np.inf:
        raise DataError(f"its coordinates span {high - low:g}: nothing to scale to 1")
    return (vertices - low) / (high - low) - 0.5


def place_vertices(vertices: np.ndarray, axis: Axis, normalization: str | None) -> np.ndarray:
    """Return vertices [V, 3] as they lie in the cube [-0.5, 0.5]^3 of the grid, z-up.

    axis: as `axis_of_file` returns it.
    Raise DataError for a mesh without a size, or with normalization None for one outside the cube.
    """
    if normalization == "shapellm":
        y_up = turn_to_y_up(vertices) if axis == "z" else vertices
        return turn_to_z_up(normalize_shapellm(y_up))
    if axis == "y":
        vertices = turn_to_z_up(vertices)
    if normalization == "cube":
        return normalize_cube(vertices)
    largest = np.abs(vertices).max()
    if largest > 0.5 + OUTSIDE_TOLERANCE:
        raise DataError(f"is not normalized to the unit cube: a coordinate is {largest:g}")
    return vertices
