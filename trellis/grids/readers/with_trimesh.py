"""The formats that trimesh reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from ..meshes import require_trimesh

if TYPE_CHECKING:
    import trimesh


def read(path: Path) -> Geometry:
    trimesh = require_trimesh()
    options = {"process": False}
    if path.suffix.lower() in (".glb", ".gltf", ".obj"):
        options["skip_materials"] = True  # textures may be missing and are not used
    scene = trimesh.load_scene(path, **options)
    parts = [
        (trimesh.transform_points(mesh.vertices, transform), np.asarray(mesh.faces, dtype=np.int64))
        for transform, mesh in _placed_meshes(scene)
        if len(mesh.faces)
    ]
    if not parts:
        raise DataError("has no triangles")
    offsets = np.cumsum([0] + [len(vertices) for vertices, _ in parts[:-1]])
    faces = np.concatenate([faces + offset for (_, faces), offset in zip(parts, offsets, strict=True)])
    up = "y" if path.suffix.lower() in (".glb", ".gltf") else None
    return Geometry(np.concatenate([vertices for vertices, _ in parts]), faces, up)


def _placed_meshes(scene: "trimesh.Scene") -> Iterator[tuple[np.ndarray, "trimesh.Trimesh"]]:
    """Yield the transform [4, 4] and the mesh of every scene node; skip points and curves."""
    trimesh = require_trimesh()
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        if isinstance(scene.geometry[name], trimesh.Trimesh):
            yield transform, scene.geometry[name]
