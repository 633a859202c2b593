"""From a mesh file to the voxels that its triangles meet: load, place in the cube (see `placing`), voxelize.

`mesh_to_grid` does all of it. voxelize.py and the page call its steps. `readers/` has a file per format, `rasterize`
the triangle-to-voxel test.
"""

import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np

from ..utils.errors import DataError, UserError
from ..utils.inputs import obstacle, require_memory
from . import formats
from .formats import MESH_SUFFIXES, Format, reader_of, why_not
from .geometry import Geometry, check_precision, check_triangles, note_on_precision
from .placing import (
    Axis,
    axis_of_file,
    check_settings,
    normalize_shapellm,
    place_vertices,
    turn_to_y_up,
    turn_voxels_to_z_up,
)
from .rasterize import HALF, voxelize_mesh
from .voxels import voxels_to_grid

if TYPE_CHECKING:  # torch is imported only to make a tensor: the workers of voxelize.py need none
    import trimesh
    from torch import Tensor

HEAD = 512  # bytes that tell what is no mesh at all
UNKNOWN_AXIS = "its format does not say which axis is up"


class TooLarge(DataError, MemoryError):
    """A file that does not fit into memory. A worker, whose share is less, may be given more: see `mesh_pool`."""


class Voxelized(NamedTuple):
    """A mesh as voxels."""

    voxels: np.ndarray  # [N, 3] int64 in [0, R), N >= 1, sorted by x, then y, then z
    axis: Axis  # how the file's axes were taken
    notes: tuple[str, ...]  # what a user should know of this file, each a sentence without a full stop


def load_mesh(path: Path, points: bool = False) -> Geometry:
    """Load all triangles of a file, with scene transforms applied and without vertices that no triangle uses.

    points: take a file that has only points, with faces [0, 3]; otherwise it is an error.
    Return vertices [V, 3] float64, finite, in the file's units and axes, and `up` of the file or its format.
    Raise DataError with the reason if there is nothing to voxelize, ConfigError if a package is missing. The reason
    does not name the file: the caller does, or records it beside the file's name.
    """
    if path.exists() and (reason := obstacle(path)) is not None:
        raise DataError(reason)
    with open(path, "rb") as file:
        require_memory(os.fstat(file.fileno()).st_size, "takes", TooLarge, "give a smaller file")
        check_content(file.read(HEAD))
    return _checked(_read(path), points)


def _checked(geometry: Geometry, points: bool = False) -> Geometry:
    """Return a geometry as `load_mesh` promises it."""
    vertices, faces = geometry.vertices, geometry.faces
    if not len(faces) and not (points and len(vertices)):
        only_points = f"is a cloud of {len(vertices)} points without triangles (voxelize.py --points reads it)"
        raise DataError(only_points if len(vertices) else "has no triangles")
    if len(faces):
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise DataError(f"its triangles use vertices {faces.min()} to {faces.max()} of {len(vertices)}")
        used, faces = np.unique(faces, return_inverse=True)
        vertices, faces = vertices[used], faces.reshape(-1, 3)
    finite = np.isfinite(vertices).all(axis=1)
    if not finite.all():
        raise DataError(f"vertex {vertices[finite.argmin()].tolist()} is not finite")
    check_precision(vertices)
    vertices = vertices.astype(np.float64)
    if len(faces):
        check_triangles(vertices, faces)
    notes = geometry.notes + note_on_precision(vertices)
    return geometry._replace(vertices=vertices, faces=faces.astype(np.int64), notes=notes)


def _read(path: Path) -> Geometry:
    """Read a file by the reader of its format. Whatever a damaged file makes a library raise becomes the reason."""
    format = reader_of(path)
    if format is None or format.reader is None:
        reason = why_not(path) or f"its format is not read: convert it to one of {' '.join(MESH_SUFFIXES)}"
        raise DataError(reason)
    reader = importlib.import_module(f".readers.{format.reader}", __package__)
    try:
        geometry: Geometry = reader.read(path)
    except DataError:
        _check_name(path, format)
        raise
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read ({type(error).__name__}: {reason})") from error
    return geometry._replace(usual_up=geometry.usual_up or format.up)


