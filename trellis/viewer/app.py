"""The Dash application: the page, the address that uploads go to, and what becomes of errors."""

import logging
import tempfile
from pathlib import Path

from dash import Dash, set_props
from flask import Response, request
from plotly.io.json import to_json_plotly

from ..grids.placing import UP_AXES
from ..utils.errors import DataError, UserError
from .callbacks import add_callbacks
from .layout import page
from .uploads import MAX_BYTES, Opener, check_name
from .usage import Usage
from .visit import opened_upload
from .workbench import Workbench

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNEXPECTED = "Something went wrong here; the terminal that the page was started from says what."
log = logging.getLogger(__name__)


def create_app(workbench: Workbench, usage: Usage, opener: Opener, host: str = "127.0.0.1") -> Dash:
    """host: where it is served; at a loopback address, only requests to such a name are answered, so that no other
    site's page can reach it through a name of its own."""
    app = Dash(
        "trellis.viewer",
        title="Tokens of sparse structures",
        update_title=None,
        serve_locally=True,
        assets_folder=str(Path(__file__).parent / "assets"),
        on_error=tell_page,
        enable_mcp=False,
    )
    # Beyond an upload, a page sends a few tens of kB.
    app.server.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    if host in LOOPBACK:
        app.server.config["TRUSTED_HOSTS"] = list(LOOPBACK)
    app.layout = page(workbench)
    add_callbacks(app, workbench, usage, opener)
    add_uploads(app, workbench, opener)
    return app


def tell_page(error: Exception) -> None:
    """Show an error of a callback on the page, and leave the rest of the page as it is."""
    set_props("message", {"children": message(error)})


def message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    log.error("unexpected error", exc_info=error)
    return UNEXPECTED


def add_uploads(app: Dash, workbench: Workbench, opener: Opener) -> None:
    """POST upload?name=…&up_axis=…, the file as body: {"object", "mesh"}, or {"error"} with status 400.

    A header of our own is required, which a page of another site may not send.
    """

    @app.server.post("/upload")
    def upload() -> Response:
        try:
            if "X-Viewer" not in request.headers:
                raise DataError("uploads come from the viewer's own page")
            name, up_axis = request.args.get("name", ""), request.args.get("up_axis", "")
            suffix = check_name(name)
            if up_axis not in UP_AXES:
                raise DataError(f"up_axis {up_axis!r}: must be one of {', '.join(UP_AXES)}")
            if not request.content_length or request.content_length > MAX_BYTES:
                raise DataError(
                    f"{name}: has {request.content_length or 0:,} bytes; it must have some, and at most "
                    f"{MAX_BYTES // 2**20} MiB. Simplify the mesh"
                )
            with tempfile.TemporaryDirectory(prefix="viewer-") as folder:
                path = Path(folder, f"upload{suffix}")
                with open(path, "wb") as file:
                    while piece := request.stream.read(1 << 20):
                        file.write(piece)
                state, mesh = opened_upload(workbench, opener, path, Path(name).name, up_axis)
            return Response(to_json_plotly({"object": state, "mesh": mesh}), mimetype="application/json")
        except Exception as error:  # whatever it is, the page gets a sentence and the server goes on
            return Response(to_json_plotly({"error": message(error)}), status=400, mimetype="application/json")
