"""Show a tokenizer in the browser.

    python -m trellis.viewer --run outputs/stage2
    python -m trellis.viewer --tokenizer pretrained/mine --data_dir data/voxels

Only this machine can open the page unless --host says otherwise. Ctrl-C or SIGTERM ends it.
"""

import argparse
import sys

from ..utils.command import DEVICES, run_command


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
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}; it must lie between 0 and {2**16 - 1}")
    return args


def run(args: argparse.Namespace) -> None:
    # Worker processes import this module again and do not need the server.
    from .serve import serve

    serve(args)


def main(argv: list[str] | None = None) -> int:
    return run_command(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
