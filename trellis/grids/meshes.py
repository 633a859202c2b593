"""From a mesh file to the voxels that its triangles meet: load, turn to z-up, scale, voxelise.

trimesh and open3d are loaded by the functions that need them: the package works without.
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
from .voxels import cell_centres, write_ply

if TYPE_CHECKING:  # torch only where a tensor is made: voxelize.py's workers do without
    import trimesh
    from torch import Tensor

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae")
NORMALIZATIONS = ("cube", "shapellm")
UP_AXES = ("keep", "y", "z")
HALF = 0.5 - 1e-6  # TRELLIS's clip: just inside the cube
DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")


def load_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Load all triangles of a file, scene nodes' transforms applied, without vertices that no triangle uses.

    Returns vertices [V, 3] float64 in the file's units and axes, and faces [F, 3] int64.
    Raises DataError with the reason where there is nothing to voxelise, ConfigError where trimesh is missing.
    """
    trimesh = require_trimesh()
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes)")
    options = {"process": False}
    if path.suffix.lower() in (".glb", ".gltf", ".obj"):
        options["skip_materials"] = True  # textures may be missing, and are of no use here
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
    except Exception as error:  # damaged files raise anything in the parsers; it becomes the recorded reason
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
    return np.concatenate([vertices for vertices, _ in parts])[used], faces.reshape(-1, 3)


def _placed_meshes(scene: "trimesh.Scene") -> Iterator[tuple[np.ndarray, "trimesh.Trimesh"]]:
    """Yield the transform [4, 4] and the mesh of every scene node; points and curves are passed over."""
    trimesh = require_trimesh()
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        if isinstance(scene.geometry[name], trimesh.Trimesh):
            yield transform, scene.geometry[name]


def _check_gltf(path: Path) -> None:
    """Raise DataError where a glTF file needs a decoder that is not there: its vertices would be zeros."""
    content = path.read_bytes()
    if content[:4] == b"glTF":
        content = content[20 : 20 + int.from_bytes(content[12:16], "little")]
    required = json.loads(content).get("extensionsRequired", ())
    if DRACO in required and importlib.util.find_spec("DracoPy") is None:
        raise DataError(f"requires {DRACO}: pip install DracoPy, or export it without compression")
    for name in MESHOPT:
        if name in required:
            raise DataError(f"requires {name}: export it without compression")


def normalize(vertices: np.ndarray) -> np.ndarray:
    """Centre the box of vertices [V, 3] at 0 and make its longest edge 1. Raises DataError without a size."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    edge = (high - low).max()
    if not 0 < edge < np.inf:
        raise DataError(f"its longest edge is {edge:g}: nothing to scale to 1")
    return (vertices - (low + high) / 2) / edge


def voxelize_mesh(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Return the cells that triangles meet, [N, 3] int64 in [0, resolution), sorted by x, then y, then z.

    vertices: [V, 3] float64 in the cube [-0.5, 0.5]^3, finite (open3d hangs on NaN); faces: [F, 3] int.
    Raises ConfigError where open3d cannot be loaded.
    """
    open3d = require_open3d()
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(np.clip(vertices, -HALF, HALF)), open3d.utility.Vector3iVector(faces)
    )
    grid = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, voxel_size=1 / resolution, min_bound=(-0.5,) * 3, max_bound=(0.5,) * 3
    )
    cells = np.array([voxel.grid_index for voxel in grid.get_voxels()], dtype=np.int64).reshape(-1, 3)
    return cells[np.lexsort(cells.T[::-1])]


def turn_to_z_up(points: np.ndarray) -> np.ndarray:
    """Turn points [..., 3] by +90 degrees about x, from y-up to z-up: x y z becomes x -z y."""
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def normalize_shapellm(vertices: np.ndarray) -> np.ndarray:
    """Scale vertices [V, 3] as ShapeLLM-Omni does (arXiv:2506.01853): one minimum and one maximum for all axes.

    The least of all coordinates becomes -0.5 and the greatest 0.5, so that a box is centred on no axis in
    general. Raises DataError without a size.
    """
    low, high = vertices.min(), vertices.max()
    if not 0 < high - low < np.inf:
        raise DataError(f"its coordinates span {high - low:g}: nothing to scale to 1")
    return (vertices - low) / (high - low) - 0.5


