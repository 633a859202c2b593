"""The outer faces of voxels as triangles, few enough for a browser.

Axes: R cells along an axis, F faces (squares or, merged, rectangles), V corners.
"""

from typing import NamedTuple

import numpy as np

# A face takes two triangles. Above the first number equal neighbours are merged, above the second the grid is halved.
SHADED_FACES, MOST_FACES = 40_000, 50_000
LIGHT = np.array([0.35, -0.55, 0.76])  # from the first camera's upper left, so that top, left and right differ


class Faces(NamedTuple):
    """corners: [V, 3] int, in cells of the given grid, in [0, R]. triangles: [2F, 3] int32 into corners. shade: [2F]
    float32, brightness of each triangle, about 0.4 to 1.2. labels: [2F] uint8, the label of the cell it belongs to.
    coarser: edge of the cells that were drawn, 1 unless the grid had to be halved."""

    corners: np.ndarray
    triangles: np.ndarray
    shade: np.ndarray
    labels: np.ndarray
    coarser: int


def outer_faces(labels: np.ndarray) -> Faces:
    """The faces of cells that have no neighbour on that side.

    labels: [R, R, R], occupied where non-zero; whole numbers below 256. Up to SHADED_FACES faces are kept single, with
    a shading that shows form; more are merged to rectangles of one label, shaded by direction; where more than
    MOST_FACES are left even so, blocks of 2³ cells are drawn as one with their largest label.
    Raises ValueError for another shape.
    """
    labels = np.asarray(labels)
    if labels.ndim != 3 or len(set(labels.shape)) != 1:
        raise ValueError(f"labels must be [R, R, R], not {list(labels.shape)}")
    labels, coarser = labels.astype(np.uint8), 1
    while True:
        cells, sides = _exposed(labels)
        if len(cells) <= SHADED_FACES:
            low, size = cells, np.ones((len(cells), 2), dtype=np.int64)
            shade = _shade(labels != 0, cells, sides)
            break
        low, size, sides = _merged(labels, cells, sides)
        if len(low) <= MOST_FACES:
            axis, sign = sides // 2, sides % 2 * 2 - 1
            shade = 0.72 + 0.35 * sign * LIGHT[axis]
            break
        labels, coarser = _halved(labels), 2 * coarser
    corners, triangles = _triangles(low, size, sides, len(labels) + 1)
    shade, own = shade.astype(np.float32).repeat(2), labels[tuple(low.T)].repeat(2)
    return Faces(corners * coarser, triangles, shade, own, coarser)


def _exposed(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell [F, 3] and side [F] of each outer face. Sides: 2·axis for the lower one, 2·axis + 1 for the upper one."""
    occupied = np.pad(labels != 0, 1)
    inner = occupied[1:-1, 1:-1, 1:-1]
    found = []
    for axis in range(3):
        for step in (-1, 1):
            found.append(np.argwhere(inner & ~np.roll(occupied, -step, axis)[1:-1, 1:-1, 1:-1]))
    return np.concatenate(found), np.repeat(np.arange(6), [len(part) for part in found])


def _merged(labels: np.ndarray, cells: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join faces of one label, side and plane to strips, and equal strips side by side to rectangles.

    Returns the lowest cell [F, 3], the size along the two other axes [F, 2], and the side [F].
    """
    other = np.array([[1, 2], [0, 2], [0, 1]])[sides // 2]  # [F, 2]: the axes u and v that a face lies in
    rows = np.arange(len(cells))
    u, v, depth = cells[rows, other[:, 0]], cells[rows, other[:, 1]], cells[rows, sides // 2]
    label = labels[tuple(cells.T)]

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
    return cells[lowest], np.stack([width, length[first]], 1), sides[lowest]


def _halved(labels: np.ndarray) -> np.ndarray:
    """The largest label of each 2³ block; an odd edge is padded with empty cells."""
    labels = np.pad(labels, [(0, len(labels) % 2)] * 3)
    half = len(labels) // 2
    return labels.reshape(half, 2, half, 2, half, 2).max(axis=(1, 3, 5))


def _triangles(low: np.ndarray, size: np.ndarray, sides: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners and triangles of rectangles, corners shared; `points` along an axis of the lattice of corners."""
    axis = sides // 2
    other = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    rows = np.arange(len(low))
    origin = low.copy()
    origin[rows, axis] += sides % 2
    u, v = np.zeros_like(low), np.zeros_like(low)
    u[rows, other[:, 0]], v[rows, other[:, 1]] = size[:, 0], size[:, 1]
    corners = np.stack([origin, origin + u, origin + u + v, origin + v], 1)  # [F, 4, 3]
    places = np.ravel_multi_index(tuple(corners.reshape(-1, 3).T), (points,) * 3)
    used, index = np.unique(places, return_inverse=True)
    index = index.reshape(-1, 4).astype(np.int32)
    triangles = index[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    return np.stack(np.unravel_index(used, (points,) * 3), 1), triangles


def _shade(occupied: np.ndarray, cells: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Brightness of each face, [F]: light on a mix of its own normal, which shows cells, and of the blurred grid's
    slope, which shows form; darker in hollows. The look of grids/preview.py, from all sides."""
    if not len(cells):
        return np.zeros(0)
    margin = 4
    padded = np.pad(occupied, margin).astype(np.float32)
    near = _blurred(_blurred(padded, 1), 1)
    far = _blurred(near, 3)
    normal = np.zeros(cells.shape)
    normal[np.arange(len(cells)), sides // 2] = sides % 2 * 2 - 1
    front = cells + normal.astype(np.int64) + margin
    slope = np.stack(
        [near[tuple((front - step).T)] - near[tuple((front + step).T)] for step in np.eye(3, dtype=np.int64)], axis=1
    )
    slope /= np.linalg.norm(slope, axis=1, keepdims=True) + 1e-3
    mixed = slope + 1.3 * normal
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    light = mixed @ LIGHT / np.linalg.norm(LIGHT)
    hollow = np.clip((far[tuple(front.T)] - 0.16) / 0.35, 0, 1)
    return (0.74 + 0.42 * light) * (1 - 0.4 * hollow)


def _blurred(values: np.ndarray, radius: int) -> np.ndarray:
    """Box blur along each axis; the ends wrap around, into the margin."""
    for axis in range(3):
        total = values.copy()
        for shift in range(1, radius + 1):
            total += np.roll(values, shift, axis) + np.roll(values, -shift, axis)
        values = total / (2 * radius + 1)
    return values
