"""What the page asks the server, and what the browser does itself (assets/viewer.js)."""

import base64
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, no_update

from ..datasets.base import StandardDatasetBase
from ..evaluation.metrics import occupied_blocks
from ..grids.voxels import occupancy_to_points, write_ply
from ..utils.errors import DataError
from . import details, figures
from .backend import Backend
from .code_usage import UsageCounter
from .curves import curves_figures, read_log, state_of
from .layout import PANELS, chip, curve_panels
from .page_state import EditedObject, check_code, dataset_key, dataset_mesh, edits_of, new_object, open_object
from .uploads import Opener

LISTED = 60  # objects in the list at once; typing finds the others
WRITTEN = {"y": "y", "z": "auto", "keep": "keep"}  # `up_axis` of a downloaded mesh by the object's axis
NO_OBJECT = "there is no object yet: drop a mesh or pick an object first"
NEARBY = 32  # codes that "a similar code" steps through


def add_callbacks(app: Dash, backend: Backend, usage: UsageCounter, opener: Opener) -> None:
    """Add all that answers the page."""
    add_browser_side(app)
    add_counting(app, usage)
    add_drawing(app, backend, usage)
    add_editing(app, backend)
    add_downloads(app, backend)
    if backend.dataset is not None:
        add_picking(app, backend, backend.dataset, opener)
    if backend.run_dir is not None:
        run_dir = backend.run_dir

        @app.callback(
            Output("curves", "children"),
            Output("state", "children"),
            Output("message", "children", allow_duplicate=True),
            Input("tabs", "value"),
            Input("read-curves", "n_clicks"),
            prevent_initial_call=True,
        )
        def curves(tab: str, _):
            if tab != "curves":
                return no_update, no_update, no_update
            return curve_panels(curves_figures(read_log(run_dir / "log.txt"))), state_of(run_dir), ""


def add_browser_side(app: Dash) -> None:
    """Add what needs no server: cameras, the choice of a token, and dropped files."""

    def own(name: str, *args) -> None:
        app.clientside_callback(ClientsideFunction("viewer", name), *args)

    for name in (*PANELS, "lattice"):
        if name != "mesh":
            panel = f"panel-{name}"
            own("show", Output(panel, "figure"), Input(f"figure-{name}", "data"), State(panel, "id"))
    own(
        "showMesh",
        Output("panel-mesh", "figure"),
        Output("caption-mesh", "children"),
        Input("figure-mesh", "data"),
        Input("object", "data"),
    )
    own("mark", Output("marked", "data"), Input("chosen", "data"), State("facts", "data"))
    own("resetView", Output("reset-view", "title"), Input("reset-view", "n_clicks"))
    own("setAxes", Output("axes", "data"), Input("up-axis", "value"), State("facts", "data"))


def add_picking(app: Dash, backend: Backend, dataset: StandardDatasetBase, opener: Opener) -> None:
    """Add the list of the data set's objects."""
    names, splits = backend.object_names(), dataset.texts("split")
    order = sorted(range(len(dataset)), key=lambda index: splits[index] != "val")  # held-out ones first

    def option(index: int) -> dict[str, Any]:
        note = " (held out)" if splits[index] == "val" else ""
        return {"label": names[index] + note, "value": index}

    @app.callback(
        Output("pick", "options"),
        Output("pick", "value"),
        Input("pick", "search_value"),
        Input("previous-object", "n_clicks"),
        Input("next-object", "n_clicks"),
        Input("random-object", "n_clicks"),
        State("pick", "value"),
    )
    def pick(search: str | None, _previous, _next, _random, value: int | None):
        cause = ctx.triggered_id
        if cause == "pick":
            pass
        elif value is None:
            value = order[0]
        elif cause in ("previous-object", "next-object"):
            step = 1 if cause == "next-object" else -1
            value = order[(order.index(value) + step) % len(order)]
        else:
            value = random.choice(order)
        wanted = (search or "").lower()
        found = [*itertools.islice((index for index in order if wanted in names[index].lower()), LISTED)]
        if value is not None and value not in found:
            found.insert(0, value)
        return [option(index) for index in found], no_update if cause == "pick" else value

    @app.callback(
        Output("object", "data"), Output("message", "children"), Input("pick", "value"), prevent_initial_call=True
    )
    def take(index: int | None):
        if index is None:
            return no_update, no_update
        axis = backend.grid_axis(index)
        return new_object(backend, backend.object(index), names[index], dataset_key(index), axis), ""

    @app.callback(Output("figure-mesh", "data"), Input("pick", "value"), prevent_initial_call=True)
    def take_mesh(index: int | None):
        return no_update if index is None else dataset_mesh(backend, opener, index)


def add_counting(app: Dash, usage: UsageCounter) -> None:
    """Add the line that says how far counting codes has come."""

    @app.callback(
        Output("progress", "children"),
        Output("counted", "data"),
        Output("poll", "disabled"),
        Input("poll", "n_intervals"),
    )
    def progress(_):
        text, ended = details.progress_text(usage)
        return text, ended or no_update, ended