def check_settings(up_axis: str, normalization: str) -> None:
    """Raise ConfigError for an unknown up axis or normalization, or two that do not go together."""
    if up_axis not in UP_AXES:
        raise ConfigError(f"up_axis {up_axis!r}: must be one of {', '.join(UP_AXES)}.")
    if normalization not in NORMALIZATIONS:
        raise ConfigError(f"normalization {normalization!r}: must be one of {', '.join(NORMALIZATIONS)}.")
    if normalization == "shapellm" and up_axis != "y":
        raise ConfigError(
            f'up_axis {up_axis!r}: normalization "shapellm" takes meshes as y-up and turns them to '
            'z-up itself. Set it to "y", or take normalization "cube".'
        )


def mesh_cells(path: Path, resolution: int, up_axis: str, normalization: str | None) -> np.ndarray:
    """Return the cells that the triangles of a mesh file meet, [N, 3] int64, N >= 1, sorted by x, then y, then z.

    up_axis: "y" turns the mesh from y-up to z-up; "z" and "keep" leave its axes alone.
    normalization: "cube" centres the box of the vertices and makes its longest edge 1; "shapellm" scales as
    `normalize_shapellm` and turns the cells, not the vertices, to z-up (it goes with up_axis "y" only); None takes
    the mesh as it is, in the unit cube.
    Raises DataError with the reason where the mesh cannot be voxelised. It does not name the file.
    """
    vertices, faces = load_mesh(path)
    if not np.isfinite(vertices).all():
        bad = int(np.isfinite(vertices).all(axis=1).argmin())
        raise DataError(f"vertex {vertices[bad].tolist()} is not finite")
    if normalization == "shapellm":
        cells = voxelize_mesh(normalize_shapellm(vertices), faces, resolution)
        # Turned about the middle of the grid, -z is the cell R - 1 - k. A turn before would decide otherwise
        # about triangles that lie in the border of two cells.
        cells = np.stack([cells[:, 0], resolution - 1 - cells[:, 2], cells[:, 1]], axis=1)
        cells = cells[np.lexsort(cells.T[::-1])]
    else:
        if up_axis == "y":
            vertices = turn_to_z_up(vertices)
        if normalization == "cube":
            vertices = normalize(vertices)
        elif np.abs(vertices).max() > 0.5 + 1e-3:
            raise DataError(f"is not normalised to the unit cube: a coordinate is {np.abs(vertices).max():g}")
        cells = voxelize_mesh(vertices, faces, resolution)
    if not len(cells):
        raise DataError("has no voxels: no triangle meets a cell")
    return cells


def voxelize_file(path: Path, target: Path, resolution: int, up_axis: str, normalization: str | None) -> int:
    """Voxelise a mesh file into the PLY file `target` and return the number of voxels. See `mesh_cells`."""
    cells = mesh_cells(path, resolution, up_axis, normalization)
    write_ply(target, cell_centres(cells, resolution))
    return len(cells)


def mesh_to_grid(
    path: str | os.PathLike, resolution: int, up_axis: str = "keep", normalization: str = "cube"
) -> "Tensor":
    """Voxelise a mesh file, as dataset_toolkits/voxelize.py does.

    Returns [1, R, R, R] uint8, 0 or 1, axes x y z. See `mesh_cells` for up_axis and normalization.
    Raises DataError naming the file where it is missing or cannot be voxelised, ConfigError for settings that do
    not go together or a package that is missing.
    """
    import torch

    check_settings(up_axis, normalization)
    path = Path(path)
    try:
        cells = mesh_cells(path, resolution, up_axis, normalization)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a mesh file.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    grid = np.zeros((1, resolution, resolution, resolution), dtype=np.uint8)
    grid[0, cells[:, 0], cells[:, 1], cells[:, 2]] = 1
    return torch.from_numpy(grid)


def require_trimesh() -> ModuleType:
    """Return trimesh. Raises ConfigError with the command that mends it where it is missing."""
    try:
        import trimesh
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install trimesh") from error
    return trimesh


def require_open3d() -> ModuleType:
    """Return open3d. Raises ConfigError with the command that mends it where it cannot be loaded."""
    try:
        import open3d
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install open3d") from error
    except (ImportError, OSError) as error:  # a shared library that the system lacks
        raise ConfigError(
            f"open3d cannot be loaded ({error}). On Debian or Ubuntu: apt-get install libusb-1.0-0 libgl1 libgomp1"
        ) from error
    return open3d
