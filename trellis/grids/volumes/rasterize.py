"""From an organ's voxels to the grid, and back into the scan's space.

The cube of the grid is z-up: x to the patient's right, y to the front, z up, as the world axes of the scan, so no axis
is mirrored. It is centered on the box of the organ's voxels in world axes (their corners, not their centers), and the
longest edge of that box fills it, as for meshes.
"""

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ...utils.errors import ConfigError, DataError
from ...utils.files import atomic_write
from .filling import fill_surface
from .labels import MIN_VOXELS, LabelObject
from .volume import MAX_VOXELS, check_affine, require

Fill = Literal["surface", "solid"]
FILLS = ("surface", "solid")
MUCH_SMALLER = 0.9  # of a box's longest edge; if it shrinks to less without stray voxels, they are told
BORDER = 1e-9  # voxels or cells; a coordinate this near below a border counts as on it, however it was rounded


class Frame(NamedTuple):
    """Where a grid lies in the scan that it comes from.

    center: [3] mm, of the cube, in the world axes of `affine`.
    mm_per_cell: edge of a cell of the grid.
    fill: whether the grid holds the organ's surface or all of it.
    affine, shape: those of the scan, see `Volume`.
    """

    center: tuple[float, ...]
    mm_per_cell: float
    fill: str
    affine: np.ndarray
    shape: tuple[int, ...]

    def to_json(self) -> str:
        """Return the frame as one line of JSON."""
        values = {**self._asdict(), "affine": self.affine.tolist()}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Frame":
        """Undo `to_json`. Raise DataError if it is not a frame."""
        try:
            values = json.loads(text)
            affine = np.array(values["affine"], dtype=np.float64).reshape(4, 4)
            center, edge = tuple(float(value) for value in values["center"]), float(values["mm_per_cell"])
            shape, fill = tuple(int(size) for size in values["shape"]), values["fill"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"the frame {text[:60]!r} cannot be read ({type(error).__name__}: {error})") from error
        good = len(center) == len(shape) == 3 and np.isfinite(center).all() and 0 < edge < np.inf and fill in FILLS
        if not good or min(shape) < 1 or np.prod(shape, dtype=object) > MAX_VOXELS:
            raise DataError(f"the frame {text[:200]} has a value out of range")
        return cls(center, edge, fill, check_affine(affine), shape)


def rasterize_mask(
    mask: np.ndarray, affine: np.ndarray, resolution: int, fill: str = "surface"
) -> tuple[np.ndarray, Frame]:
    """Turn the voxels of an organ into a grid.

    mask: [X, Y, Z] bool, voxels of a scan.
    affine: [4, 4], from voxel indices to mm, x to the right, y to the front, z up.
    fill: "solid" takes every cell whose center lies in a voxel of the organ, and every cell in which the center of such
        a voxel lies, so that thin parts stay where cells are larger than voxels. "surface" takes those of them that
        have an empty cell on one of six sides: a surface of one cell.
    Return voxels [N, 3] int64 in [0, resolution), N >= 1, sorted by x, then y, then z, and the frame.
    Raise DataError for an empty mask or a singular affine, ConfigError for another fill.
    """
    if fill not in FILLS:
        raise ConfigError(f"fill {fill!r}: must be one of {', '.join(FILLS)}.")
    affine = check_affine(affine)
    filled = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not len(filled[0]):
        raise DataError("has no voxels: the mask is empty")
    crop = tuple(slice(int(found[0]), int(found[-1]) + 1) for found in filled)
    organ, steps, middle = _upright(mask[crop], affine[:3, :3])
    # From here on nothing depends on how the scan is stored: not on the order of its axes, nor on their directions.
    low, high = _world_box(organ, steps)
    edge = float((high - low).max()) / resolution
    center = (low + high) / 2  # mm from the middle of the crop
    solid = _cells_in_voxels(organ, steps, center, edge, resolution)
    _mark_voxels(solid, organ, steps, center, edge)
    grid = solid & ~_interior(solid) if fill == "surface" else solid
    origin = affine[:3, :3] @ ([part.start for part in crop] + middle) + affine[:3, 3]
    frame = Frame(tuple((origin + center).tolist()), edge, fill, affine, mask.shape)
    return np.argwhere(grid), frame


def rasterize_object(item: LabelObject, resolution: int, fill: str = "surface") -> tuple[np.ndarray, Frame]:
    """Turn an object of a scan into a grid: `rasterize_mask`, with the frame of the whole scan."""
    affine = item.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ item.offset
    voxels, frame = rasterize_mask(item.mask, affine, resolution, fill)
    return voxels, frame._replace(affine=item.affine, shape=item.shape)