def add_drawing(app: Dash, backend: Backend, usage: UsageCounter) -> None:
    """Add the panels, the scores and the chosen token."""
    colors = backend.colors()

    def tokens_of(shown: EditedObject) -> figures.Tokens:
        ids = backend.of_tokens(shown.ids)
        rows = np.maximum(ids[:, 0] - backend.first_code, 0)  # what empty tokens get is not shown
        occupied = occupied_blocks(torch.from_numpy(backend.decode(shown.ids))[None, None], backend.lattice)
        return figures.Tokens(
            backend.lattice,
            ids,
            backend.first_code,
            occupied.flatten().numpy(),
            backend.empty(shown.ids),
            np.any(backend.of_tokens(shown.ids != shown.before), axis=1),
            usage.counts(0)[rows] if usage.done == usage.sampled > 0 else None,
            colors[rows],
        )

    @app.callback(
        Output("figure-voxels", "data"),
        Output("caption-voxels", "children"),
        Input("object", "data"),
        prevent_initial_call=True,
    )
    def voxels(state: dict):
        grid = open_object(backend, state, None).grid
        return figures.voxel_figure(grid), f"{grid.sum():,} of {backend.resolution}³ are occupied"

    @app.callback(
        Output("figure-reconstruction", "data"),
        Output("caption-reconstruction", "children"),
        Output("legend-reconstruction", "children"),
        Output("figure-difference", "data"),
        Output("caption-difference", "children"),
        Output("scores", "children"),
        Input("object", "data"),
        Input("edits", "data"),
        prevent_initial_call=True,
    )
    def reconstruction(state: dict | None, edits: dict | None):
        if state is None:
            return (no_update,) * 6
        shown = open_object(backend, state, edits)
        before, after = backend.decode(shown.before), backend.decode(shown.ids)
        legend = [
            chip(figures.ADDED, f"{(after & ~before).sum():,} added by edits"),
            chip(figures.REMOVED, f"{(before & ~after).sum():,} removed"),
        ]
        wrong = f"{(shown.grid & ~after).sum():,} missing, {(after & ~shown.grid).sum():,} extra"
        return (
            figures.reconstruction_figure(before, after),
            f"{after.sum():,} voxels",
            legend if shown.edits else [],
            figures.difference_figure(shown.grid, after),
            wrong,
            details.score_tiles(backend, shown),
        )

    @app.callback(
        Output("figure-lattice", "data"),
        Output("caption-lattice", "children"),
        Output("chosen", "data", allow_duplicate=True),
        Output("layer-number", "value", allow_duplicate=True),
        Input("object", "data"),
        Input("edits", "data"),
        Input("counted", "data"),
        State("chosen", "data"),
        prevent_initial_call=True,
    )
    def lattice(state: dict | None, edits: dict | None, _, chosen: int | None):
        if state is None:
            return (no_update,) * 4
        tokens = tokens_of(open_object(backend, state, edits))
        what = "are not empty" if backend.empty_code else "have voxels"
        caption = f"{tokens.boxed.sum():,} of {len(tokens.ids):,} {what}"
        figure = figures.lattice_figure(tokens, backend.resolution)
        fresh = any(cause["prop_id"] == "object.data" for cause in ctx.triggered) or chosen is None
        if not fresh or not tokens.boxed.any():
            return figure, caption, no_update, no_update
        # Choose a token that is shown: the one chosen in the previous object may be empty here.
        chosen = int(np.flatnonzero(tokens.boxed)[tokens.boxed.sum() // 2])
        return figure, caption, chosen, chosen % backend.lattice[2]

    @app.callback(
        Output("layer", "figure"),
        Output("caption-layer", "children"),
        Input("object", "data"),
        Input("edits", "data"),
        Input("chosen", "data"),
        Input("layer-number", "value"),
        Input("counted", "data"),
        prevent_initial_call=True,
    )
    def layer(state: dict | None, edits: dict | None, chosen: int | None, number: int, _):
        if state is None:
            return no_update, no_update
        figure = figures.layer_figure(tokens_of(open_object(backend, state, edits)), number, chosen)
        return figure, f"z = {number} of 0 to {backend.lattice[2] - 1}"

    @app.callback(
        Output("token", "children"),
        Output("caption-token", "children"),
        Output("code", "value"),
        Output("editor", "className"),
        Input("object", "data"),
        Input("edits", "data"),
        Input("chosen", "data"),
        Input("part", "value"),
        Input("counted", "data"),
        prevent_initial_call=True,
    )
    def token(state: dict | None, edits: dict | None, chosen: int | None, part: str, _):
        if state is None or chosen is None:
            return (no_update,) * 4
        shown = open_object(backend, state, edits)
        x, y, z = np.unravel_index(chosen, backend.lattice)
        code = int(shown.ids[chosen * backend.codes_per_token + int(part)])
        content = details.token_card(backend, usage, shown, chosen, int(part))
        return content, f"number {chosen}: x {x}, y {y}, z {z}", code, "editor"


def add_editing(app: Dash, backend: Backend) -> None:
    """Add the buttons that change codes."""
    names = ("set", "similar", "empty", "undo", "reset")

    @app.callback(
        Output("edits", "data"),
        Output("message", "children", allow_duplicate=True),
        *(Input(f"edit-{name}", "n_clicks") for name in names),
        Input("code", "n_submit"),
        State("object", "data"),
        State("edits", "data"),
        State("chosen", "data"),
        State("part", "value"),
        State("code", "value"),
        prevent_initial_call=True,
    )
    def edit(*args):
        state, edits, chosen, part, code = args[-5:]
        if state is None or chosen is None:
            return no_update, no_update
        shown = open_object(backend, state, edits)
        done = list(edits_of(state, edits))
        index = chosen * backend.codes_per_token + int(part)
        kind = ctx.triggered_id.removeprefix("edit-")
        if kind == "reset":
            done = []
        elif kind == "undo":
            done = done[:-1]
        else:
            if kind == "similar":
                code = similar_code(backend, shown, index)
            elif kind == "empty":
                code = int(backend.empty_ids[index])
            done.append([index, check_code(backend, code)])
        return {"of": state["key"], "list": done}, ""


def similar_code(backend: Backend, shown: EditedObject, index: int) -> int:
    """Return the next code in order of distance from the encoder's, so that each call goes one code farther."""
    if shown.before[index] < backend.first_code:
        raise DataError("the encoder found this token empty, so no code is similar to its own. Type a code")
    near = [int(shown.before[index]), *backend.neighbors(int(shown.before[index]), NEARBY)]
    if len(near) == 1:
        raise DataError("this quantizer has no single codebook, so no codes are similar. Type a code")
    present = int(shown.ids[index])
    return near[(near.index(present) + 1) % len(near)] if present in near else near[1]


def add_downloads(app: Dash, backend: Backend) -> None:
    """Add the buttons that save files, and those that copy texts."""
    for form in backend.forms:

        @app.callback(
            Output(f"copy-{form}", "content"),
            Input(f"copy-{form}", "n_clicks"),
            State("object", "data"),
            State("edits", "data"),
            prevent_initial_call=True,
        )
        def copy(_, state: dict | None, edits: dict | None, form=form):
            if state is None:
                raise DataError(NO_OBJECT)
            return backend.tokenizer.to_text(torch.from_numpy(open_object(backend, state, edits).ids), form)

    kinds = ("glb", "ply", "voxels", "tokens")

    @app.callback(
        Output("download", "data"),
        *(Input(f"save-{kind}", "n_clicks") for kind in kinds),
        State("object", "data"),
        State("edits", "data"),
        prevent_initial_call=True,
    )
    def download(*args):
        state, edits = args[-2:]
        if state is None:
            raise DataError(NO_OBJECT)
        shown = open_object(backend, state, edits)
        name, content = saved(backend, shown, ctx.triggered_id.removeprefix("save-"))
        return {"filename": name, "content": base64.b64encode(content).decode(), "base64": True}


def saved(backend: Backend, shown: EditedObject, kind: str) -> tuple[str, bytes]:
    """Return name and content of a file for the visitor.

    kind: "glb" or "ply", a smoothed mesh; "voxels", points as voxelize.py writes them; "tokens", JSON.
    An edited object has a name of its own.
    A mesh has the axes of the file that the object comes from; but of a z-up file a GLB is y-up, as glTF says.
    """
    stem = Path(shown.name).stem + ("_edited" if shown.edits else "")
    if kind == "tokens":
        tokenizer = backend.tokenizer
        facts = {
            "tokenizer_hash": backend.hash, "source": shown.name, "resolution": backend.resolution,
            "normalization": tokenizer.normalization, "up_axis": tokenizer.up_axis, "lattice": backend.lattice,
            "axis": shown.axis, "codes_per_token": backend.codes_per_token, "n_embed": backend.n_embed,
            "empty_code": backend.empty_code, "tokens": shown.ids.tolist(),
            "form": backend.forms[-1], "text": tokenizer.to_text(torch.from_numpy(shown.ids), backend.forms[-1]),
        }  # fmt: skip
        return f"{stem}_tokens.json", (json.dumps(facts) + "\n").encode()
    name = f"{stem}_voxels.ply" if kind == "voxels" else f"{stem}_decoded.{kind}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file.{'ply' if kind == 'voxels' else kind}")
        if kind == "voxels":
            grid = backend.decode(shown.ids)
            if not grid.any():
                raise DataError("the reconstruction has no voxel to write")
            write_ply(path, occupancy_to_points(grid))
        else:
            with backend.compute:
                backend.tokenizer.save_mesh(torch.from_numpy(shown.ids), path, up_axis=WRITTEN[shown.axis])
        return name, path.read_bytes()
