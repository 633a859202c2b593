"""What a visitor looks at, as it travels between their tab and the server; the server keeps none of it.

An object is {"key", "name", "grid", "ids"}, a mesh {"of": key of its object, "figure", "caption"}, and edits are
{"of": key of their object, "list": [[place in ids, code], ...]}, the last one last.
"""

import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..grids.surface import surface_mesh
from ..grids.voxels import voxels_to_grid
from ..utils.errors import DataError, UserError
from .figures import mesh_figure
from .uploads import Opener, Shape, simplified
from .workbench import Workbench, pack_grid, pack_ids, unpack_grid, unpack_ids


class Visit(NamedTuple):
    """An object with its edits. grid: [R, R, R] bool; before, ids: [T] int64, as encoded and as edited; edits:
    {place: code}, those that differ from `before`."""

    name: str
    grid: np.ndarray
    before: np.ndarray
    ids: np.ndarray
    edits: dict[int, int]


def new_object(workbench: Workbench, grid: np.ndarray, name: str, key: str) -> dict[str, str]:
    return {"key": key, "name": name, "grid": pack_grid(grid), "ids": pack_ids(workbench.encode(grid))}


def open_visit(workbench: Workbench, state: dict[str, str], edits: dict[str, Any] | None) -> Visit:
    """Raises DataError for what this page would not have sent."""
    grid = unpack_grid(state["grid"], workbench.resolution)
    before = unpack_ids(state["ids"], workbench.num_tokens, workbench.n_embed)
    ids = before.copy()
    for place, code in edits_of(state, edits):
        if not 0 <= place < workbench.num_tokens:
            raise DataError(f"token place {place}: there are {workbench.num_tokens}. Reload the page")
        ids[place] = check_code(workbench, code)
    changed = np.flatnonzero(ids != before)
    return Visit(str(state["name"]), grid, before, ids, {int(place): int(ids[place]) for place in changed})


def edits_of(state: dict[str, str], edits: dict[str, Any] | None) -> list[list[int]]:
    """The edits of this object; those of the one before it do not count."""
    return edits["list"] if edits and edits["of"] == state["key"] else []


def check_code(workbench: Workbench, code: int | float | None) -> int:
    """Raises DataError for a number that is no code."""
    if not isinstance(code, (int, float)) or code != int(code) or not 0 <= code < workbench.n_embed:
        what = "nothing" if code is None else code
        raise DataError(f"the code is {what}; it must be a whole number from 0 to {workbench.n_embed - 1}")
    return int(code)


def opened_upload(workbench: Workbench, opener: Opener, path: Path, name: str, up_axis: str) -> tuple[dict, dict]:
    """The object and the mesh of an uploaded file. Raises DataError with a message for the page."""
    normalization = workbench.tokenizer.normalization
    try:
        shape = opener.open(path, workbench.resolution, up_axis, normalization, voxelize=True)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), name)
        raise DataError(f"{name}: {reason}") from error
    assert shape.voxels is not None
    grid = voxels_to_grid(shape.voxels, workbench.resolution) > 0
    state = new_object(workbench, grid, name, f"upload-{uuid.uuid4().hex}")
    mesh = shape_mesh(workbench, shape) if shape.vertices is not None else surface(workbench, grid, "a file of voxels")
    return state, {"of": state["key"], **mesh}


def dataset_mesh(workbench: Workbench, opener: Opener, index: int) -> dict[str, Any]:
    """The mesh of an object of the data set or, where that is not there any more, the surface of its voxels."""
    mesh = workbench.mesh_file(index)
    key = dataset_key(index)
    if mesh is None:
        return {"of": key, **surface(workbench, workbench.object(index), "its mesh file is not there")}
    try:
        shape = opener.open(mesh.path, workbench.resolution, mesh.up_axis, mesh.normalization, voxelize=False)
    except UserError as error:
        return {"of": key, **surface(workbench, workbench.object(index), f"its mesh file: {error}")}
    return {"of": key, **shape_mesh(workbench, shape)}


def dataset_key(index: int) -> str:
    return f"object-{index}"


def shape_mesh(workbench: Workbench, shape: Shape) -> dict[str, Any]:
    caption = f"{shape.triangles:,} triangles"
    if len(shape.faces) < shape.triangles:
        caption += f", drawn with {len(shape.faces):,}"
    return {"figure": mesh_figure(shape.vertices, shape.faces, workbench.resolution), "caption": caption}


def surface(workbench: Workbench, grid: np.ndarray, reason: str) -> dict[str, Any]:
    """In place of a mesh, a smooth surface around its voxels, and the reason."""
    mesh = surface_mesh(grid)
    vertices, faces = simplified(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    figure = mesh_figure((vertices + 0.5) * workbench.resolution, faces, workbench.resolution)
    return {"figure": figure, "caption": f"surface of the voxels; {reason}"}
