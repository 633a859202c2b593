"""Check, describe, join, divide and clean data sets of grids.

    python dataset_toolkits/dataset.py verify data/packed
    python dataset_toolkits/dataset.py stats data/packed --output outputs/data_stats
    python dataset_toolkits/dataset.py merge data/a,data/b --output data/all
    python dataset_toolkits/dataset.py filter data/all --where "num_voxels >= 200" --where "kind in chair, table" \\
        --keep wanted.txt --drop bad.txt --output data/good
    python dataset_toolkits/dataset.py dedupe data/good --iou 0.9 --report duplicates.csv --output data/unique
    python dataset_toolkits/dataset.py split data/unique --val 0.05 --family source --output data/divided
    python dataset_toolkits/dataset.py sheet data/divided --objects 40 --seed 0 --families --output sheet.png

Data are roots as train.py takes them, separated by commas: folders of shards or of voxel files, or packed .npz files.
What is written is a new folder of shards; nothing is ever changed or overwritten. A command that was interrupted leaves
nothing behind and starts over. COMMAND --help says more.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from trellis.utils.command import available_cores, run_command

COMMANDS = {
    "verify": (
        "Read every grid and every sum of the data, and name each damaged file and the objects that are lost with it. "
        "The exit code is 1 if anything is damaged."
    ),
    "stats": (
        "Count objects by source, kind and split, and measure how many voxels they have and how far they reach. Write "
        "stats.json, stats.csv and pictures."
    ),
    "merge": (
        "Join several data roots, or many small shards, into one folder of large shards. An object that is in several "
        "of them is taken once; if its grids differ, that is an error."
    ),
    "filter": (
        "Keep the objects that meet all conditions. An object that has no value in a column meets no condition on it."
    ),
    "dedupe": (
        "Find near-duplicates: objects whose grids overlap with at least --iou in one of the 48 orientations of the "
        "cube. Say how many families they form and which of these are in both train and val; with --output keep one "
        "object for each set of near-duplicates: one of val if there is any, else the lowest sha256. An object goes "
        "only if it is near to one that stays."
    ),
    "split": (
        "Divide the data into train and val such that no family is in both. A family is what near-duplicates connect, "
        "and with --family also what has the same value in a column. The sha256 of one object of a family decides, "
        "so objects that are added later move no other family. Say how many families today's split divides."
    ),
    "sheet": "Draw a random sample of the objects, or the largest families of near-duplicates.",
}


def _command(name: str) -> Callable[[argparse.Namespace], int | None]:
    """Return what does a command. Worker processes import this file too, and need none but their own."""
    from dataset_toolkits.curation import families, filtering, merging, sheets, statistics, verification

    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "verify": verification.run,
        "stats": statistics.run,
        "merge": merging.run,
        "filter": filtering.run,
        "dedupe": families.run_dedupe,
        "split": families.run_split,
        "sheet": sheets.run,
    }
    return commands[name]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from trellis.datasets.duplicates import IOU, LOWEST_IOU

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text.partition(". ")[0].partition(": ")[0], description=text)
        one.add_argument("roots", metavar="ROOTS", help="data roots, separated by commas")
        one.add_argument("--resolution", type=int, default=64, help="voxels along an axis (default 64)")
        parsers[name] = one

    shards = "new folder of shards"
    parsers["verify"].add_argument(
        "--max_workers", type=int, default=available_cores(), help="processes that read shards (default: one per core)"
    )
    parsers["stats"].add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    for name in ("merge", "filter"):
        parsers[name].add_argument("--output", required=True, type=Path, metavar="FOLDER", help=shards)
    parsers["filter"].add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help='COLUMN OPERATOR VALUE, such as "num_voxels >= 200", "kind != anatomy" or "source in a, b"; operators: '
        "==, !=, <, <=, >, >=, in. May be given several times",
    )
    for name, what in (("keep", "alone are kept"), ("drop", "are left out")):
        parsers["filter"].add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"text file whose objects, a sha256 a line, {what}"
        )
    for name in ("dedupe", "split", "sheet"):
        parsers[name].add_argument(
            "--iou",
            type=float,
            default=IOU,
            help=f"overlap of near-duplicates, from {LOWEST_IOU} to 1 (default {IOU})",
        )
    for name, what in (("dedupe", "without near-duplicates"), ("split", "with the new split")):
        parsers[name].add_argument("--output", type=Path, metavar="FOLDER", help=f"{shards} {what}; default: only tell")
        parsers[name].add_argument(
            "--report", type=Path, metavar="FILE.csv", help="new table of the objects of families of several"
        )
    parsers["split"].add_argument("--val", type=float, required=True, metavar="SHARE", help="share of val, above 0")
    parsers["split"].add_argument("--family", metavar="COLUMN", help="column whose values are families too")
    parsers["sheet"].add_argument("--output", required=True, type=Path, metavar="FILE.png", help="new picture")
    parsers["sheet"].add_argument("--objects", type=int, default=40, help="objects to draw (default 40)")
    parsers["sheet"].add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parsers["sheet"].add_argument(
        "--families", action="store_true", help="draw the largest families of near-duplicates, a line each"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(_command(args.command), args)


if __name__ == "__main__":
    sys.exit(main())
