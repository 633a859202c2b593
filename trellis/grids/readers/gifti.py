"""GIfTI surfaces (.gii), by nibabel. Format: GIfTI 1.0 (nitrc.org/projects/gifti).

Coordinates stay in the space of the point set; the coordinate systems that a file lists are other spaces. All of them
are RAS (x to the right, y to the front, z up).
"""

from pathlib import Path
from typing import Any

import numpy as np

from ...utils.errors import ConfigError, DataError
from ..geometry import Geometry

POINTS, TRIANGLES = "NIFTI_INTENT_POINTSET", "NIFTI_INTENT_TRIANGLE"


def read(path: Path) -> Geometry:
    """Read the triangles of a surface, or its points if it has no triangles; see `Geometry`.

    Raise DataError with the reason if the file is damaged or has only data on a surface, ConfigError if nibabel is
    missing.
    """
    try:
        from nibabel.gifti import GiftiImage
        from nibabel.nifti1 import intent_codes
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install nibabel") from error
    content = path.read_bytes()
    if b"<!ENTITY" in content[:65536]:
        raise DataError("declares XML entities, which are not expanded: replace them by their text")
    try:
        arrays: list[Any] = GiftiImage.from_bytes(content).darrays
        intents = [str(intent_codes.niistring[array.intent]) for array in arrays]
    except Exception as error:  # nibabel raises anything on damaged files; it becomes the recorded reason
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read ({type(error).__name__}: {reason})") from error

    points = [array.data for array, intent in zip(arrays, intents, strict=True) if intent == POINTS]
    triangles = [array.data for array, intent in zip(arrays, intents, strict=True) if intent == TRIANGLES]
    if not points:
        kinds = "triangles" if triangles else f"data ({', '.join(sorted(set(intents))[:3]) or 'no arrays'})"
        raise DataError(f"has no points of a surface, only {kinds}: give the file that has them, such as .surf.gii")
    if triangles and len(triangles) != len(points):
        raise DataError(f"has {len(points)} sets of points and {len(triangles)} of triangles, which do not pair")
    for array, what in (*((array, "points") for array in points), *((array, "triangles") for array in triangles)):
        if array is None or array.ndim != 2 or array.shape[1] != 3:
            shape = "no data" if array is None else f"an array of {list(array.shape)}"
            raise DataError(f"its {what} are {shape}, not [N, 3]: the file is damaged")
    faces = [np.zeros((0, 3), dtype=np.int64)]
    start = 0
    for vertices, corners in zip(points, triangles, strict=bool(triangles)):
        if corners.dtype.kind not in "iu" or (corners.size and not 0 <= corners.min() <= corners.max() < len(vertices)):
            raise DataError(f"its triangles use points {corners.min()} to {corners.max()} of {len(vertices)}")
        faces.append(corners.astype(np.int64) + start)
        start += len(vertices)
    return Geometry(np.concatenate(points), np.concatenate(faces), "z")
