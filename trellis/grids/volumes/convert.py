"""From a file with a label map or an occupancy array to the grids of its objects."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .arrays import ARRAY_SUFFIXES, read_occupancy, turn_mask_to_z_up
from .labels import Labels, LeftOut, objects_of
from .rasterize import Frame, rasterize_object, rasterize_occupancy, stray_note
from .reading import read_volume, volume_suffix


class ObjectGrid(NamedTuple):
    """The grid of an object.

    name: of its label, group or component; "" for an array of occupancy, which is one object.
    labels: the object's labels in the file.
    voxels: [N, 3] int64 in [0, resolution), N >= 1, sorted by x, then y, then z.
    frame: where it lies in the scan; None for an array, which has none.
    notes: those of the file and of the object, each a sentence without a full stop.
    """

    name: str
    labels: tuple[int, ...]
    voxels: np.ndarray
    frame: Frame | None
    notes: tuple[str, ...]


def grids_of_file(
    path: Path,
    resolution: int,
    labels: Labels | None = None,
    components: bool = False,
    fill: str = "surface",
    y_up: bool = False,
) -> Iterator[ObjectGrid | LeftOut]:
    """Yield the grid of each object of a file, or why it is left out.

    labels: see `objects_of`. With them, or with components, an array is a label map; else it is occupancy.
    fill: "surface" or "solid", see `rasterize_mask`.
    y_up: turn an array from y-up to z-up. Scans say themselves how they lie.
    Raise DataError with the reason, which does not name the file, ConfigError for a missing package.
    """
    is_array = volume_suffix(path) in ARRAY_SUFFIXES
    if is_array and labels is None and not components:
        mask = read_occupancy(path)
        yield ObjectGrid(
            "", (), rasterize_occupancy(turn_mask_to_z_up(mask) if y_up else mask, resolution, fill), None, ()
        )
        return
    volume = read_volume(path)
    if is_array and y_up:
        volume = volume._replace(layers=tuple(map(turn_mask_to_z_up, volume.layers)))
    for item in objects_of(volume, labels, components, path.name[: -len(volume_suffix(path))]):
        if isinstance(item, LeftOut):
            yield item
        else:
            voxels, frame = rasterize_object(item, resolution, fill)
            stray = () if components else stray_note(item, voxels, frame, resolution)
            notes = (*volume.notes, *item.notes, *stray)
            yield ObjectGrid(item.name, item.labels, voxels, None if is_array else frame, notes)