def stray_note(item: LabelObject, voxels: np.ndarray, frame: Frame, resolution: int) -> tuple[str, ...]:
    """Return a note if a few voxels far from an object make its cells much larger, else nothing.

    Stray are the components (26 neighbors) of fewer than MIN_VOXELS voxels.
    voxels, frame: of its grid, see `rasterize_object`.
    """
    ndimage, near = require("scipy.ndimage"), np.ones((3, 3, 3))
    grid = np.zeros((resolution,) * 3, dtype=bool)
    grid[tuple(voxels.T)] = True
    if ndimage.label(grid, near)[1] == 1:  # nothing is far, and counting in the scan takes long
        return ()
    parts, _ = ndimage.label(item.mask, near)
    stray = np.bincount(parts.ravel()) < MIN_VOXELS
    stray[0] = True
    kept = ~stray[parts]
    if stray.all():
        return ()
    low, high = _world_box(*_upright(kept, frame.affine[:3, :3])[:2])
    edge = float((high - low).max()) / resolution
    if edge >= MUCH_SMALLER * frame.mm_per_cell:
        return ()
    number = np.count_nonzero(item.mask) - np.count_nonzero(kept)
    return (
        f"has {number} stray {'voxel that makes' if number == 1 else 'voxels that make'} its cells "
        f"{frame.mm_per_cell:.3g} mm instead of {edge:.3g}: --components leaves "
        f"{'it' if number == 1 else 'them'} out",
    )


def rasterize_occupancy(mask: np.ndarray, resolution: int, fill: str = "surface") -> np.ndarray:
    """Turn an array of occupied voxels without a scan into a grid, see `rasterize_mask`.

    An array [resolution]*3 is a grid already: it keeps its place and size.
    Return voxels [N, 3] int64, sorted.
    """
    if mask.shape != (resolution,) * 3:
        return rasterize_mask(mask, np.eye(4), resolution, fill)[0]
    if not mask.any():
        raise DataError("has no occupied voxel")
    return np.argwhere(mask & ~_interior(mask) if fill == "surface" else mask)


def _upright(mask: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a mask with its axes reordered and turned as near to x, y and z as they go, and their steps.

    Return too the middle of the mask as it was, in voxels. It is 0 in what the other functions here call mm.
    """
    lengths = np.linalg.norm(steps, axis=0)

    def nearness(order: tuple[int, ...]) -> tuple:
        turned = steps[:, order]
        near = [abs(turned[world, world]) / lengths[axis] for world, axis in enumerate(order)]
        return sum(near), *(turned * np.sign(np.diag(turned) + (np.diag(turned) == 0))).ravel()

    order = max(itertools.permutations(range(3)), key=nearness)
    middle = (np.array(mask.shape) - 1) / 2
    mask, steps = mask.transpose(order), steps[:, order]
    for axis in range(3):
        if steps[axis, axis] < 0:
            mask, steps = np.flip(mask, axis), steps * np.where(np.arange(3) == axis, -1, 1)
    return np.ascontiguousarray(mask), steps, middle


def _world_box(mask: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest coordinates [3] of the corners of a mask's voxels, mm from its middle."""
    # Along a row of voxels a coordinate is linear, so the ends of the rows suffice.
    rows = np.argwhere(mask.any(axis=2))
    ends = mask[rows[:, 0], rows[:, 1]]
    first, last = ends.argmax(axis=1), mask.shape[2] - 1 - ends[:, ::-1].argmax(axis=1)
    indices = np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])
    centers = _to_world(indices, mask.shape, steps)
    half = np.abs(steps).sum(axis=1) / 2  # of the box around one voxel
    return centers.min(axis=0) - half, centers.max(axis=0) + half


def _to_world(indices: np.ndarray, shape: tuple[int, ...], steps: np.ndarray) -> np.ndarray:
    """Return the centers [N, 3] of voxels [N, 3], mm from the middle of the mask."""
    places = indices - (np.array(shape) - 1) / 2
    # Not a matrix product: its order of summation, and so its rounding, depends on N.
    return places[:, :1] * steps[:, 0] + places[:, 1:2] * steps[:, 1] + places[:, 2:] * steps[:, 2]


