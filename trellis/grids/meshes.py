"""From a mesh file to the voxels that its triangles meet: load, place in the cube (see `placing`), voxelize.

`mesh_to_grid` does all of it. voxelize.py and the page call its steps.
trimesh and open3d are optional, so only the functions that need them import them.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..utils.errors import ConfigError, DataError
from .placing import check_settings, normalize_shapellm, place_vertices, turn_voxels_to_z_up
from .voxels import voxel_centers, voxels_to_grid, write_ply

if TYPE_CHECKING:  # torch is imported only to make a tensor: the workers of voxelize.py need none
    import trimesh
    from torch import Tensor

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae")
HALF = 0.5 - 1e-6  # TRELLIS's clip: just inside the cube
DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")


def load_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Load all triangles of a file, with scene transforms applied and without vertices that no triangle uses.

    Return vertices [V, 3] float64, finite, in the file's units and axes, and faces [F, 3] int64.
    Raise DataError with the reason if there is nothing to voxelize, ConfigError if trimesh is missing. The reason does
    not name the file: the caller does, or records it beside the file's name.
    """
    trimesh = require_trimesh()
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes)")
    options = {"process": False}
    if path.suffix.lower() in (".glb", ".gltf", ".obj"):
        options["skip_materials"] = True  # textures may be missing and are not used
    try:
        if path.suffix.lower() in (".glb", ".gltf"):
            _check_gltf(path)
        scene = trimesh.load_scene(path, **options)
        parts = [
            (trimesh.transform_points(mesh.vertices, transform), np.asarray(mesh.faces, dtype=np.int64))
            for transform, mesh in _placed_meshes(scene)
            if len(mesh.faces)
        ]
    except DataError:
        raise
    except Exception as error:  # parsers raise anything on damaged files; it becomes the recorded reason
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read ({type(error).__name__}: {reason})") from error

    if not parts:
        raise DataError("has no triangles")
    for vertices, faces in parts:
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise DataError(f"its triangles use vertices {faces.min()} to {faces.max()} of {len(vertices)}")
    offsets = np.cumsum([0] + [len(vertices) for vertices, _ in parts[:-1]])
    faces = np.concatenate([faces + offset for (_, faces), offset in zip(parts, offsets, strict=True)])
    used, faces = np.unique(faces, return_inverse=True)
    vertices = np.concatenate([vertices for vertices, _ in parts])[used]
    finite = np.isfinite(vertices).all(axis=1)
    if not finite.all():
        raise DataError(f"vertex {vertices[finite.argmin()].tolist()} is not finite")
    return vertices, faces.reshape(-1, 3)


def _placed_meshes(scene: "trimesh.Scene") -> Iterator[tuple[np.ndarray, "trimesh.Trimesh"]]:
    """Yield the transform [4, 4] and the mesh of every scene node; skip points and curves."""
    trimesh = require_trimesh()
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        if isinstance(scene.geometry[name], trimesh.Trimesh):
            yield transform, scene.geometry[name]


def gltf_tree(path: Path) -> dict:
    """Return the JSON of a .gltf or .glb file. Raise ValueError if it is damaged."""
    content = path.read_bytes()
    if content[:4] == b"glTF":
        content = content[20 : 20 + int.from_bytes(content[12:16], "little")]
    return json.loads(content)


def _check_gltf(path: Path) -> None:
    """Raise DataError if a glTF file needs a decoder that is missing: its vertices would be zeros."""
    required = gltf_tree(path).get("extensionsRequired", ())
    if DRACO in required and importlib.util.find_spec("DracoPy") is None:
        raise DataError(f"requires {DRACO}: pip install DracoPy, or export it without compression")
    for name in MESHOPT:
        if name in required:
            raise DataError(f"requires {name}: export it without compression")


def voxelize_mesh(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Return the voxels that triangles meet, [N, 3] int64 in [0, resolution), sorted by x, then y, then z.

    vertices: [V, 3] float64 in the cube [-0.5, 0.5]^3, finite (open3d hangs on NaN).
    faces: [F, 3] int.
    Raise ConfigError if open3d cannot be loaded.
    """
    open3d = require_open3d()
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(np.clip(vertices, -HALF, HALF)), open3d.utility.Vector3iVector(faces)
    )
    grid = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, voxel_size=1 / resolution, min_bound=(-0.5,) * 3, max_bound=(0.5,) * 3
    )
    return _sorted(np.array([voxel.grid_index for voxel in grid.get_voxels()], dtype=np.int64).reshape(-1, 3))


def _sorted(voxels: np.ndarray) -> np.ndarray:
    return voxels[np.lexsort(voxels.T[::-1])]


def place_and_voxelize(
    vertices: np.ndarray, faces: np.ndarray, resolution: int, up_axis: str, normalization: str | None
) -> np.ndarray:
    """Return the voxels of a loaded mesh, [N, 3] int64, N >= 1, sorted by x, then y, then z.

    vertices, faces: as returned by `load_mesh`.
    up_axis, normalization: see `placing`.
    Raise DataError with the reason if the mesh cannot be voxelized.
    """
    if normalization == "shapellm":
        # As ShapeLLM-Omni, which turns voxels. Turned vertices would give other voxels for triangles that lie in the
        # border between two.
        voxels = voxelize_mesh(normalize_shapellm(vertices), faces, resolution)
        voxels = _sorted(turn_voxels_to_z_up(voxels, resolution))
    else:
        voxels = voxelize_mesh(place_vertices(vertices, up_axis, normalization), faces, resolution)
    if not len(voxels):
        raise DataError("has no voxels: no triangle meets the grid")
    return voxels


def mesh_voxels(path: Path, resolution: int, up_axis: str, normalization: str | None) -> np.ndarray:
    """Load a mesh file and return its voxels, see `place_and_voxelize`. The reason of a DataError has no file name."""
    return place_and_voxelize(*load_mesh(path), resolution, up_axis, normalization)


def voxelize_file(path: Path, target: Path, resolution: int, up_axis: str, normalization: str | None) -> int:
    """Voxelize a mesh file into the PLY file `target` and return the number of voxels. See `mesh_voxels`."""
    voxels = mesh_voxels(path, resolution, up_axis, normalization)
    write_ply(target, voxel_centers(voxels, resolution))
    return len(voxels)


def mesh_to_grid(
    path: str | os.PathLike, resolution: int, up_axis: str = "keep", normalization: str = "cube"
) -> "Tensor":
    """Voxelize a mesh file, as dataset_toolkits/voxelize.py does.

    up_axis, normalization: see `placing`.
    Return [1, R, R, R] uint8, 0 or 1, axes x y z.
    Raise DataError naming the file if it is missing or cannot be voxelized, ConfigError for settings that do not go
    together or a missing package.
    """
    import torch

    check_settings(up_axis, normalization)
    path = Path(path)
    try:
        voxels = mesh_voxels(path, resolution, up_axis, normalization)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a mesh file.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    return torch.from_numpy(voxels_to_grid(voxels, resolution))[None]


def require_trimesh() -> ModuleType:
    """Return trimesh. Raise ConfigError with the command that installs it if it is missing."""
    try:
        import trimesh
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install trimesh") from error
    return trimesh


def require_open3d() -> ModuleType:
    """Return open3d. Raise ConfigError with the command that mends it if it cannot be loaded."""
    try:
        import open3d
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install open3d") from error
    except (ImportError, OSError) as error:  # a shared library that the system lacks
        raise ConfigError(
            f"open3d cannot be loaded ({error}). On Debian or Ubuntu: apt-get install libusb-1.0-0 libgl1 libgomp1"
        ) from error
    return open3d
