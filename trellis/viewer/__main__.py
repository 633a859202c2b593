"""Show a tokenizer in the browser.

    python -m trellis.viewer --run outputs/stage2
    python -m trellis.viewer --tokenizer pretrained/mine --data_dir data/voxels

The page is served to this machine alone unless --host says otherwise; Ctrl-C ends it.
"""

import argparse
import sys


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trellis.viewer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of a VQ-VAE; its curves are shown too")
    source.add_argument("--tokenizer", help="folder of save_pretrained, run, file of ShapeLLM-Omni's, Hub id")
    parser.add_argument("--data_dir", help="data roots, separated by commas (default: those of the run)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8050, help="default 8050; 0 takes a free one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}; it must lie between 0 and {2**16 - 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # Worker processes import this module again, and need none of this.
    from ..utils.errors import UserError
    from .serve import serve

    try:
        serve(args)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
