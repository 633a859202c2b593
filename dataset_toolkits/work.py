"""What a worker process does with one file: make its grids, write them, and say what became of it."""

import hashlib
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trellis.grids.formats import reader_of
from trellis.grids.meshes import UNKNOWN_AXIS, Voxelized, is_misnamed, mesh_voxels
from trellis.grids.placing import Axis, axis_of_file
from trellis.grids.voxels import pack_bits, voxel_centers, voxels_to_grid, write_ply
from trellis.utils.errors import ConfigError, DataError

from . import records
from .inputs import Stamp, stamp_of
from .shard_files import squeeze

if TYPE_CHECKING:
    from trellis.grids.volumes import Labels

CHANGED = "was changed while this program ran: a new run takes it as it is then"
VOLUME_TIME = 10  # time limits of a mesh: a scan has many organs


class Settings(NamedTuple):
    """How files become grids.

    resolution: voxels along an edge.
    up_axis, normalization: see `trellis.grids.placing`.
    points: take files that have only points.
    labels: the objects of label maps; None takes every label.
    components: take each connected part of a label map's objects by itself.
    fill: "surface" or "solid", for volumes.
    """

    resolution: int
    up_axis: str
    normalization: str | None
    points: bool = False
    labels: "Labels | None" = None
    components: bool = False
    fill: str = "surface"


class Made(NamedTuple):
    """A grid that was made.

    part: the object of the file, "" if the file is one object.
    mm_per_cell, frame: of an object of a scan, as text for metadata.csv; else "".
    grid: as of `shard_files.squeeze`; b"" if it is in a voxel file.
    """

    part: str
    sha256: str
    num_voxels: int
    axis: str
    notes: tuple[str, ...]
    mm_per_cell: str = ""
    frame: str = ""
    grid: bytes = b""


class Missing(NamedTuple):
    """An object of a volume that has no grid, and why."""

    part: str
    sha256: str
    reason: str


class Outcome(NamedTuple):
    """What became of a file."""

    made: tuple[Made, ...]
    missing: tuple[Missing, ...] = ()


def is_volume(path: Path) -> bool:
    """Return whether a file is a volume by its name, which may hold several objects."""
    found = reader_of(path)
    return found is not None and found.kind == "volume"


def time_factor(path: Path) -> int:
    """Return how many times the time limit of a mesh a file may take."""
    return VOLUME_TIME if is_volume(path) else 1


def input_key(sha256: str, path: Path, settings: Settings) -> str:
    """Return the sha256 that stands for a volume and how it is divided into objects.

    A mask of one organ is divided by the name of its file.
    """
    organ, groups = "", None
    if settings.labels is not None:
        organ = _organ(path, settings.labels)
        groups = sorted(settings.labels.groups.items())
    return _digest(sha256, groups, settings.components, *([organ] if organ else []))


def name_rank(path: Path, settings: Settings) -> int:
    """Return which of several files with the same bytes is taken: the one of the lowest rank, and of these the first.

    A file that says by its name that it is of another format than it is gives none, where its copy may. A mask of one
    organ is what its file is named after, so a copy under another name may give no object.
    """
    if not is_volume(path):
        return int(is_misnamed(path))
    if settings.labels is None:
        return 0
    organ = _organ(path, settings.labels)
    return 0 if organ in settings.labels.groups else 2 if organ else 1


def _organ(path: Path, labels: "Labels") -> str:
    """Return the organ that a volume is named after; "" if it is after none."""
    from trellis.grids.volumes import organ_of_name, volume_suffix

    return organ_of_name(path.name[: -len(volume_suffix(path))], labels)


def division(settings: Settings) -> tuple[str, str]:
    """Return how volumes are divided into objects, as the settings `labels` and `components` of records.

    The first is NO_TABLE, or a digest of the table and its file's name, which tells people which it is.
    """
    table = records.NO_TABLE
    if settings.labels is not None:
        name = " ".join(Path(settings.labels.source).name.split())
        table = f"{_digest(sorted(settings.labels.groups.items()))} {name}"
    return table, records.PARTS if settings.components else records.WHOLE


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def make_grids(path: Path, sha256: str, folder: Path | None, settings: Settings, stamp: Stamp | None = None) -> Outcome:
    """Make the grids of a file, and write them as `<sha256>.ply` into a folder; without one, return them.

    sha256: of the file's bytes.
    stamp: of the file before it was hashed, see `inputs.stamp_of`; None takes it as it is.
    Raise DataError with the reason if the file gives none or is another by now, OSError if a grid cannot be written.
    """
    with reasons(path, stamp):
        grids, missing = _grids(path, sha256, settings)
    if folder is None:
        return Outcome(
            tuple(made._replace(grid=_squeezed(voxels, settings.resolution)) for voxels, made in grids), missing
        )
    for voxels, made in grids:
        write_ply(folder / f"{made.sha256}.ply", voxel_centers(voxels, settings.resolution))
    return Outcome(tuple(made for _, made in grids), missing)


def _squeezed(voxels: np.ndarray, resolution: int) -> bytes:
    return squeeze(pack_bits(voxels_to_grid(voxels, resolution)[None])[0])


