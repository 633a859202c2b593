"""Mesh files from visitors, and those of a data set: opened in a worker process with limits of time and memory.

A parser may hang, crash or fill the memory over a damaged file, and none of that may reach the server.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..grids import meshes
from ..grids.meshes import MESH_SUFFIXES
from ..grids.voxels import has_faces, points_to_occupancy, read_ply
from ..utils.errors import ConfigError, DataError

MAX_BYTES = 64 * 2**20
SECONDS = 60  # for a file
MEMORY = 4 * 2**30  # bytes that opening a file may take
WAITING = 8  # files at work or in line; more are turned away
SHOWN_TRIANGLES = 60_000


class Shape(NamedTuple):
    """What a worker gives back.

    vertices: [V, 3] float32 in cells of the grid, in [0, R]; faces: [F, 3] int32, at most SHOWN_TRIANGLES; both None
    where the file has voxels and no mesh. triangles: those of the file. cells: [N, 3] int of the occupied cells, None
    where they were not asked for.
    """

    vertices: np.ndarray | None
    faces: np.ndarray | None
    triangles: int
    cells: np.ndarray | None


def check_name(name: str) -> str:
    """The suffix of an upload's name. Raises DataError where it is none of a mesh."""
    suffix = Path(name).suffix.lower()
    if suffix not in MESH_SUFFIXES:
        name = Path(name).name or "the file"
        raise DataError(f"{name}: is not one of {' '.join(MESH_SUFFIXES)}. Convert it to one of them.")
    return suffix


def check_content(path: Path) -> None:
    """Raise DataError for an upload that would make its parser open other files of this machine."""
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        content = path.read_bytes()
        if content[:4] == b"glTF":
            content = content[20 : 20 + int.from_bytes(content[12:16], "little")]
        try:
            tree = json.loads(content)
            uris = [item.get("uri") for item in tree.get("buffers", [])]
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"cannot be read: its JSON is damaged ({' '.join(str(error).split())[:200]})") from error
        others = [uri for uri in uris if uri is not None and not str(uri).startswith("data:")]
        if others:
            raise DataError(f"keeps its geometry in another file, {others[0]!r:.80}. Export it as .glb, all in one")
    elif suffix == ".dae":
        content = path.read_bytes()
        # An archive or another encoding could hide what is looked for here.
        plain = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<" and b"\0" not in content
        if not plain or re.search(rb"<!(DOCTYPE|ENTITY)|encoding\s*=\s*[\"'](?!utf-8)", content, re.IGNORECASE):
            raise DataError("is not plain UTF-8 XML without a document type. Export it anew, or as .glb")


def open_shape(
    path: Path, resolution: int, up_axis: str, normalization: str | None, voxelize: bool, memory: int
) -> Shape:
    """The worker's job, within so many bytes of memory. See `meshes.mesh_cells` for up_axis and normalization.

    voxelize: give the cells too; only such a file is an upload. Raises DataError with the reason.
    """
    _limit_memory(memory)
    try:
        if voxelize:
            check_content(path)
        if path.suffix.lower() == ".ply" and not has_faces(path):
            points = points_to_occupancy(read_ply(path), resolution, name=path.name)
            return Shape(None, None, 0, np.argwhere(points[0].numpy()))
        cells = meshes.mesh_cells(path, resolution, up_axis, normalization) if voxelize else None
        vertices, faces = meshes.load_mesh(path)
        triangles = len(faces)
        if normalization == "shapellm":
            vertices = meshes.turn_to_z_up(meshes.normalize_shapellm(vertices))
        else:
            vertices = meshes.turn_to_z_up(vertices) if up_axis == "y" else vertices
            vertices = meshes.normalize(vertices) if normalization == "cube" else vertices
        vertices, faces = simplified(vertices, faces)
    except (DataError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not isinstance(error.__cause__, MemoryError):
            raise
        raise DataError(f"needs more than {memory / 2**30:.3g} GiB of memory. Give a simpler mesh") from error
    return Shape(((vertices + 0.5) * resolution).astype(np.float32), faces.astype(np.int32), triangles, cells)


def simplified(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mesh of at most SHOWN_TRIANGLES, for the eye: vertices that share a cell of a lattice become their mean.

    vertices: [V, 3] in a cube of edge 1. The finest lattice that is coarse enough is taken. (Rossignac and Borrel,
    Multi-resolution 3D approximations for rendering complex scenes, 1993.)
    """
    lattice = 512
    while len(faces) > SHOWN_TRIANGLES:
        cells = np.floor((vertices + 0.5) * lattice).astype(np.int64)
        _, cluster, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        cluster = cluster.reshape(-1)
        sums = np.stack([np.bincount(cluster, vertices[:, axis], len(counts)) for axis in range(3)], 1)
        merged = cluster[faces]
        kept = (merged != np.roll(merged, 1, axis=1)).all(1)
        _, first = np.unique(np.sort(merged[kept], axis=1), axis=0, return_index=True)
        vertices, faces = sums / counts[:, None], merged[kept][np.sort(first)]
        lattice = lattice * 3 // 4
    return vertices, faces


def _limit_memory(memory: int) -> None:
    """Let this process have so many bytes more than it has, from before the file is opened. Not every system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + memory
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def start_worker() -> None:
    """Load what opening a file needs before its time and memory are limited, and keep parsers quiet."""
    import logging

    os.environ["OMP_NUM_THREADS"] = "1"  # open3d reads it as it is loaded
    open3d = meshes.require_open3d()
    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    meshes.require_trimesh()


class Opener:
    """Worker processes that open meshes. They start with the first file and are shared by all visitors.

    seconds, memory: limits of a file, the latter in bytes.
    """

    def __init__(self, workers: int = 2, seconds: float = SECONDS, memory: int = MEMORY):
        self.workers, self.seconds, self.memory, self._pool = workers, seconds, memory, None
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(WAITING)

    def open(self, path: Path, resolution: int, up_axis: str, normalization: str | None, *, voxelize: bool) -> Shape:
        """`open_shape` in a worker. Raises DataError where the file is damaged, too slow or too large, and where too
        many are in line, ConfigError where a package is missing."""
        if not self._places.acquire(blocking=False):
            raise DataError("too many files are being opened at the moment: try again in a minute")
        try:
            return self._result(
                self._started().schedule(
                    open_shape,
                    args=(path, resolution, up_axis, normalization, voxelize, self.memory),
                    timeout=self.seconds,
                )
            )
        finally:
            self._places.release()

    def _result(self, future: concurrent.futures.Future) -> Shape:
        from pebble import ProcessExpired

        try:
            return future.result()
        except concurrent.futures.TimeoutError as error:
            raise DataError(f"took longer than {self.seconds:g} s to open. Give a simpler mesh") from error
        except (ProcessExpired, MemoryError) as error:
            raise DataError(
                "could not be opened: its process ended, perhaps at the limit of "
                f"{self.memory / 2**30:.3g} GiB of memory. Give a simpler mesh"
            ) from error

    def _started(self):
        with self._lock:
            if self._pool is None or not self._pool.active:
                try:
                    from pebble import ProcessPool
                except ModuleNotFoundError as error:
                    raise ConfigError(f"a Python package is missing ({error}): pip install Pebble") from error
                meshes.require_trimesh()
                meshes.require_open3d()
                context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
                self._pool = ProcessPool(self.workers, initializer=start_worker, context=context)
            return self._pool

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None
