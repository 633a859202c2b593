"""The Dash application: the page, the address for uploads, and errors as sentences on the page."""

import logging
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from dash import Dash, set_props
from flask import Response, abort, request
from plotly.io.json import to_json_plotly

from ..grids.placing import check_settings
from ..utils.errors import DataError, UserError
from .backend import Backend
from .callbacks import add_callbacks
from .code_usage import UsageCounter
from .layout import page
from .page_state import opened_upload
from .uploads import MAX_BYTES, Opener, check_name

MAX_REQUEST = 4 * 2**20  # bytes that the page may send but for uploads; it sends some tens of kB
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNEXPECTED = "Something went wrong here; the terminal that the page was started from says what."
log = logging.getLogger(__name__)


def create_app(
    backend: Backend, usage: UsageCounter, opener: Opener, host: str = "127.0.0.1", url_prefix: str = "/"
) -> Dash:
    """Return the application. Its own addresses begin at /, whatever the prefix.

    host: address it is served at. At a loopback address without a prefix, only requests to a loopback name are
        answered, so that no page of another site can reach it through a name of its own.
    url_prefix: path under which the browser finds the page, with a slash at both ends. Other than /, it belongs to a
        proxy, which may send the name that it has itself.
    """
    app = Dash(
        "trellis.viewer",
        title="Tokens of sparse structures",
        update_title=None,  # type: ignore[arg-type]  # None keeps the title, says Dash's documentation
        serve_locally=True,
        assets_folder=str(Path(__file__).parent / "assets"),
        routes_pathname_prefix="/",
        requests_pathname_prefix=url_prefix,
        on_error=tell_page,
        enable_mcp=False,
    )
    app.server.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST
    if host in LOOPBACK and url_prefix == "/":
        refuse_other_names(app)
    app.layout = page(backend, f"{url_prefix}upload")
    add_callbacks(app, backend, usage, opener)
    add_uploads(app, backend, opener)
    return app


def refuse_other_names(app: Dash) -> None:
    """Answer 400 to requests for a host that is not in LOOPBACK. Flask's TRUSTED_HOSTS cannot hold IPv6 addresses."""

    @app.server.before_request
    def check_host() -> None:
        try:
            host = urlsplit(f"//{request.host}").hostname
        except ValueError:
            host = None
        if host not in LOOPBACK:
            abort(400)


def tell_page(error: Exception) -> None:
    """Show an error of a callback on the page, and leave the rest of the page unchanged."""
    set_props("message", {"children": message(error)})


def message(error: Exception) -> str:
    """Return what the page says about an error; log those that are bugs."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:  # a file of the data or of the run that is there no more
        return f"{error.filename}: {error.strerror}"
    log.error("unexpected error", exc_info=error)
    return UNEXPECTED


def add_uploads(app: Dash, backend: Backend, opener: Opener) -> None:
    """Add POST upload?name=…&up_axis=… with the file as body, answered by {"object", "mesh"} or, with 400, {"error"}.

    The header X-Viewer is required, since a page of another site may not send it.
    """

    @app.server.post("/upload")
    def upload() -> Response:
        try:
            if "X-Viewer" not in request.headers:
                raise DataError("uploads come from the viewer's own page")
            name, up_axis = request.args.get("name", ""), request.args.get("up_axis", "")
            suffix = check_name(name)
            check_settings(up_axis, backend.tokenizer.normalization)
            name = Path(name).name
            size = request.content_length or 0
            if not size:
                raise DataError(f"{name}: the file is empty. Export it again")
            if size > MAX_BYTES:
                raise DataError(f"{name}: has {size:,} bytes, more than {MAX_BYTES // 2**20} MiB. Simplify the mesh")
            request.max_content_length = MAX_BYTES
            with tempfile.TemporaryDirectory(prefix="viewer-") as folder:
                path = Path(folder, f"upload{suffix}")
                try:
                    with open(path, "wb") as file:
                        while piece := request.stream.read(1 << 20):
                            file.write(piece)
                except OSError as error:
                    raise DataError(f"{name}: the server cannot keep the file ({error.strerror})") from error
                state, mesh = opened_upload(backend, opener, path, name, up_axis)
            return Response(to_json_plotly({"object": state, "mesh": mesh}), mimetype="application/json")
        except Exception as error:  # whatever it is, the page gets a sentence and the server goes on
            return Response(to_json_plotly({"error": message(error)}), status=400, mimetype="application/json")
