"""Polygons in space to triangles, for every reader whose format has polygons.

A fan from the first corner is right for triangles, for convex polygons and for all that this corner sees whole; one
vectorized test tells. Of five corners or fewer, some corner sees the whole polygon (Chvatal, "A combinatorial theorem
in plane geometry", 1975: n // 3 guards suffice), and its fan is taken. mapbox_earcut (ear clipping with a spatial
index) cuts the others: ear clipping in Python would be quadratic, and CAD programs write polygons of thousands of
corners.
"""

import numpy as np

from ...utils.errors import ConfigError, DataError

# A fan may leave its polygon by this share of the area: rounded coordinates of points on a straight edge do.
TOLERANCE = 1e-6
# Twice the area below which a polygon of size 1 is a line.
LINE = 1e-12


def triangulate(vertices: np.ndarray, corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Split polygons into triangles that cover the same area, in the order of the polygons and with their winding.

    vertices: [V, 3] float, finite where a polygon uses them (others are kept, and their polygons cut into fans).
    corners: [C] int64, the vertices of all polygons, one polygon after the other.
    sizes: [P] int64, the corners of each polygon, in sum C. Polygons of less than three corners have no area and are
        left out.
    Return [F, 3] int64, indices of vertices. A polygon that its first corner sees whole gives the fan (0, 1, 2),
    (0, 2, 3) and so on, of four corners (0, 1, 2), (2, 3, 0). Seeing is judged in the plane of the polygon's normal,
    the sum of the fan's cross products (Newell's). A polygon that crosses itself cannot be cut and keeps the fan.
    Raise DataError if a corner is no vertex, ConfigError if mapbox_earcut is needed and missing.
    """
    corners, sizes = np.asarray(corners, dtype=np.int64), np.asarray(sizes, dtype=np.int64)
    if len(corners) and (corners.min() < 0 or corners.max() >= len(vertices)):
        raise DataError(f"its faces use vertices {corners.min()} to {corners.max()} of {len(vertices)}")
    starts = np.cumsum(sizes) - sizes
    if len(corners) and (sizes == 3).all():
        return corners.reshape(-1, 3)

    shifts, concave = _fans(vertices, corners, starts, sizes)
    counts = np.maximum(sizes - 2, 0)  # triangles of each polygon
    polygon = np.repeat(np.arange(len(sizes)), counts)
    first_triangle = np.cumsum(counts) - counts
    step = np.arange(len(polygon)) - first_triangle[polygon]
    within = np.stack([np.zeros_like(step), step + 1, step + 2], axis=1)
    closing = (sizes[polygon] == 4) & (step == 1)
    within[closing] = [2, 3, 0]
    shifted = shifts[polygon] > 0
    within[shifted] = (within[shifted] + shifts[polygon[shifted], None]) % sizes[polygon[shifted], None]
    faces = corners[starts[polygon, None] + within]
    if not len(concave):
        return faces

    replaced = np.zeros(len(sizes), dtype=bool)
    replaced[concave] = True
    replaced = replaced[polygon]
    parts, owners = [faces[~replaced]], [polygon[~replaced]]
    for index in concave:
        ring = corners[starts[index] : starts[index] + sizes[index]]
        cut = _cut(_float64(vertices[ring]))
        parts.append(faces[first_triangle[index] : first_triangle[index] + counts[index]] if cut is None else ring[cut])
        owners.append(np.full(len(parts[-1]), index))
    return np.concatenate(parts)[np.argsort(np.concatenate(owners), kind="stable")]


def _fans(
    vertices: np.ndarray, corners: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the corner [P] int64 whose fan each polygon takes, and the polygons [N] int64 for which no fan will do."""
    shifts = np.zeros(len(sizes), dtype=np.int64)
    found = [np.zeros(0, dtype=np.int64)]
    by_size = np.argsort(sizes, kind="stable")
    by_size = by_size[np.searchsorted(sizes[by_size], 4) :]
    different = np.flatnonzero(np.diff(sizes[by_size])) + 1
    for polygons in np.split(by_size, different) if len(by_size) else []:  # polygons of one size make a full array
        size = int(sizes[polygons[0]])
        rows = max(1, 2**20 // size)  # bounds the memory of the cross products
        for chunk in np.array_split(polygons, -(-len(polygons) // rows)):
            points = _float64(vertices[corners[starts[chunk, None] + np.arange(size)]])  # [N, S, 3]
            unseen = np.flatnonzero(_leaves(points))
            if size > 5:
                found.append(chunk[unseen])
                continue
            for shift in range(1, size):  # what crosses itself keeps 0
                seen = ~_leaves(np.roll(points[unseen], -shift, axis=1))
                shifts[chunk[unseen[seen]]] = shift
                unseen = unseen[~seen]
    return shifts, np.sort(np.concatenate(found))


def _float64(points: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of damaged data: some numbers that are none make NumPy warn
        return points.astype(np.float64)


def _leaves(points: np.ndarray) -> np.ndarray:
    """Return whether the fan of the first corner leaves the polygon, bool [N], of polygons [N, S, 3].

    Then one of its triangles faces against the polygon's normal.
    """
    if not len(points):
        return np.zeros(0, dtype=bool)
    with np.errstate(all="ignore"):  # what is not finite compares as false
        crosses = _fan_crosses(points)
        normals = crosses.sum(axis=1, keepdims=True)
        along = (crosses * normals).sum(axis=2).min(axis=1)
        squares = (normals**2).sum(axis=(1, 2))
        return (squares > LINE**2) & (along < -TOLERANCE * squares)


def _fan_crosses(points: np.ndarray) -> np.ndarray:
    """Return twice the vector area of each fan's triangles, [N, S - 2, 3], of points [N, S, 3] scaled to size 1."""
    points = points - points[:, :1]
    points /= np.abs(points).max(axis=(1, 2), keepdims=True)  # the products of tiny lengths would underflow
    return np.cross(points[:, 1:-1], points[:, 2:])


def _cut(points: np.ndarray) -> np.ndarray | None:
    """Cut one polygon, points [S, 3] float64, into triangles [F, 3] int64 of its corners; None if it crosses itself."""
    try:
        import mapbox_earcut
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install mapbox_earcut") from error
    normal = _fan_crosses(points[None])[0].sum(axis=0)
    normal /= np.linalg.norm(normal)
    points = points - points[0]
    points /= np.abs(points).max()
    # Two axes in the plane that make a right-handed system with the normal: the polygon runs counterclockwise.
    axis = np.cross(normal, np.eye(3)[np.abs(normal).argmin()])
    axis /= np.linalg.norm(axis)
    plane = np.stack([points @ axis, points @ np.cross(normal, axis)], axis=1)  # [S, 2]

    triangles = mapbox_earcut.triangulate_float64(plane, np.array([len(plane)], dtype=np.uint32))
    triangles = triangles.reshape(-1, 3).astype(np.int64)
    sides = plane[triangles[:, 1:]] - plane[triangles[:, :1]]  # [F, 2, 2]
    areas = sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0]
    following = np.roll(plane, -1, axis=0)
    area = (plane[:, 0] * following[:, 1] - plane[:, 1] * following[:, 0]).sum()
    if abs(np.abs(areas).sum() - area) > TOLERANCE * area:
        return None
    triangles[areas < 0] = triangles[areas < 0, ::-1]
    return triangles