def make_grids_elsewhere(
    path: Path, sha256: str, folder: Path | None, settings: Settings, stamp: Stamp | None = None
) -> tuple[Outcome, dict[str, bytes]]:
    """Make the grids of a file on another machine than the one that has asked for it and has the folder.

    Return what `make_grids` returns, and what it would write: {name of a file: its bytes, as zlib makes them smaller}.
    Arguments and errors: as of `make_grids`. stamp: of the file on the machine that has asked.
    """
    here = None if stamp is None else local_stamp(path, stamp)
    if folder is None:
        return make_grids(path, sha256, None, settings, here), {}
    with tempfile.TemporaryDirectory() as made:
        outcome = make_grids(path, sha256, Path(made), settings, here)
        return outcome, {file.name: zlib.compress(file.read_bytes()) for file in Path(made).iterdir()}


def local_stamp(path: Path, stamp: Stamp) -> Stamp:
    """Return the stamp of a file on this machine, where it may have another number.

    stamp: of another machine. Raise DataError if size or time of change differ, or if it cannot be read.
    """
    try:
        here = stamp_of(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    if [part and part[:2] for part in here] != [part and part[:2] for part in stamp]:
        raise DataError(CHANGED)
    return here


def voxels_of(path: Path, stamp: Stamp | None, resolution: int, up_axis: str, normalization: str) -> Voxelized:
    """Return the voxels of a mesh. Arguments and errors: as of `make_grids`."""
    with reasons(path, stamp):
        return mesh_voxels(path, resolution, up_axis, normalization)


def voxels_elsewhere(path: Path, stamp: Stamp | None, resolution: int, up_axis: str, normalization: str) -> Voxelized:
    """Return what `voxels_of` returns, on another machine than the one that the stamp is from."""
    here = None if stamp is None else local_stamp(path, stamp)
    return voxels_of(path, here, resolution, up_axis, normalization)


@contextmanager
def reasons(path: Path, stamp: Stamp | None) -> Iterator[None]:
    """Make whatever goes wrong with a file a DataError with the reason, also that it is another one by now."""
    try:
        yield
    except MemoryError:
        raise
    except DataError as error:
        if _is_changed(path, stamp):  # half a file seems damaged
            raise DataError(CHANGED) from error
        raise
    except ConfigError as error:  # a package that few files need: the others go on without it
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # one file in thousands must not end the run
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot be voxelized, by a fault of this program ({type(error).__name__}: {reason})"
        ) from error
    if _is_changed(path, stamp):
        raise DataError(CHANGED)


def _is_changed(path: Path, stamp: Stamp | None) -> bool:
    try:
        return stamp is not None and stamp_of(path) != stamp
    except OSError:  # it is gone: who reads it says so, and who has read it has what was hashed
        return False


def _grids(path: Path, sha256: str, settings: Settings) -> tuple[list[tuple[np.ndarray, Made]], tuple[Missing, ...]]:
    if not is_volume(path):
        voxels, axis, notes = mesh_voxels(
            path, settings.resolution, settings.up_axis, settings.normalization, settings.points
        )
        return [(voxels, Made("", sha256, len(voxels), axis, notes))], ()
    if settings.normalization != "cube":
        raise DataError("is a volume, which is placed as by --normalization cube: give another --output_dir and that")
    return _objects(path, sha256, settings)


def _objects(path: Path, sha256: str, settings: Settings) -> tuple[list[tuple[np.ndarray, Made]], tuple[Missing, ...]]:
    """Return the grids of a volume's objects and what it does not give."""
    from trellis.grids.volumes import ARRAY_SUFFIXES, LeftOut, grids_of_file, volume_suffix

    axis: Axis = "z"  # of scans
    notes: tuple[str, ...] = ()
    if volume_suffix(path) in ARRAY_SUFFIXES:
        axis = axis_of_file(settings.up_axis, None, settings.normalization)
        notes = (f"{UNKNOWN_AXIS}: taken as they are",) if settings.up_axis == "auto" else ()
    elif settings.up_axis == "y":
        notes = ("its axes are z-up, as those of every scan: --up_axis y does not turn it",)
    grids, missing = [], []
    places: dict[tuple[int, ...], int] = {}  # components of the same labels so far
    for item in grids_of_file(
        path, settings.resolution, settings.labels, settings.components, settings.fill, axis == "y"
    ):
        name = " ".join(item.name.split())  # one line, as records are
        if isinstance(item, LeftOut):
            missing.append(Missing(name, _digest(sha256, name), item.reason))
            continue
        places[item.labels] = places.get(item.labels, 0) + 1
        part = places[item.labels] if settings.components else "whole"
        key = _digest(sha256, sorted(item.labels), part) if item.name else sha256
        edge, frame = (f"{item.frame.mm_per_cell:.9g}", item.frame.to_json()) if item.frame else ("", "")
        made = Made(name, key, len(item.voxels), axis, (*item.notes, *notes), edge, frame)
        grids.append((item.voxels.astype(np.uint16), made))  # a scan may have thousands
    return grids, tuple(missing)