def _check_name(path: Path, format: Format) -> None:
    """Raise DataError if a file is of another format than its name says. It could not be read as that."""
    with open(path, "rb") as file:
        suffix = formats.suffix_by_content(file.read(formats.HEAD), path.stat().st_size)
    if suffix == ".gz" and format.reader != "archive":
        packed = f"{path.suffix}.gz".lower()
        raise DataError(f"is in gzip: {f'rename it to {packed}' if packed in formats.FORMATS else 'unpack it'}")
    found = formats.FORMATS.get(suffix or "")
    zipped = {"archive", "threemf"}  # a damaged one of either may look like the other
    if found and found.reader != format.reader and not {found.reader, format.reader} <= zipped:
        raise DataError(f"its content is {found.name}, its name says {format.name}: rename it to {suffix}")


def is_misnamed(path: Path) -> bool:
    """Return whether a mesh file is of another format than its name says."""
    format = reader_of(path)
    if format is None:
        return False
    try:
        _check_name(path, format)
    except DataError:
        return True
    return False


def check_content(head: bytes) -> None:
    """Raise DataError for what is no mesh whatever its name: empty files, zeros, pointers of git-lfs, web pages.

    head: the first HEAD bytes of a file.
    """
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise DataError("the file is empty (0 bytes)")
    if len(head) == HEAD and not head.strip(b"\0"):
        raise DataError(f"begins with {HEAD} zero bytes: it was not written, copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise DataError("is a pointer of git-lfs and not the file itself: run git lfs pull where it comes from")
    if start.startswith(b"<") and re.search(rb"<(?:!doctype )?html\b", start):  # XHTML and comments may come first
        raise DataError("is a web page (HTML), perhaps a failed download: download it again")


def voxelize_points(points: np.ndarray, resolution: int) -> np.ndarray:
    """Return the voxels that contain a point, [N, 3] int64 in [0, resolution), sorted by x, then y, then z.

    points: [P, 3] float64 in the cube [-0.5, 0.5]^3.
    """
    cells = np.floor((np.clip(points, -HALF, HALF) + 0.5) * resolution).astype(np.int64)
    return np.unique(cells, axis=0)


def voxelize_geometry(geometry: Geometry, resolution: int, up_axis: str, normalization: str | None) -> Voxelized:
    """Place a loaded mesh in the cube and return its voxels.

    geometry: as returned by `load_mesh`.
    up_axis, normalization: see `placing`.
    Raise DataError with the reason if the mesh cannot be voxelized.
    """
    vertices, faces = geometry.vertices, geometry.faces
    axis = axis_of_file(up_axis, geometry.up or geometry.usual_up, normalization)

    def voxelize(placed: np.ndarray) -> np.ndarray:
        return voxelize_mesh(placed, faces, resolution) if len(faces) else voxelize_points(placed, resolution)

    if normalization == "shapellm":
        # As ShapeLLM-Omni, which turns voxels. Turned vertices would give other voxels for triangles that lie in the
        # border between two.
        y_up = turn_to_y_up(vertices) if axis == "z" else vertices
        voxels = turn_voxels_to_z_up(voxelize(normalize_shapellm(y_up)), resolution)
        voxels = voxels[np.lexsort(voxels.T[::-1])]
    else:
        voxels = voxelize(place_vertices(vertices, axis, normalization))
    if not len(voxels):
        raise DataError("has no voxels: no triangle meets the grid")
    return Voxelized(voxels, axis, geometry.notes + _notes_on_placing(geometry, up_axis, axis))


def _notes_on_placing(geometry: Geometry, up_axis: str, axis: Axis) -> tuple[str, ...]:
    notes = []
    if not len(geometry.faces):
        notes.append(f"a cloud of {len(geometry.vertices)} points: its voxels have no surface between them")
    if up_axis == "auto" and geometry.up is None and geometry.usual_up is None:
        taken = "taken as they are" if axis == "keep" else f"taken as {axis}-up"
        notes.append(f"{UNKNOWN_AXIS}: {taken}")
    if geometry.up is not None and up_axis in ("y", "z") and up_axis != geometry.up:
        notes.append(f"says that {geometry.up} is up, but was taken as {up_axis}-up")
    elif (
        geometry.up is None and geometry.usual_up is not None and up_axis in ("y", "z") and up_axis != geometry.usual_up
    ):
        notes.append(f"is of a format whose files are mostly {geometry.usual_up}-up, but was taken as {up_axis}-up")
    return tuple(notes)


def mesh_voxels(
    path: Path, resolution: int, up_axis: str, normalization: str | None, points: bool = False
) -> Voxelized:
    """Load a mesh file and voxelize it, see `load_mesh` and `voxelize_geometry`. A reason does not name the file."""
    return voxelize_geometry(load_mesh(path, points), resolution, up_axis, normalization)


def mesh_to_grid(
    path: str | os.PathLike, resolution: int, up_axis: str = "auto", normalization: str = "cube"
) -> "Tensor":
    """Voxelize a mesh file, as dataset_toolkits/voxelize.py does.

    up_axis, normalization: see `placing`. Warn if the axes of the file stay unknown under "auto".
    Return [1, R, R, R] uint8, 0 or 1, axes x y z.
    Raise DataError naming the file if it is missing or cannot be voxelized, ConfigError for settings that do not go
    together or a missing package.
    """
    import torch

    check_settings(up_axis, normalization)
    path = Path(path)
    try:
        made = mesh_voxels(path, resolution, up_axis, normalization)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a mesh file.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    if up_axis == "auto" and made.axis == "keep":
        warnings.warn(f'{path}: {UNKNOWN_AXIS}: taken as z-up. Say it by up_axis="y" or "z"', stacklevel=2)
    return torch.from_numpy(voxels_to_grid(made.voxels, resolution))[None]


def is_trimesh(value: object) -> "TypeGuard[trimesh.Trimesh | trimesh.Scene]":
    """Return whether a value is a trimesh.Trimesh or trimesh.Scene, without an import of trimesh."""
    trimesh = sys.modules.get("trimesh")
    return trimesh is not None and isinstance(value, (trimesh.Trimesh, trimesh.Scene))


def trimesh_to_grid(
    mesh: "trimesh.Trimesh | trimesh.Scene", resolution: int, up_axis: str = "auto", normalization: str = "cube"
) -> "Tensor":
    """Voxelize a mesh, or all triangles of a scene, as `mesh_to_grid` does a file.

    A mesh in memory does not say which axis is up: under "auto" it is taken as it is, with a warning.
    """
    import torch

    check_settings(up_axis, normalization)
    try:
        made = voxelize_geometry(_checked(_geometry_of(mesh)), resolution, up_axis, normalization)
    except DataError as error:
        raise DataError(f"the {type(mesh).__name__}: {error}.") from error
    if up_axis == "auto" and made.axis == "keep":
        warnings.warn(
            f'a {type(mesh).__name__} does not say which axis is up: taken as z-up. Say it by up_axis="y" or "z"',
            stacklevel=2,
        )
    return torch.from_numpy(voxels_to_grid(made.voxels, resolution))[None]


def _geometry_of(mesh: "trimesh.Trimesh | trimesh.Scene") -> Geometry:
    import trimesh

    if isinstance(mesh, trimesh.Trimesh):
        return Geometry(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    vertices, faces, count = [np.zeros((0, 3))], [np.zeros((0, 3), dtype=np.int64)], 0
    for transform, name in (mesh.graph[node] for node in mesh.graph.nodes_geometry):
        part = mesh.geometry[name]
        if not isinstance(part, trimesh.Trimesh):  # paths and points
            continue
        vertices.append(np.asarray(part.vertices) @ transform[:3, :3].T + transform[:3, 3])
        faces.append(np.asarray(part.faces) + count)
        count += len(part.vertices)
    return Geometry(np.concatenate(vertices), np.concatenate(faces))