def _cells_in_voxels(
    mask: np.ndarray, steps: np.ndarray, center: np.ndarray, edge: float, resolution: int
) -> np.ndarray:
    """Return the cells [R, R, R] bool whose centers lie in a voxel of the mask."""
    grid = np.zeros((resolution,) * 3, dtype=bool)
    offsets = (np.arange(resolution) - (resolution - 1) / 2) * edge  # of cell centers from the cube's, mm
    inverse = np.linalg.inv(steps)
    start = inverse @ center + np.array(mask.shape) / 2 + BORDER  # the corner of voxel 0 is 0
    for i, x in enumerate(offsets):
        inside = np.ones((resolution, resolution), dtype=bool)
        found = []
        for axis, size in enumerate(mask.shape):
            along = start[axis] + inverse[axis, 0] * x
            index = np.floor(along + inverse[axis, 1] * offsets[:, None] + inverse[axis, 2] * offsets).astype(np.int64)
            inside &= (index >= 0) & (index < size)
            found.append(index.clip(0, size - 1))
        grid[i] = mask[tuple(found)] & inside
    return grid


def _mark_voxels(grid: np.ndarray, mask: np.ndarray, steps: np.ndarray, center: np.ndarray, edge: float) -> None:
    """Mark the cells in which the centers of the mask's voxels lie."""
    resolution = len(grid)
    for i, part in enumerate(mask):  # in parts: coordinates take 24 bytes a voxel
        voxels = np.argwhere(part)
        indices = np.column_stack([np.full(len(voxels), i), voxels])
        cells = (_to_world(indices, mask.shape, steps) - center) / edge + resolution / 2 + BORDER
        grid[tuple(cells.astype(np.int64).T)] = True  # all lie half a voxel inside the cube


def _interior(grid: np.ndarray) -> np.ndarray:
    """Return the cells whose six neighbors are occupied. Outside the cube is empty."""
    padded = np.pad(grid, 1)
    inner = padded[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for shift in (-1, 1):
            inner &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
    return inner


def write_nifti(path: str | os.PathLike, grid: Any, frame: Frame) -> bool:
    """Write a grid as a NIfTI label map in the space of its scan, 1 where the organ is, atomically.

    path: ends in .nii or .nii.gz.
    grid: [R, R, R], occupied where not zero.
    A voxel of the scan gets the value of the cell in which its center lies. If the frame says that the grid is a
    surface, it is filled first, see `fill_surface`: cavities of the organ itself are filled with it, and behind an
    opening of more than four cells it stays hollow.
    Return whether the surface is closed; True for a solid.
    Raise ConfigError for another suffix or if a package is missing.
    """
    path, nibabel = Path(path), require("nibabel")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{path}: a label map is written as .nii or .nii.gz. Name the file so.")
    grid, closed = np.asarray(grid) != 0, True
    if frame.fill == "surface":
        grid, closed = fill_surface(grid)
    resolution, half = len(grid), len(grid) * frame.mm_per_cell / 2
    steps, origin = frame.affine[:3, :3], frame.affine[:3, 3]
    corners = np.array(list(itertools.product((-half, half), repeat=3))) + frame.center
    indices = (corners - origin) @ np.linalg.inv(steps).T
    first = np.maximum(np.ceil(indices.min(axis=0)), 0).astype(int)
    stop = np.minimum(np.floor(indices.max(axis=0)) + 1, frame.shape).astype(int)
    labels = np.zeros(frame.shape, dtype=np.uint8, order="F")
    j, k = np.arange(first[1], stop[1])[:, None, None], np.arange(first[2], stop[2])[:, None]
    for i in range(first[0], stop[0]):
        world = steps[:, 0] * i + steps[:, 1] * j + steps[:, 2] * k + origin  # [J, K, 3]
        cells = np.floor((world - frame.center) / frame.mm_per_cell + resolution / 2 + BORDER).astype(np.int64)
        inside = ((cells >= 0) & (cells < resolution)).all(axis=-1)
        cells = cells.clip(0, resolution - 1)
        labels[i, first[1] : stop[1], first[2] : stop[2]] = grid[tuple(np.moveaxis(cells, -1, 0))] & inside
    image = nibabel.Nifti1Image(labels, frame.affine)
    image.header.set_xyzt_units("mm")
    packed = path.name.lower().endswith(".gz")
    with atomic_write(path) as partial:
        content = image.to_bytes()
        if packed:
            content = gzip.compress(content, compresslevel=6, mtime=0)  # the same bytes for the same grid
        partial.write_bytes(content)
    return closed
