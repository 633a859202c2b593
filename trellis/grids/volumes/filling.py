"""From the surface of an organ to all of it, also where the surface has holes, as one that a decoder made may have."""

import numpy as np

from .volume import require

CLOSED_BY = (1, 2)  # cells; the surface is thickened by so much on each side, so holes up to four cells wide close
SEARCHED_BY = (3, 4, 6, 8)  # cells; what only these close may be an opening of the organ, so it is told, not filled
NEARLY_ALL = 0.95  # of what the largest of CLOSED_BY fills; a smaller one that gives it has rounded less
LEAST_WALL = 0.8  # of a cavity's border that must be surface; between the branches of a vessel less is


def fill_surface(grid: np.ndarray) -> tuple[np.ndarray, bool]:
    """Fill the inside of a surface, closing holes up to four cells wide.

    grid: [R, R, R] bool.
    Cavities that the surface encloses are filled first. Then those that it encloses once it is thickened by one cell,
    or by two if that fills more, and at least four fifths of whose border are surface: the space between the branches
    of a vessel, or within a ring, has less and stays empty.
    Return the filled grid, and whether the surface is closed. It is not if it encloses more once it is thickened
    further, by up to eight cells: it has an opening of five to sixteen cells. Larger ones are not found.
    """
    margin = SEARCHED_BY[-1] + 2  # so that the outside goes around it
    surface = np.pad(np.asarray(grid, dtype=bool), margin)
    filled = require("scipy.ndimage").binary_fill_holes(surface)
    distance = require("scipy.ndimage").distance_transform_edt(~filled)
    cavities = [_cavities(filled, distance, reach) for reach in CLOSED_BY]
    enough = NEARLY_ALL * np.count_nonzero(cavities[-1])
    whole = filled | next(found for found in cavities if np.count_nonzero(found) >= enough)
    most = (1 - NEARLY_ALL) * np.count_nonzero(whole)
    closed = all(np.count_nonzero(_cavities(filled, distance, reach) & ~whole) <= most for reach in SEARCHED_BY)
    return whole[(slice(margin, -margin),) * 3], closed


def _cavities(solid: np.ndarray, distance: np.ndarray, reach: int) -> np.ndarray:
    """Return the cells of the cavities that a grid encloses once it is thickened by `reach` cells.

    solid: bool, empty at its border.
    distance: of each cell from the grid's cells.
    """
    ndimage = require("scipy.ndimage")
    free, number = ndimage.label(distance > reach)
    found = np.zeros_like(solid)
    if number < 2:
        return found
    outside = free == free[0, 0, 0]
    cores = (free > 0) & ~outside
    # A core is as far from the grid as it was thickened: take what lies between, but not what is outside of a hole.
    behind = (ndimage.distance_transform_edt(~outside) > reach) & ~solid
    behind &= ndimage.distance_transform_edt(~cores) <= 2 * reach
    parts, _ = ndimage.label(behind)
    boxes = ndimage.find_objects(parts)
    for part in np.unique(parts[cores]):
        box = tuple(slice(side.start - 1, side.stop + 1) for side in boxes[part - 1])
        cavity = parts[box] == part
        border = ndimage.binary_dilation(cavity) & ~cavity
        if np.count_nonzero(border & solid[box]) >= LEAST_WALL * np.count_nonzero(border):
            found[box] |= cavity
    return found
