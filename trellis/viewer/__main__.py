"""Show a tokenizer in the browser.

    python -m trellis.viewer --run outputs/stage2
    python -m trellis.viewer --tokenizer pretrained/mine --data_dir data/voxels

Only this machine can open the page unless --host says otherwise. Ctrl-C or SIGTERM ends it, with exit code
0 once the page is shown.
"""

import argparse
import re
import signal
import sys

from ..utils import signals
from ..utils.command import DEVICES, run_command

PREFIX = re.compile(r"(/(?!/)([\w.~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)+", re.ASCII)  # path of RFC 3986


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trellis.viewer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of a VQ-VAE; its training curves are shown too")
    source.add_argument(
        "--tokenizer", help="folder of save_pretrained, run folder, file of ShapeLLM-Omni, or id on the Hub"
    )
    parser.add_argument("--data_dir", help="data roots, separated by commas (default: the run's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8050, help="default 8050; 0 takes a free one")
    parser.add_argument(
        "--url_prefix",
        default="/",
        help="path under which a proxy shows the page, such as /user/NAME/proxy/8050/ of JupyterHub; the proxy may "
        "remove it or not, and decides who may see the page (default /)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}; it must lie between 0 and {2**16 - 1}")
    if not PREFIX.fullmatch(args.url_prefix):
        parser.error(f"--url_prefix is {args.url_prefix!r}; it must be a path alone, such as /user/NAME/proxy/8050/")
    args.url_prefix = args.url_prefix.rstrip("/") + "/"
    return args


def run(args: argparse.Namespace) -> None:
    # Worker processes import this module again and do not need the server.
    from .serve import serve

    serve(args)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # A shell starts a command in the background with SIGINT ignored; nothing else would end the page in order.
    signals.heed(signal.SIGINT, signal.SIGTERM)
    return run_command(run, args)


if __name__ == "__main__":
    sys.exit(main())
