"""The surface of a grid as a triangle mesh, and mesh files to look at it with.

Marching cubes are scikit-image's, in the form of Lorensen and Cline (SIGGRAPH 1987, doi:10.1145/37402.37422): its
other form, Lewiner's, leaves holes in the surfaces of many binary grids. Smoothing is trimesh's, after Taubin
(SIGGRAPH 1995, doi:10.1145/218380.218473). Both packages are optional, so only the functions that need
them import them.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import ConfigError, DataError
from ..utils.files import atomic_write
from .placing import turn_to_y_up

if TYPE_CHECKING:
    import trimesh

SUFFIXES = (".glb", ".obj", ".ply", ".stl")
SHRINK, INFLATE = 0.5, 0.52  # Taubin's two factors lambda and mu; the pass band 1/0.5 - 1/0.52 is 0.08
SMOOTHING_STEPS = 10  # shrinking and inflating in turn


def surface_mesh(grid: np.ndarray, smooth: bool = True) -> "trimesh.Trimesh":
    """Return the closed surface around the occupied voxels, with normals that point outwards.

    grid: [R, R, R] bool, or numbers that are occupied if > 0.
    smooth: even out the steps between voxels. This keeps the volume of parts that are several voxels thick; rods of one
        voxel get thinner, and a single voxel shrinks to a speck.
    The mesh lies in [-0.5, 0.5]^3 on the grid's axes; voxel (i, j, k) covers x in [i/R - 0.5, (i+1)/R - 0.5), likewise
    y and z. Without smoothing, exactly the centers of the occupied voxels lie inside: each vertex is half way between
    the centers of an occupied and an empty voxel.
    Raise DataError for a grid without an occupied voxel, ValueError for another shape, ConfigError if a package is
    missing.
    """
    if grid.ndim != 3 or len(set(grid.shape)) != 1:
        raise ValueError(f"the grid must be [R, R, R], not {list(grid.shape)}")
    occupied = grid > 0
    if not occupied.any():
        raise DataError("the grid has no occupied voxel, so it has no surface. Do its tokens encode an empty grid?")
    trimesh, measure = _require_packages()
    resolution = len(grid)
    vertices, faces, _, _ = measure.marching_cubes(  # padded, so that it closes at the border of the cube too
        np.pad(occupied, 1).astype(np.float32), 0.5, method="lorensen", gradient_direction="ascent"
    )
    # Voxel i is padded voxel i + 1, whose center is vertex i + 1: its coordinate is (i + 0.5) / R - 0.5.
    mesh = trimesh.Trimesh((vertices.astype(np.float64) - 0.5) / resolution - 0.5, faces, process=False)
    if smooth:
        trimesh.smoothing.filter_taubin(mesh, lamb=SHRINK, nu=INFLATE, iterations=SMOOTHING_STEPS)
        mesh.vertices = mesh.vertices.clip(-0.5, 0.5)  # inflating exceeds the cube by a tenth of a voxel
    return mesh


def save_mesh(mesh: "trimesh.Trimesh", path: str | os.PathLike, to_y_up: bool) -> None:
    """Write a mesh as GLB, OBJ, PLY or STL, by the suffix of `path`, atomically. Replace a file that is there.

    to_y_up: turn it from z-up to y-up, which reading with up_axis "y" undoes.
    Raise ConfigError for another suffix, or if the folder is missing.
    """
    path = Path(path)
    kind = check_mesh_suffix(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}. Make it first.")
    if to_y_up:
        mesh = mesh.copy()
        mesh.vertices = turn_to_y_up(np.asarray(mesh.vertices))
    if kind == "glb":
        import trimesh

        # glTF's default material is a metal, which is black in a viewer that gives it nothing to mirror.
        matte = trimesh.visual.material.PBRMaterial(
            baseColorFactor=(200, 200, 200, 255), metallicFactor=0.0, roughnessFactor=1.0
        )
        mesh = trimesh.Trimesh(
            mesh.vertices, mesh.faces, process=False, visual=trimesh.visual.TextureVisuals(material=matte)
        )
        # Without normals viewers show every triangle flat.
        content: Any = mesh.export(file_type=kind, include_normals=True)
    else:
        content = mesh.export(file_type=kind)
    with atomic_write(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_mesh_suffix(path: str | os.PathLike) -> str:
    """Return the format of a mesh file to write, such as "glb". Raise ConfigError for a suffix not in SUFFIXES."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a mesh is written as {', '.join(SUFFIXES)}, not as {suffix!r}. Name the file so.")
    return suffix[1:]


def _require_packages() -> tuple[ModuleType, ModuleType]:
    """Return trimesh and skimage.measure. Raise ConfigError with the command that installs them if one is missing.

    scikit-image depends on scipy, which trimesh's smoothing needs.
    """
    try:
        import skimage.measure
        import trimesh
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install scikit-image trimesh") from error
    return trimesh, skimage.measure
