"""What a visitor looks at, as it travels between their tab and the server, which keeps none of it.

object  {"key", "name", "grid", "ids", "axis"}: see `new_object`
edits   {"of": key of the object, "list": [[index in ids, code], ...]}, the latest last
mesh    {"of": key of the object, "figure", "caption"}
"""

import uuid
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from ..grids.placing import Axis
from ..grids.surface import surface_mesh
from ..grids.voxels import voxels_to_grid
from ..utils.errors import DataError, UserError
from .backend import Backend, pack_grid, pack_ids, unpack_grid, unpack_ids
from .figures import mesh_figure
from .uploads import Opener, Shape, simplified


class EditedObject(NamedTuple):
    """An object with its edits."""

    name: str
    grid: np.ndarray  # [R, R, R] bool
    before: np.ndarray  # [T] int64, ids as encoded
    ids: np.ndarray  # [T] int64, ids as edited
    edits: dict[int, int]  # {index in ids: code}, where `ids` differs from `before`
    axis: Axis  # how the axes of the file that it comes from were taken, so that downloads have the same


def new_object(backend: Backend, grid: np.ndarray, name: str, key: str, axis: Axis) -> dict[str, Any]:
    """Return a grid [R, R, R] bool and its ids in the form that travels. axis: see `EditedObject`."""
    ids = backend.encode(grid)
    return {"key": key, "name": name, "grid": pack_grid(grid), "ids": pack_ids(ids), "axis": axis}


def open_object(backend: Backend, state: dict[str, Any], edits: dict[str, Any] | None) -> EditedObject:
    """Return an object with those of the edits that belong to it. Raise DataError for what the page would not send."""
    grid = unpack_grid(state["grid"], backend.resolution)
    before = unpack_ids(state["ids"], backend.num_tokens, backend.n_embed)
    zeros = backend.of_tokens(before < backend.first_code)
    if (zeros.any(1) != zeros.all(1)).any():
        raise DataError("a token has the empty id 0 beside codes: reload the page")
    ids = before.copy()
    for index, code in edits_of(state, edits):
        if not 0 <= index < backend.num_tokens:
            raise DataError(f"token index {index}: there are {backend.num_tokens}. Reload the page")
        change(backend, ids, index, check_code(backend, code))
    changed = {int(index): int(ids[index]) for index in np.flatnonzero(ids != before)}
    axis: Any = state.get("axis")
    if axis not in get_args(Axis):
        raise DataError(f"the object's axis is {axis!r}: reload the page")
    return EditedObject(str(state["name"]), grid, before, ids, changed, axis)


def edits_of(state: dict[str, Any], edits: dict[str, Any] | None) -> list[list[int]]:
    """Return the edits if they belong to this object, and none if they belong to the one before it."""
    return edits["list"] if edits and edits["of"] == state["key"] else []


def change(backend: Backend, ids: np.ndarray, index: int, code: int) -> None:
    """Set an id of ids [T] to a code.

    A token is empty as a whole: one that gets the empty code gets it for all of its codes, and an empty one that gets
    another code gets that for all of them.
    """
    token = backend.of_tokens(ids)[index // backend.codes_per_token]
    if code < backend.first_code or token[0] < backend.first_code:
        token[:] = code
    else:
        ids[index] = code


def check_code(backend: Backend, code: int | float | None) -> int:
    """Return the code as an int. Raise DataError for a number that is not a code."""
    wanted = f"a whole number from 0{' (empty)' if backend.empty_code else ''} to {backend.n_embed - 1}"
    if code is None:
        raise DataError(f"the field of the code holds no number: type {wanted}")
    if not isinstance(code, (int, float)) or not 0 <= code < backend.n_embed or code != int(code):
        raise DataError(f"the code is {code!r:.40}; it must be {wanted}")
    return int(code)


def opened_upload(backend: Backend, opener: Opener, path: Path, name: str, up_axis: str) -> tuple[dict, dict]:
    """Return the object and the mesh of an uploaded file. Raise DataError with a message for the page."""
    normalization = backend.tokenizer.normalization
    try:
        shape = opener.open(path, backend.resolution, up_axis, normalization, voxelize=True)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), name)
        raise DataError(f"{name}: {reason}") from error
    assert shape.voxels is not None
    grid = voxels_to_grid(shape.voxels, backend.resolution) > 0
    axis = shape.axis or backend.grid_axis()
    state = new_object(backend, grid, name, f"upload-{uuid.uuid4().hex}", axis)
    mesh = mesh_panel(backend, shape) if shape.mesh else surface_panel(backend, grid, "a file of voxels")
    return state, {"of": state["key"], **mesh}


def dataset_mesh(backend: Backend, opener: Opener, index: int) -> dict[str, Any]:
    """Return the mesh of an object of the data set, or the surface of its voxels if the mesh file cannot be shown."""
    file = backend.mesh_file(index)
    key = dataset_key(index)
    if file is None:
        return {"of": key, **surface_panel(backend, backend.object(index), "its mesh file is missing")}
    try:
        shape = opener.open(file.path, backend.resolution, file.up_axis, file.normalization, voxelize=False)
    except (UserError, OSError) as error:  # OSError: it was there a moment ago
        return {"of": key, **surface_panel(backend, backend.object(index), f"its mesh file: {error}")}
    if shape.mesh is None:
        return {"of": key, **surface_panel(backend, backend.object(index), "its file has no triangles")}
    return {"of": key, **mesh_panel(backend, shape)}


def dataset_key(index: int) -> str:
    """Return the key of an object of the data set."""
    return f"object-{index}"


def mesh_panel(backend: Backend, shape: Shape) -> dict[str, Any]:
    """Return the figure and the caption of a shape that has a mesh."""
    mesh = shape.mesh
    assert mesh is not None
    caption = f"{mesh.triangles:,} triangles"
    if len(mesh.faces) < mesh.triangles:
        caption += f", drawn with {len(mesh.faces):,}"
    caption = "; ".join([caption, *shape.notes])
    return {"figure": mesh_figure(mesh.vertices, mesh.faces, backend.resolution), "caption": caption}


def surface_panel(backend: Backend, grid: np.ndarray, reason: str) -> dict[str, Any]:
    """Return the figure and the caption of a smooth surface around voxels, shown for `reason` in place of a mesh."""
    mesh = surface_mesh(grid)
    vertices, faces = simplified(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    figure = mesh_figure((vertices + 0.5) * backend.resolution, faces, backend.resolution)
    return {"figure": figure, "caption": f"surface of the voxels; {reason}"}
