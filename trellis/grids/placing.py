"""Placing a mesh in the cube of the grid: its up axis, its scale, and the way back.

The grid divides the cube [-0.5, 0.5)^3 and is z-up.

`up_axis` says how the axes of a mesh file become the grid's: "y" is y-up and turned to z-up, "z" is z-up already,
"keep" leaves the axes alone without saying what they are.
`normalization` says how the mesh is scaled into the cube: "cube" and "shapellm" as the functions below do, None not at
all.
"""

import numpy as np

from ..utils.errors import ConfigError, DataError

UP_AXES = ("keep", "y", "z")
NORMALIZATIONS = ("cube", "shapellm")
OUTSIDE_TOLERANCE = 1e-3  # TRELLIS's meshes may exceed the cube by rounding


def check_settings(up_axis: str, normalization: str) -> None:
    """Raise ConfigError for an unknown up axis or normalization, or two that do not go together."""
    if up_axis not in UP_AXES:
        raise ConfigError(f"up_axis {up_axis!r}: must be one of {', '.join(UP_AXES)}.")
    if normalization not in NORMALIZATIONS:
        raise ConfigError(f"normalization {normalization!r}: must be one of {', '.join(NORMALIZATIONS)}.")
    if normalization == "shapellm" and up_axis != "y":
        raise ConfigError(
            f'up_axis {up_axis!r}: normalization "shapellm" takes meshes as y-up and turns them to '
            'z-up itself. Set it to "y", or take normalization "cube".'
        )


def default_up_axis(normalization: str) -> str:
    """Return the up axis of a mesh file if none is given: "y" with "shapellm", which knows no other, else "keep"."""
    return "y" if normalization == "shapellm" else "keep"


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


def place_vertices(vertices: np.ndarray, up_axis: str, normalization: str | None) -> np.ndarray:
    """Return vertices [V, 3] as they lie in the cube [-0.5, 0.5]^3 of the grid, z-up.

    Raise DataError for a mesh without a size, or with normalization None for one outside the cube.
    """
    if normalization == "shapellm":
        return turn_to_z_up(normalize_shapellm(vertices))
    if up_axis == "y":
        vertices = turn_to_z_up(vertices)
    if normalization == "cube":
        return normalize_cube(vertices)
    largest = np.abs(vertices).max()
    if largest > 0.5 + OUTSIDE_TOLERANCE:
        raise DataError(f"is not normalized to the unit cube: a coordinate is {largest:g}")
    return vertices
