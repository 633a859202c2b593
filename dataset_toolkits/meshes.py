"""From a mesh file to the voxels that its triangles meet: load, turn to z-up, scale, voxelise."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import trimesh

from trellis.datasets.voxels import cell_centres, write_ply
from trellis.utils.errors import ConfigError, DataError

HALF = 0.5 - 1e-6  # TRELLIS's clip: just inside the cube
DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")


def load_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Load all triangles of a file, scene nodes' transforms applied, without vertices that no triangle uses.

    Returns vertices [V, 3] float64 in the file's units and axes, and faces [F, 3] int64.
    Raises DataError with the reason where there is nothing to voxelise.
    """
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes)")
    options = {"process": False}
    if path.suffix.lower() in (".glb", ".gltf", ".obj"):
        options["skip_materials"] = True  # textures may be missing, and are of no use here
    try:
        if path.suffix.lower() in (".glb", ".gltf"):
            _check_gltf(path)
        scene = trimesh.load_scene(path, **options)
        parts = [(trimesh.transform_points(mesh.vertices, transform), np.asarray(mesh.faces, dtype=np.int64))
                 for transform, mesh in _placed_meshes(scene) if len(mesh.faces)]
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


def _placed_meshes(scene: trimesh.Scene) -> Iterator[tuple[np.ndarray, trimesh.Trimesh]]:
    """Yield the transform [4, 4] and the mesh of every scene node; points and curves are passed over."""
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        if isinstance(scene.geometry[name], trimesh.Trimesh):
            yield transform, scene.geometry[name]


def _check_gltf(path: Path) -> None:
    """Raise DataError where a glTF file needs a decoder that is not there: its vertices would be zeros."""
    content = path.read_bytes()
    if content[:4] == b"glTF":
        content = content[20:20 + int.from_bytes(content[12:16], "little")]
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
    """
    import open3d

    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(np.clip(vertices, -HALF, HALF)), open3d.utility.Vector3iVector(faces))
    grid = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, voxel_size=1 / resolution, min_bound=(-0.5,) * 3, max_bound=(0.5,) * 3)
    cells = np.array([voxel.grid_index for voxel in grid.get_voxels()], dtype=np.int64).reshape(-1, 3)
    return cells[np.lexsort(cells.T[::-1])]


def voxelize_file(path: Path, target: Path, resolution: int, up_axis: str, normalized: bool) -> int:
    """Voxelise a mesh file into the PLY file `target` and return the number of voxels.

    up_axis "y" rotates x y z to x -z y. A `normalized` mesh lies in the unit cube and is taken as it is.
    Raises DataError with the reason where the mesh cannot be voxelised.
    """
    vertices, faces = load_mesh(path)
    if not np.isfinite(vertices).all():
        bad = int(np.isfinite(vertices).all(axis=1).argmin())
        raise DataError(f"vertex {vertices[bad].tolist()} is not finite")
    if up_axis == "y":
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    if not normalized:
        vertices = normalize(vertices)
    elif np.abs(vertices).max() > 0.5 + 1e-3:
        raise DataError(f"is not normalised to the unit cube: a coordinate is {np.abs(vertices).max():g}")
    cells = voxelize_mesh(vertices, faces, resolution)
    if not len(cells):
        raise DataError("has no voxels: no triangle meets a cell")
    write_ply(target, cell_centres(cells, resolution))
    return len(cells)


def require_open3d() -> None:
    """Raise ConfigError with the command that mends it where open3d cannot be loaded."""
    try:
        import open3d  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install open3d") from error
    except (ImportError, OSError) as error:  # a shared library that the system lacks
        raise ConfigError(f"open3d cannot be loaded ({error}). On Debian or Ubuntu: "
                          "apt-get install libusb-1.0-0 libgl1 libgomp1") from error
