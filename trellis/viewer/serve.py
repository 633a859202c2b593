"""Load what the page shows and serve it until Ctrl-C or SIGTERM."""

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.command import pick_device
from ..utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..datasets.sparse_structure import SparseStructure
    from ..tokenizer import SparseStructureTokenizer


def serve(args: argparse.Namespace) -> None:
    """Serve the page until a signal ends it.

    args: see `__main__.parse_args`.
    Raise UserError if something cannot be loaded or served.
    """
    stop_on_signals()
    try:
        import dash  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install dash") from error
    app, usage, opener = build(args)
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    try:
        server = make_server(args.host, args.port, app.server, threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug exits if the port is taken
        raise ConfigError(
            f"--host {args.host} --port {args.port}: cannot be served there ({error}). Give another "
            "--port, or 0 for a free one."
        ) from error
    usage.start()
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        opener.close()


def stop_on_signals() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt.

    A shell starts a command in the background with SIGINT ignored, and Python leaves that as it is.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


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
    return create_app(backend, usage, opener, args.host), usage, opener


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
