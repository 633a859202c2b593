"""What shading of voxel faces is made of: the slope of the surface around a face, and how deep it lies in a hollow.

A face's own normal shows voxels; the slope of the blurred grid shows form.
"""

import numpy as np

MARGIN = 6  # voxels around the grid: the reach of both blurs, and the voxel in front of a face


def slope_and_hollow(occupied: np.ndarray, voxels: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slope of the blurred grid before each face, and how hollow it is there.

    occupied: [R, R, R] bool.
    voxels: [F, 3] int, the voxel of each face.
    normals: [F, 3] int, its outward normal.
    Return slope [F, 3] float32, which points outwards and has length 1, or 0 in the absence of a slope; and hollow [F]
    float32 in [0, 1], large if much of the grid lies before the face.
    """
    padded = np.pad(occupied, MARGIN).astype(np.float32)
    near = _blur(padded, 1, 2)
    far = _blur(near, 3, 1)
    front = voxels + normals + MARGIN
    slope = np.stack(
        [near[tuple((front - axis).T)] - near[tuple((front + axis).T)] for axis in np.eye(3, dtype=int)], axis=1
    )
    slope /= np.linalg.norm(slope, axis=1, keepdims=True) + 1e-3
    return slope, np.clip((far[tuple(front.T)] - 0.16) / 0.35, 0, 1)


def _blur(values: np.ndarray, radius: int, times: int) -> np.ndarray:
    """Blur with a box along each axis; the ends wrap around, into the margin."""
    for axis in range(3):
        for _ in range(times):
            total = values.copy()
            for shift in range(1, radius + 1):
                total += np.roll(values, shift, axis) + np.roll(values, -shift, axis)
            values = total / (2 * radius + 1)
    return values
