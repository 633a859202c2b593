"""Triangles to the voxels that they meet: the triangle-box test of Akenine-Möller, compiled by Numba.

Source: T. Akenine-Möller, Fast 3D Triangle-Box Overlap Testing, Journal of Graphics Tools 6(1), 2001.

The voxels are those of Open3D's `VoxelGrid.create_from_triangle_mesh_within_bounds`, which TRELLIS uses, bit for bit.
So everything is float64, in Open3D's order of operations, and never fused: a triangle in the border of two voxels
belongs to the upper one alone, because a triangle's first voxel along each axis is its least coordinate's, rounded down.
The result is the voxels that pass every test, so the order of the tests is free: those that a whole slice or column of
voxels fails come first.

Numba is optional, so only the functions that need it import it.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from ..utils.errors import ConfigError

HALF = 0.5 - 1e-6  # TRELLIS's clip: just inside the cube
# A plane whose normal (the cross product of two edges) has a z component above this is steep in no column of voxels:
# its height there is known to 1e-6, far less than a voxel.
FLAT = 1e-4


def voxelize_mesh(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Return the voxels that triangles meet, [N, 3] int64 in [0, resolution), sorted by x, then y, then z.

    vertices: [V, 3] float, finite, in the cube [-0.5, 0.5]^3; others are clipped to it.
    faces: [F, 3] int, indices of vertices.
    resolution: voxels along an edge, 1 to 1024. Beside the result resolution^3 / 8 bytes are taken.
    Raise ValueError if a vertex that is not finite or an index out of range is given, ConfigError if Numba cannot be
    loaded.
    """
    vertices = np.ascontiguousarray(vertices, dtype=np.float64)
    faces = np.ascontiguousarray(faces, dtype=np.int64)
    if not np.isfinite(vertices).all():
        raise ValueError("a vertex is not finite")
    if faces.size and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise ValueError(f"faces use vertices {faces.min()} to {faces.max()} of {len(vertices)}")
    return _compiled()(np.clip(vertices, -HALF, HALF), faces, resolution)


@functools.cache
def _compiled() -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    """Return `_voxels` as machine code, which Numba keeps on disk where it can."""
    try:
        import numba
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install numba") from error
    try:
        return numba.njit(_voxels, cache=True, nogil=True)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(_voxels, nogil=True)


def _voxels(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Return the voxels of triangles in [-HALF, HALF]^3. Coordinates below are relative to the center of a voxel."""

    def apart(p, q, p0, q0, p1, q1, half):  # type: ignore[no-untyped-def]
        # Whether triangle and box are apart along the cross product of an edge (p, q) and the axis that is not p or q.
        # Two vertices suffice: the ends of the edge coincide there.
        first, second = p * q0 - q * p0, p * q1 - q * p1
        radius = abs(p) * half + abs(q) * half
        return min(first, second) > radius or max(first, second) < -radius

    size = 1.0 / resolution
    half = size / 2.0
    origin = -0.5 + half  # center of voxel 0
    mask = np.zeros((resolution, resolution, (resolution + 7) // 8), dtype=np.uint8)  # bits along z, lowest first
    count = 0
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for face in range(len(faces)):
        a, b, c = faces[face]
        ax, ay, az = vertices[a]
        bx, by, bz = vertices[b]
        cx, cy, cz = vertices[c]
        for axis in range(3):
            least = min(vertices[a, axis], vertices[b, axis], vertices[c, axis])
            most = max(vertices[a, axis], vertices[b, axis], vertices[c, axis])
            low[axis] = math.floor((least + 0.5) / size)
            high[axis] = min(low[axis] + math.floor((most - least) / size + 0.5) + 2, resolution)

        for i in range(low[0], high[0]):
            center = origin + i * size
            x0, x1, x2 = ax - center, bx - center, cx - center
            if min(x0, x1, x2) > half or max(x0, x1, x2) < -half:
                continue
            ex0, ex1, ex2 = x1 - x0, x2 - x1, x0 - x2
            for j in range(low[1], high[1]):
                center = origin + j * size
                y0, y1, y2 = ay - center, by - center, cy - center
                if min(y0, y1, y2) > half or max(y0, y1, y2) < -half:
                    continue
                ey0, ey1, ey2 = y1 - y0, y2 - y1, y0 - y2
                if (
                    apart(ex0, ey0, x1, y1, x2, y2, half)
                    or apart(ex1, ey1, x0, y0, x1, y1, half)
                    or apart(ex2, ey2, x1, y1, x2, y2, half)
                ):
                    continue
                nz = ex0 * ey1 - ey0 * ex1
                for k in range(low[2], high[2]):
                    if mask[i, j, k >> 3] & (1 << (k & 7)):
                        continue
                    center = origin + k * size
                    z0, z1, z2 = az - center, bz - center, cz - center
                    if min(z0, z1, z2) > half or max(z0, z1, z2) < -half:
                        continue
                    ez0, ez1, ez2 = z1 - z0, z2 - z1, z0 - z2
                    if (
                        apart(ey0, ez0, y0, z0, y2, z2, half)
                        or apart(ex0, ez0, x0, z0, x2, z2, half)
                        or apart(ey1, ez1, y0, z0, y2, z2, half)
                        or apart(ex1, ez1, x0, z0, x2, z2, half)
                        or apart(ey2, ez2, y0, z0, y1, z1, half)
                        or apart(ex2, ez2, x0, z0, x1, z1, half)
                    ):
                        continue
                    nx = ey0 * ez1 - ez0 * ey1
                    ny = ez0 * ex1 - ex0 * ez1
                    # The corners of the box that lie farthest against and along the normal, from vertex 0.
                    back = (
                        nx * ((-half if nx > 0.0 else half) - x0)
                        + ny * ((-half if ny > 0.0 else half) - y0)
                        + nz * ((-half if nz > 0.0 else half) - z0)
                    )
                    front = (
                        nx * ((half if nx > 0.0 else -half) - x0)
                        + ny * ((half if ny > 0.0 else -half) - y0)
                        + nz * ((half if nz > 0.0 else -half) - z0)
                    )
                    if back <= 0.0 <= front:
                        mask[i, j, k >> 3] |= 1 << (k & 7)
                        count += 1

    voxels = np.empty((count, 3), dtype=np.int64)
    n = 0
    for i in range(resolution):
        for j in range(resolution):
            for byte in range(mask.shape[2]):
                bits = mask[i, j, byte]
                for bit in range(8):
                    if bits >> bit & 1:
                        voxels[n, 0], voxels[n, 1], voxels[n, 2] = i, j, 8 * byte + bit
                        n += 1
    return voxels
