"""The outer faces of voxels as triangles, few enough for a browser.

Axes: R voxels along an axis, F faces (squares or merged rectangles), V corners.
"""

from typing import NamedTuple

import numpy as np

from ..grids.shading import slope_and_hollow

SHADED_FACES = 40_000  # of two triangles each; above this number equal neighbors are merged
MOST_FACES = 50_000  # above this number of merged faces the grid is halved
LIGHT = np.array([0.35, -0.55, 0.76])  # from the first camera's upper left, so that top, left and right differ


class Faces(NamedTuple):
    """Outer faces as triangles."""

    corners: np.ndarray  # [V, 3] int, in voxels of the given grid, in [0, R]
    triangles: np.ndarray  # [2F, 3] int32, indices of corners
    shade: np.ndarray  # [2F] float32, brightness of each triangle, about 0.4 to 1.2
    labels: np.ndarray  # [2F] uint8, the label of the voxel that each triangle belongs to
    coarser: int  # edge of the drawn voxels, 1 unless the grid had to be halved


def outer_faces(labels: np.ndarray) -> Faces:
    """Return the faces of voxels that have no neighbor on that side.

    labels: [R, R, R], whole numbers below 256, occupied where not zero.
    Up to SHADED_FACES faces are kept single, with a shading that shows form. More are merged to rectangles of one
    label, shaded by direction. If even then more than MOST_FACES are left, blocks of 2³ voxels are drawn as one with
    their largest label.
    Raise ValueError for another shape.
    """
    labels = np.asarray(labels)
    if labels.ndim != 3 or len(set(labels.shape)) != 1:
        raise ValueError(f"labels must be [R, R, R], not {list(labels.shape)}")
    labels, coarser = labels.astype(np.uint8), 1
    while True:
        voxels, sides = _exposed(labels)
        if len(voxels) <= SHADED_FACES:
            low, size = voxels, np.ones((len(voxels), 2), dtype=np.int64)
            shade = _shade(labels != 0, voxels, sides)
            break
        low, size, sides = _merged(labels, voxels, sides)
        if len(low) <= MOST_FACES:
            axis, sign = sides // 2, sides % 2 * 2 - 1
            shade = 0.72 + 0.35 * sign * LIGHT[axis]
            break
        labels, coarser = _halved(labels), 2 * coarser
    corners, triangles = _triangles(low, size, sides, len(labels) + 1)
    shade, own = shade.astype(np.float32).repeat(2), labels[tuple(low.T)].repeat(2)
    return Faces(corners * coarser, triangles, shade, own, coarser)


def _exposed(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return voxel [F, 3] and side [F] of each outer face. Sides: 2·axis the lower one, 2·axis + 1 the upper one."""
    occupied = np.pad(labels != 0, 1)
    inner = occupied[1:-1, 1:-1, 1:-1]
    found = []
    for axis in range(3):
        for step in (-1, 1):
            found.append(np.argwhere(inner & ~np.roll(occupied, -step, axis)[1:-1, 1:-1, 1:-1]))
    return np.concatenate(found), np.repeat(np.arange(6), [len(part) for part in found])


def _merged(labels: np.ndarray, voxels: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join faces of one label, side and plane to strips, and equal strips side by side to rectangles.

    Return the lowest voxel [F, 3], the size along the two other axes [F, 2], and the side [F].
    """
    other = np.array([[1, 2], [0, 2], [0, 1]])[sides // 2]  # [F, 2]: the axes u and v that a face lies in
    rows = np.arange(len(voxels))
    u, v, depth = voxels[rows, other[:, 0]], voxels[rows, other[:, 1]], voxels[rows, sides // 2]
    label = labels[tuple(voxels.T)]

    order = np.lexsort((v, u, depth, sides))
    keys = np.stack([sides, depth, u, label.astype(np.int64)], 1)[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (keys[1:] != keys[:-1]).any(1) | (np.diff(v[order]) != 1)
    first = np.flatnonzero(starts)
    length = np.diff(np.append(first, len(order)))
    strips = order[first]  # the lowest face of each strip along v

    order = np.lexsort((u[strips], length, v[strips], label[strips], depth[strips], sides[strips]))
    strips, length = strips[order], length[order]
    keys = np.stack([sides[strips], depth[strips], label[strips].astype(np.int64), v[strips], length], 1)
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (keys[1:] != keys[:-1]).any(1) | (np.diff(u[strips]) != 1)
    first = np.flatnonzero(starts)
    width = np.diff(np.append(first, len(order)))
    lowest = strips[first]
    return voxels[lowest], np.stack([width, length[first]], 1), sides[lowest]


def _halved(labels: np.ndarray) -> np.ndarray:
    """Return the largest label of each 2³ block; an odd edge is padded with empty voxels."""
    labels = np.pad(labels, [(0, len(labels) % 2)] * 3)
    half = len(labels) // 2
    return labels.reshape(half, 2, half, 2, half, 2).max(axis=(1, 3, 5))


def _triangles(low: np.ndarray, size: np.ndarray, sides: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shared corners and triangles of rectangles; `points` is the number of corners along an axis."""
    axis = sides // 2
    other = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    rows = np.arange(len(low))
    origin = low.copy()
    origin[rows, axis] += sides % 2
    u, v = np.zeros_like(low), np.zeros_like(low)
    u[rows, other[:, 0]], v[rows, other[:, 1]] = size[:, 0], size[:, 1]
    corners = np.stack([origin, origin + u, origin + u + v, origin + v], 1)  # [F, 4, 3]
    flat = np.ravel_multi_index(tuple(corners.reshape(-1, 3).T), (points,) * 3)
    used, index = np.unique(flat, return_inverse=True)
    index = index.reshape(-1, 4).astype(np.int32)
    triangles = index[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    return np.stack(np.unravel_index(used, (points,) * 3), 1), triangles


def _shade(occupied: np.ndarray, voxels: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return the brightness of each face, [F]; see `grids.shading`. The look of grids/preview.py, from all sides."""
    if not len(voxels):
        return np.zeros(0)
    normal = np.zeros(voxels.shape, dtype=np.int64)
    normal[np.arange(len(voxels)), sides // 2] = sides % 2 * 2 - 1
    slope, hollow = slope_and_hollow(occupied, voxels, normal)
    mixed = slope + 1.3 * normal
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    light = mixed @ LIGHT / np.linalg.norm(LIGHT)
    return (0.74 + 0.42 * light) * (1 - 0.4 * hollow)
