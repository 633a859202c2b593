"""Mesh pieces that the shapes are built from: boxes, prisms, sweeps, lathes, ellipsoids. z is up."""

import numpy as np
import trimesh


def mesh_of(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    """Make a mesh of vertices [V, 3] and faces [F, 3], without the faces that have no area."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return trimesh.Trimesh(vertices, faces[np.abs(normals).max(axis=1) > 1e-12], process=False)


def box(center, size) -> trimesh.Trimesh:
    """Make an axis-aligned box: center and edge lengths x y z."""
    return trimesh.creation.box(extents=size).apply_translation(center)


def tilted(mesh: trimesh.Trimesh, degrees: float, axis, about=(0, 0, 0)) -> trimesh.Trimesh:
    """Rotate a mesh in place about an axis through the point `about`, and return it."""
    return mesh.apply_transform(trimesh.transformations.rotation_matrix(np.radians(degrees), axis, about))


def circle(radius: float, segments: int = 32) -> np.ndarray:
    """Return points [segments, 2] on a circle about the origin, from angle 0 on."""
    angles = np.arange(segments) * 2 * np.pi / segments
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rectangle(width: float, height: float, segments: int = 32) -> np.ndarray:
    """Return points [segments, 2] on a rectangle about the origin, at the angles of `circle`.

    The four points nearest to the corners are moved into them. segments is a multiple of 4.
    """
    directions = circle(1, segments)
    with np.errstate(divide="ignore"):
        reach = np.minimum(width / 2 / np.abs(directions[:, 0]), height / 2 / np.abs(directions[:, 1]))
    points = directions * reach[:, None]
    for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
        corner = np.array([x * width / 2, y * height / 2])
        points[np.abs(points - corner).sum(axis=1).argmin()] = corner
    return points


def _strip(rings: int, points: int, closed: bool, around: bool = True) -> np.ndarray:
    """Return the faces between consecutive rings of vertices [rings, points]; `closed` joins the last and first."""
    i, j = np.meshgrid(
        np.arange(rings if closed else rings - 1), np.arange(points if around else points - 1), indexing="ij"
    )
    a, b = i * points + j, i * points + (j + 1) % points
    c, d = (i + 1) % rings * points + j, (i + 1) % rings * points + (j + 1) % points
    return np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)])


def grid_surface(points: np.ndarray) -> trimesh.Trimesh:
    """Make an open sheet through points [U, V, 3]."""
    u, v, _ = points.shape
    return mesh_of(points.reshape(-1, 3), _strip(u, v, closed=False, around=False))


def prism(outline: np.ndarray, low: float, high: float, hole: np.ndarray | None = None) -> trimesh.Trimesh:
    """Extrude an outline [K, 2] along z from low to high.

    hole: [K, 2], an outline at the same angles, inside; without it the outline must see its mean point.
    """
    inner = np.broadcast_to(outline.mean(axis=0), outline.shape) if hole is None else hole
    loop = [(inner, low), (outline, low), (outline, high), (inner, high)]
    rings = np.stack([np.column_stack([points, np.full(len(points), z)]) for points, z in loop])
    return mesh_of(rings.reshape(-1, 3), _strip(4, len(outline), closed=hole is not None))


def side_prism(outline: np.ndarray, low: float, high: float) -> trimesh.Trimesh:
    """Extrude an outline [K, 2] of x and z along y from low to high; it must see its mean point."""
    mesh = prism(outline, low, high)
    mesh.vertices = mesh.vertices[:, [0, 2, 1]]
    return mesh


def lathe(profile, segments: int = 32, closed: bool = False, squash: float = 1.0) -> trimesh.Trimesh:
    """Turn a profile [K, 2] of radius and height about z; `closed` joins its ends. squash: scale of y."""
    profile = np.asarray(profile, dtype=float)
    directions = circle(1, segments)
    rings = np.concatenate(
        [
            profile[:, :1, None] * directions * (1, squash),
            np.broadcast_to(profile[:, 1, None, None], (len(profile), segments, 1)),
        ],
        axis=2,
    )
    return mesh_of(rings.reshape(-1, 3), _strip(len(profile), segments, closed))


def disc(radius: float, low: float, high: float, segments: int = 32) -> trimesh.Trimesh:
    """Make a solid cylinder about z."""
    return lathe([(0, low), (radius, low), (radius, high), (0, high)], segments)


def sweep(path, radius, segments: int = 12, closed: bool = False, squash: float = 1.0) -> trimesh.Trimesh:
    """Make a round tube along path [K, 3], capped unless closed. radius: a number or one for each point.

    squash: scale of the cross-section along its second axis, which is horizontal for a path that is not.
    """
    path = np.asarray(path, dtype=float)
    radius = np.broadcast_to(radius, len(path))
    if closed:
        tangents = np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0)
    else:
        tangents = np.gradient(path, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    up = np.array([0.0, 0.0, 1.0]) if abs(tangents[0, 2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    rings, normal = [], up
    for point, tangent, size in zip(path, tangents, radius, strict=True):
        normal = normal - tangent * (normal @ tangent)  # carried along, so that the tube does not twist
        normal /= np.linalg.norm(normal)
        offsets = circle(size, segments)
        rings.append(point + offsets[:, :1] * normal + squash * offsets[:, 1:] * np.cross(tangent, normal))
    if not closed:
        ends = [np.broadcast_to(path[end], (segments, 3)) for end in (0, -1)]
        rings = [ends[0], *rings, ends[1]]
    return mesh_of(np.concatenate(rings), _strip(len(rings), segments, closed))


def bar(start, end, start_radius: float, end_radius: float | None = None, segments: int = 10) -> trimesh.Trimesh:
    """Make a straight, possibly tapered rod."""
    return sweep([start, end], [start_radius, start_radius if end_radius is None else end_radius], segments)


def spline(points, count: int = 24) -> np.ndarray:
    """Make a smooth curve [count, D] through points [K, D] (Catmull-Rom, evenly in the parameter)."""
    points = np.asarray(points, dtype=float)
    padded = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
    t = np.linspace(0, len(points) - 1, count)
    i = np.minimum(t.astype(int), len(points) - 2)
    t = (t - i)[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def ellipsoid(center, radii, subdivisions: int = 3) -> trimesh.Trimesh:
    """Make an ellipsoid with radii x y z."""
    sphere = trimesh.creation.icosphere(subdivisions=subdivisions)
    return mesh_of(sphere.vertices * np.asarray(radii) + center, sphere.faces)


def mirrored(meshes: list[trimesh.Trimesh], axis: int) -> list[trimesh.Trimesh]:
    """Return the meshes and their copies on the other side of the plane through 0 across the axis."""
    scale = np.ones(3)
    scale[axis] = -1
    return meshes + [mesh_of(mesh.vertices * scale, mesh.faces[:, ::-1]) for mesh in meshes]
