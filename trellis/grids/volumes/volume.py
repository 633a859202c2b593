"""A scan's labels in memory, and the checks that all its readers share."""

import errno
import gzip
import importlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ...utils.errors import ConfigError, DataError

WHOLE = 1e-3  # a float this near to a whole number is that label
MAX_VOXELS = 2**31  # 1290^3; more does not fit the memory of a worker
DEFLATE_RATIO = 1032  # the most that zlib and gzip compress by (https://zlib.net/zlib_tech.html)
FLATTEST = 1e-6  # volume of a voxel / that of a box with its edges; below it the axes do not span space
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
UNITS = {
    "": 1.0,
    "mm": 1.0,
    "millimeter": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "m": 1000.0,
    "meter": 1000.0,
    "um": 1e-3,
    "µm": 1e-3,
    "micron": 1e-3,
    "micrometer": 1e-3,
}  # in mm; "" if none is said


class Volume(NamedTuple):
    """The labels of a scan.

    layers: arrays [X, Y, Z] of integers, 0 for the background. There are several only where segments overlap; a label
        is in one layer.
    affine: [4, 4] float64, from voxel indices (at voxel centers) to millimeters, x to the right, y to the front, z up.
    names: {label: name} for the labels that the file names.
    notes: what a user should know of this file, each a sentence without a full stop.
    has_segments: whether each name is a segment of the file, and not one of a table of all that a scan could have.
    """

    layers: tuple[np.ndarray, ...]
    affine: np.ndarray
    names: dict[int, str]
    notes: tuple[str, ...] = ()
    has_segments: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The scan's voxels along its axes."""
        return self.layers[0].shape


def require(name: str) -> ModuleType:
    """Return a module of an optional package. Raise ConfigError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"nrrd": "pynrrd"}.get(name.partition(".")[0], name.partition(".")[0])
        raise ConfigError(f"a Python package is missing ({error}): pip install {package}") from error


@contextmanager
def reasons() -> Iterator[None]:
    """Turn what parsers raise on damaged files into a DataError. Errors of the system and of memory pass."""
    try:
        yield
    except (ConfigError, DataError, MemoryError):
        raise
    except Exception as error:  # parsers raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to a false place
            raise
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            raise DataError(f"is truncated or damaged: its compressed voxels cannot be unpacked ({error})") from error
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read ({type(error).__name__}: {reason})") from error


def check_size(shape: tuple[int, ...], itemsize: int, available: int) -> None:
    """Raise DataError if a header claims more voxels than its data can have, or than memory holds.

    available: the most bytes that the data can be, unpacked.
    """
    voxels = int(np.prod([int(size) for size in shape], dtype=object))
    if min(shape, default=0) < 1:
        raise DataError(f"has the shape {times(shape)}: there is no voxel")
    if voxels > MAX_VOXELS:
        raise DataError(f"has {voxels} voxels, more than {MAX_VOXELS}. Crop it to the organs, or resample it")
    if voxels * itemsize > available:
        raise DataError(
            f"is truncated or damaged: its header promises {voxels * itemsize} bytes of voxels, and at most "
            f"{available} are there"
        )


def as_volume_shape(array: np.ndarray) -> np.ndarray:
    """Return an array [X, Y, Z, 1, …] without the last axes of one. Raise DataError for another shape."""
    array = np.asarray(array)
    if array.ndim > 3 and set(array.shape[3:]) == {1}:
        array = array.reshape(array.shape[:3], order="A")
    if array.ndim != 3:
        raise DataError(
            f"has the shape {times(array.shape)}: a label map has one number for each voxel of three axes. Write each "
            "channel or time as a file of its own"
        )
    return array


def as_labels(array: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """Return array * slope + intercept as integers, in the same order of axes.

    array: [X, Y, Z], of any type.
    Raise DataError naming the first voxel that is not within 1e-3 of a whole number, or the type if it is no number.
    """
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    if array.dtype.kind not in "iuf":
        kind = "RGB colors" if array.dtype.names else "complex numbers" if array.dtype.kind == "c" else "no numbers"
        raise DataError(f"its voxels are {kind}: a label map has whole numbers")
    if array.dtype.kind in "iu" and (slope, intercept) == (1, 0):
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    labels = np.empty(array.shape, np.int32, order="F" if array.flags.f_contiguous else "C")
    # Slice by slice along the slowest axis: a copy of all in float64 would be eight times the labels.
    axis = 2 if array.flags.f_contiguous else 0
    for place, (part, target) in enumerate(zip(np.moveaxis(array, axis, 0), np.moveaxis(labels, axis, 0), strict=True)):
        values = part.astype(np.float64) * slope + intercept
        whole = np.rint(values)
        with np.errstate(invalid="ignore"):
            good = (np.abs(values - whole) <= WHOLE) & (np.abs(whole) < 2**31)  # false for NaN too
        if not good.all():
            index = list(np.argwhere(~good)[0])
            value = values[tuple(index)]
            index.insert(axis, place)
            raise DataError(
                f"voxel ({', '.join(str(int(i)) for i in index)}) is {value:g}, not a whole number: this is an image "
                "or a map of probabilities, not a label map. Threshold it or take the most probable label"
            )
        target[...] = whole
    return labels


def check_affine(affine: np.ndarray) -> np.ndarray:
    """Return an affine [4, 4] as float64. Raise DataError if it is not finite or its axes do not span space."""
    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise DataError(f"its affine is not finite: {affine[:3].tolist()}")
    if is_singular(affine):
        raise DataError(f"its axes do not span space (singular affine): {affine[:3].tolist()}")
    return affine


def is_singular(affine: np.ndarray) -> bool:
    """Return whether the axes of an affine [4, 4] lie in a plane, or one has no length."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < FLATTEST


def affine_of(directions: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return the affine [4, 4] whose columns are the steps along the axes, directions [3, 3], and the origin [3]."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions, origin
    return affine


def unit_in_mm(unit: str) -> tuple[float, tuple[str, ...]]:
    """Return the length of a unit of length in mm, and a note if it is not known and taken as 1 mm."""
    name = unit.strip(' "').lower()
    scale = UNITS.get(name, UNITS.get(name.removesuffix("s").replace("metre", "meter")))
    if scale is None:
        return 1.0, (f"its unit {name!r} is not known: millimeters are taken",)
    return scale, ()


def times(shape: tuple[int, ...]) -> str:
    """Return a shape as text."""
    return " x ".join(map(str, shape)) or "()"
