"""Mesh files of visitors and of a data set, opened in a worker process with limits of time and memory.

A damaged file may make a parser hang, crash or fill the memory, and none of that may reach the server.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..grids.mesh_pool import MeshPool
from ..grids.meshes import MESH_SUFFIXES, load_mesh, voxelize_geometry
from ..grids.placing import Axis, axis_of_file, place_vertices
from ..grids.readers.gltf_file import open_file
from ..grids.voxels import has_faces, points_to_voxels, read_ply
from ..utils.errors import DataError

# Formats whose readers open no other file, or of which `check_content` can tell: not archives, nor lists of files.
# Those of XML read no external entities.
SAFE = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae", ".3mf", ".vtk", ".vtp")
UPLOAD_SUFFIXES = tuple(suffix for suffix in MESH_SUFFIXES if suffix in SAFE)
MAX_BYTES = 64 * 2**20
SECONDS = 60  # for a file
MEMORY = 4 * 2**30  # bytes that opening a file may take
WAITING = 8  # files being opened or waiting; more are refused
SHOWN_TRIANGLES = 60_000


class ShownMesh(NamedTuple):
    """A mesh, simplified to be looked at."""

    vertices: np.ndarray  # [V, 3] float32, in voxels, in [0, R]
    faces: np.ndarray  # [F, 3] int32, at most SHOWN_TRIANGLES
    triangles: int  # of the file


class Shape(NamedTuple):
    """An opened file, as a worker returns it."""

    mesh: ShownMesh | None  # None for a file of voxels
    voxels: np.ndarray | None  # [N, 3] int64, the occupied voxels, which may repeat; None if not asked for
    axis: Axis | None  # how a mesh of the grid gets the file's axes back; None for a file of voxels
    notes: tuple[str, ...]  # what the visitor should know of the file, see `grids.geometry`


def check_name(name: str) -> str:
    """Return the suffix of an upload's name. Raise DataError if it is not a mesh's."""
    suffix = Path(name).suffix.lower()
    if suffix not in UPLOAD_SUFFIXES:
        name = Path(name).name or "the file"
        raise DataError(f"{name}: is not one of {' '.join(UPLOAD_SUFFIXES)}. Convert it to one of them.")
    return suffix


def check_content(path: Path) -> None:
    """Raise DataError for an upload that would make its reader open other files of this machine, or a damaged glTF."""
    if path.suffix.lower() in (".glb", ".gltf"):
        for buffer in open_file(path).tree.items("buffers"):
            uri = buffer.text("uri", "data:")
            if not uri.startswith("data:"):
                raise DataError(f"keeps its geometry in another file, {uri!r:.80}. Export it as .glb, all in one")


def open_shape(path: Path, resolution: int, up_axis: str, normalization: str | None, voxelize: bool) -> Shape:
    """Open a file in a worker.

    up_axis, normalization: see `grids.placing`.
    voxelize: return the voxels too, and treat the file as an upload, which may be hostile.
    Raise DataError with the reason.
    """
    if voxelize:
        check_content(path)
    if path.suffix.lower() == ".ply" and not has_faces(path):
        voxels = points_to_voxels(read_ply(path), resolution, name=path.name) if voxelize else None
        return Shape(None, voxels, None, ())
    geometry = load_mesh(path)
    made = voxelize_geometry(geometry, resolution, up_axis, normalization) if voxelize else None
    said = geometry.up or geometry.usual_up
    axis = axis_of_file(up_axis, said, normalization)
    # A visitor may say that a y-up file is z-up: it comes down as it came. Of a z-up file whose axes are left as they
    # are, the grid is z-up.
    back: Axis = axis
    if said == "y" and axis == "z":
        back = "keep"
    elif said == "z" and axis == "keep":
        back = "z"
    placed, shown = simplified(place_vertices(geometry.vertices, axis, normalization), geometry.faces)
    mesh = ShownMesh(((placed + 0.5) * resolution).astype(np.float32), shown.astype(np.int32), len(geometry.faces))
    return Shape(mesh, made.voxels if made else None, back, made.notes if made else geometry.notes)


def simplified(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a mesh of at most SHOWN_TRIANGLES to look at, by vertex clustering.

    vertices: [V, 3] in a cube of edge 1. Vertices in one box of a lattice become their mean; the lattice is the finest
    that is coarse enough. Rossignac and Borrel, Multi-resolution 3D approximations for rendering complex scenes, 1993
    """
    lattice = 512
    while len(faces) > SHOWN_TRIANGLES:
        boxes = np.floor((vertices + 0.5) * lattice).astype(np.int64)
        _, cluster, counts = np.unique(boxes, axis=0, return_inverse=True, return_counts=True)
        cluster = cluster.reshape(-1)
        sums = np.stack([np.bincount(cluster, vertices[:, axis], len(counts)) for axis in range(3)], 1)
        merged = cluster[faces]
        kept = (merged != np.roll(merged, 1, axis=1)).all(1)
        _, first = np.unique(np.sort(merged[kept], axis=1), axis=0, return_index=True)
        vertices, faces = sums / counts[:, None], merged[kept][np.sort(first)]
        lattice = lattice * 3 // 4
    return vertices, faces


class Opener:
    """Worker processes that open meshes. They start with the first file and are shared by all visitors.

    seconds, memory: limits for a file, the latter in bytes.
    """

    def __init__(self, workers: int = 2, seconds: float = SECONDS, memory: int = MEMORY):
        self.seconds, self.memory = seconds, memory
        self._pool = MeshPool(workers)
        self._slots = threading.BoundedSemaphore(WAITING)

    def open(self, path: Path, resolution: int, up_axis: str, normalization: str | None, *, voxelize: bool) -> Shape:
        """Call `open_shape` in a worker.

        Raise DataError if the file is damaged, too slow or too large, or if too many are waiting, ConfigError if a
        package is missing.
        """
        if not self._slots.acquire(blocking=False):
            raise DataError("too many files are being opened at the moment: try again in a minute")
        try:
            args = path, resolution, up_axis, normalization, voxelize
            shape: Shape = self._pool.submit(open_shape, *args, timeout=self.seconds, memory=self.memory).result()
            return shape
        finally:
            self._slots.release()

    def close(self) -> None:
        """Stop the workers."""
        self._pool.close()
