"""Triangles to the voxels that they meet: a triangle-box test, compiled by Numba.

The test is by separating axes, from T. Akenine-Möller, Fast 3D Triangle-Box Overlap Testing, Journal of Graphics Tools
6(1), 2001. The voxels equal those of Open3D's `VoxelGrid.create_from_triangle_mesh_within_bounds`, which TRELLIS uses:
all is float64 in the same order of operations, and no product is fused with a sum. Borders belong to a voxel, but along
each axis the first voxel of a triangle is that of its least coordinate, rounded down. So a triangle in the border of
two voxels meets the upper one alone.

A voxel is met if it passes every test, so their order is free: those that a whole slice or column of voxels fails come
first.

Numba is optional, so only the function that needs it imports it.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from ..utils.errors import ConfigError

HALF = 0.5 - 1e-6  # TRELLIS's clip: just inside the cube
# In a column of voxels a large triangle can meet only those about its plane. They are searched if it may meet more than
# TALL of them, and if the z component of its normal, the cross product of two edges, exceeds FLAT: rounding then moves
# the plane by less than 1e-6, and MARGIN, in voxels, is more than that.
TALL = 4
FLAT = 1e-4
MARGIN = 0.01

MARK = "Tuple((uint8[:,:,::1], int64))(float64[:,::1], int64[:,::1], int64)"
READ_OUT = "int64[:,::1](uint8[:,:,::1], int64)"


def voxelize_mesh(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Return the voxels that triangles meet, [N, 3] int64 in [0, resolution), sorted by x, then y, then z.

    vertices: [V, 3] float, finite, in the cube [-0.5, 0.5]^3; what lies outside is clipped to it.
    faces: [F, 3] int, indices of vertices. A triangle may be a segment or a point.
    resolution: voxels along an edge, 1 to 1024; resolution^3 / 8 bytes are taken for them.
    Raise ValueError for a vertex that is not finite or an index out of range, ConfigError if Numba is missing.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.require(faces, np.int64, ("C", "W", "A"))
    if not np.isfinite(vertices).all():
        raise ValueError("a vertex is not finite")
    if faces.size and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise ValueError(f"the triangles use vertices {faces.min()} to {faces.max()} of {len(vertices)}")
    mark, read_out = load_kernels()
    return read_out(*mark(np.ascontiguousarray(np.clip(vertices, -HALF, HALF)), faces, resolution))


@functools.cache
def load_kernels() -> tuple[Callable, Callable]:
    """Return `_mark` and `_read_out` as machine code, compiled in about 2 s or read from where Numba keeps it.

    `voxelize_mesh` needs no earlier call; one keeps that time out of the first mesh's. Raise ConfigError if Numba is
    missing.
    """
    try:
        import numba
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install numba") from error
    try:
        return numba.njit(MARK, cache=True)(_mark), numba.njit(READ_OUT, cache=True)(_read_out)
    except Exception:  # any fault of the kept code: no folder for it, a full disk, a file cut short
        return numba.njit(MARK)(_mark), numba.njit(READ_OUT)(_read_out)


def _mark(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> tuple[np.ndarray, int]:
    """Return the voxels that triangles meet as bits [R, R, ceil(R / 8)] uint8, lowest z first, and their number.

    vertices: [V, 3] float64 in [-HALF, HALF]^3.
    faces: [F, 3] int64.
    """
    size = 1.0 / resolution
    half = size / 2.0
    origin = -0.5 + half  # the center of voxel 0

    def span(p: float, q: float, r: float) -> tuple[int, int]:
        # The first voxel along an axis that a triangle may meet, and the one after the last.
        least, most = min(p, q, r), max(p, q, r)
        first = math.floor((least + 0.5) / size)
        return first, min(first + math.floor((most - least) / size + 0.5) + 2, resolution)

    def apart(edge_p: float, edge_q: float, p0: float, q0: float, p1: float, q1: float) -> bool:
        # Whether a triangle and the box about 0 are apart along the cross product of an edge and an axis. p and q are
        # the other two axes. Both ends of the edge lie at the same place, so two vertices are enough.
        first, second = edge_p * q0 - edge_q * p0, edge_p * q1 - edge_q * p1
        reach = abs(edge_p) * half + abs(edge_q) * half
        return min(first, second) > reach or max(first, second) < -reach

    mask = np.zeros((resolution, resolution, (resolution + 7) // 8), dtype=np.uint8)
    count = 0
    for face in range(len(faces)):
        a, b, c = faces[face]
        ax, ay, az = vertices[a]
        bx, by, bz = vertices[b]
        cx, cy, cz = vertices[c]
        low_x, high_x = span(ax, bx, cx)
        low_y, high_y = span(ay, by, cy)
        low_z, high_z = span(az, bz, cz)
        nx = ny = nz = spread = 0.0
        if high_z - low_z > TALL:
            nx = (by - ay) * (cz - bz) - (bz - az) * (cy - by)
            ny = (bz - az) * (cx - bx) - (bx - ax) * (cz - bz)
            nz = (bx - ax) * (cy - by) - (by - ay) * (cx - bx)
            if abs(nz) > FLAT:
                spread = half * (abs(nx) + abs(ny) + abs(nz)) / abs(nz)

        for i in range(low_x, high_x):
            center = origin + i * size
            x0, x1, x2 = ax - center, bx - center, cx - center  # vertices relative to the box
            if min(x0, x1, x2) > half or max(x0, x1, x2) < -half:
                continue
            ex0, ex1, ex2 = x1 - x0, x2 - x1, x0 - x2  # edges; their rounding depends on the box
            for j in range(low_y, high_y):
                center = origin + j * size
                y0, y1, y2 = ay - center, by - center, cy - center
                if min(y0, y1, y2) > half or max(y0, y1, y2) < -half:
                    continue
                ey0, ey1, ey2 = y1 - y0, y2 - y1, y0 - y2
                if (
                    apart(ex0, ey0, x1, y1, x2, y2)
                    or apart(ex1, ey1, x0, y0, x1, y1)
                    or apart(ex2, ey2, x1, y1, x2, y2)
                ):
                    continue
                bottom, top = low_z, high_z
                if spread > 0.0:
                    height = az + (nx * x0 + ny * y0) / nz - origin  # of the plane in this column, above voxel 0
                    bottom = max(bottom, math.floor((height - spread) / size - MARGIN))
                    top = min(top, math.ceil((height + spread) / size + MARGIN))
                for k in range(bottom, top):
                    if mask[i, j, k >> 3] >> (k & 7) & 1:
                        continue
                    center = origin + k * size
                    z0, z1, z2 = az - center, bz - center, cz - center
                    if min(z0, z1, z2) > half or max(z0, z1, z2) < -half:
                        continue
                    ez0, ez1, ez2 = z1 - z0, z2 - z1, z0 - z2
                    if (
                        apart(ey0, ez0, y0, z0, y2, z2)
                        or apart(ex0, ez0, x0, z0, x2, z2)
                        or apart(ey1, ez1, y0, z0, y2, z2)
                        or apart(ex1, ez1, x0, z0, x2, z2)
                        or apart(ey2, ez2, y0, z0, y1, z1)
                        or apart(ex2, ez2, x0, z0, x1, z1)
                    ):
                        continue
                    mx, my, mz = ey0 * ez1 - ez0 * ey1, ez0 * ex1 - ex0 * ez1, ex0 * ey1 - ey0 * ex1
                    # The corner of the box that is farthest along the normal, and the one opposite.
                    hx, hy, hz = half if mx > 0.0 else -half, half if my > 0.0 else -half, half if mz > 0.0 else -half
                    if (
                        mx * (-hx - x0) + my * (-hy - y0) + mz * (-hz - z0) <= 0.0
                        and mx * (hx - x0) + my * (hy - y0) + mz * (hz - z0) >= 0.0
                    ):
                        mask[i, j, k >> 3] |= 1 << (k & 7)
                        count += 1
    return mask, count


def _read_out(mask: np.ndarray, count: int) -> np.ndarray:
    """Return the voxels of a mask, see `_mark`, as indices [N, 3] int64, sorted by x, then y, then z."""
    voxels = np.empty((count, 3), dtype=np.int64)
    n = 0
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            for byte in range(mask.shape[2]):
                bits = mask[i, j, byte]
                for bit in range(8 if bits else 0):
                    if bits >> bit & 1:
                        voxels[n, 0], voxels[n, 1], voxels[n, 2] = i, j, 8 * byte + bit
                        n += 1
    return voxels
