"""Load what the page shows and serve it until Ctrl-C or SIGTERM.

Waitress serves it: a request takes a thread only when it has arrived as a whole, so slow and dead connections hold
none, and threads, connections and the sizes of requests are bounded.
"""

import argparse
import errno
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..utils.command import pick_device
from ..utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..datasets.sparse_structure import SparseStructure
    from ..tokenizer import SparseStructureTokenizer

CONNECTIONS = 64  # at most; a browser has up to 6
IDLE_SECONDS = 60  # after which a connection is closed on which nothing comes, within a request or between two
CLEANUP_SECONDS = 10  # between two looks for such connections


def serve(args: argparse.Namespace) -> None:
    """Serve the page until a signal ends it.

    args: see `__main__.parse_args`.
    Raise UserError if something cannot be loaded or served.
    """
    try:
        import dash  # noqa: F401
        import waitress  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install dash waitress") from error
    with listen(args.host, args.port) as listener:  # before loading, which takes a while
        app, usage, opener = build(args)
        server = make_server(app.server, listener, args.url_prefix)
        usage.start()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listener.getsockname()[1]}{args.url_prefix}  (Ctrl-C ends it)", flush=True)
        try:
            server.run()
        finally:
            usage.stop()
            opener.close()
            server.task_dispatcher.shutdown()  # once more: requests that waited for the opener end now
            server.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. port: 0 for a free one. Raise ConfigError if that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host is like this
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is in use at {host}: give another --port, or 0 for a free one") from error
        known = code is not None and not isinstance(error, socket.gaierror)
        reason = os.strerror(code) if known and code else error
        raise ConfigError(
            f"--host {host} --port {port}: cannot be served there ({reason}). Give another --host or --port"
        ) from error


def make_server(app: Any, listener: socket.socket, url_prefix: str = "/") -> Any:
    """Return waitress's server of a WSGI application; its run() serves until an interrupt.

    url_prefix: what is removed from the front of a path that has it. A proxy may have done so already.
    """
    from waitress import create_server

    from .uploads import MAX_BYTES, WAITING

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that requests wait for a thread is no news
    return create_server(
        app,
        sockets=[listener],
        threads=WAITING + 8,  # so that some are free while others wait for uploads
        connection_limit=CONNECTIONS,
        channel_timeout=IDLE_SECONDS,
        cleanup_interval=CLEANUP_SECONDS,
        max_request_body_size=MAX_BYTES,
        url_prefix=unquote(url_prefix).rstrip("/"),
        ident=None,
    )


def build(args: argparse.Namespace):
    """Return the application, its counter of codes, not started, and its opener of meshes."""
    from ..tokenizer import SparseStructureTokenizer
    from .app import create_app
    from .backend import Backend
    from .code_usage import UsageCounter
    from .uploads import Opener

    device = pick_device(args.device)
    if args.run:
        tokenizer = SparseStructureTokenizer.from_run(args.run)
    else:
        tokenizer = SparseStructureTokenizer.load(args.tokenizer)
    tokenizer = tokenizer.to(device)
    dataset = open_data(args, tokenizer)
    name = Path(args.run or args.tokenizer)
    backend = Backend(tokenizer, dataset, Path(args.run) if args.run else None, "/".join(name.parts[-2:]))
    usage, opener = UsageCounter(backend), Opener()
    return create_app(backend, usage, opener, args.host, args.url_prefix), usage, opener


def open_data(args: argparse.Namespace, tokenizer: "SparseStructureTokenizer") -> "SparseStructure | None":
    """Return the data of --data_dir, or else the run's if they still exist; None without either.

    Print notes on roots of --data_dir that differ from one another or from the tokenizer's settings.
    Raise DataError if --data_dir cannot be read, or has grids of another normalization.
    """
    from ..datasets.metadata import compare_with_tokenizer
    from ..datasets.sparse_structure import SparseStructure
    from ..runs.open import open_run

    resolution = tokenizer.resolution
    if args.data_dir:
        dataset = SparseStructure(args.data_dir, resolution=resolution, split="all")
        differing = compare_with_tokenizer(dataset.settings, tokenizer.up_axis, tokenizer.normalization)
        for note in (*dataset.notes, *differing):
            print(f"note: {note}", file=sys.stderr)
        return dataset
    if not args.run:
        return None
    data_dir = open_run(args.run, flag="--run").data_dir
    if data_dir is None:
        return None
    try:
        return SparseStructure(data_dir, resolution=resolution, split="all")
    except DataError as error:
        print(f"without data: {error}\nGive --data_dir to pick objects and to count codes.", file=sys.stderr)
        return None
