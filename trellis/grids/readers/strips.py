"""Strips and fans of triangles to triangles, many at once."""

import numpy as np


def split_strips(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the triangles of strips, [F, 3] int64 in their winding: every second one is turned.

    corners: [C] int64, the vertices of all strips, one strip after the other.
    sizes: [P] int64, the corners of each strip, in sum C.
    Triangles that use a vertex twice are left out: they join parts of a strip, and would be lines across a gap.
    """
    first, step = _steps(sizes)
    odd = step % 2
    faces = corners[np.stack([first + step + odd, first + step + 1 - odd, first + step + 2], axis=1)]
    return _proper(faces)


def split_fans(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the triangles of fans, [F, 3] int64: each has the first vertex of its fan. Arguments as `split_strips`."""
    first, step = _steps(sizes)
    return _proper(corners[np.stack([first, first + step + 1, first + step + 2], axis=1)])


def _steps(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each triangle where its strip begins among the corners, and its number in the strip."""
    counts = np.maximum(sizes - 2, 0)
    strip = np.repeat(np.arange(len(sizes)), counts)
    step = np.arange(len(strip)) - (np.cumsum(counts) - counts)[strip]
    return (np.cumsum(sizes) - sizes)[strip], step


def _proper(faces: np.ndarray) -> np.ndarray:
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]
