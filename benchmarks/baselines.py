"""What takes no network, on real grids: tables of patterns, a lossless code, and deflate.

    python benchmarks/baselines.py --data_dir data/train.npz --eval_dir val=data/val.npz --output baselines.md

Tables and code are fitted to the training grids (trellis/evaluation/baselines.py) and scored on each --eval_dir, and on
each kind of objects there; kinds are those of evaluate.py. The lossless code is written and read back too.
rate_distortion.py draws the results beside those of tokenizers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.report import Column, Report, Table
from trellis.datasets.sparse_structure import SparseStructure
from trellis.evaluation.baselines import Baselines, Lattice, grid_batches
from trellis.evaluation.summary import NARROW_CLASSES, read_kinds, summarize, summarize_bits
from trellis.utils.command import run_command
from trellis.utils.errors import ConfigError

COLUMNS = (
    Column("grids", "key"),
    Column("baseline", "key"),
    Column("objects"),
    Column("IoU", "ratio", format=".4f"),
    Column("median", format=".4f"),
    Column("5 %", format=".4f"),
    Column("codes", format=".1f"),
    Column("LM tokens", format=".1f"),
    Column("kbit", format=".2f"),
    Column("kbit used", format=".2f"),
)
NARROW_COLUMNS = (
    Column("grids", "key"),
    Column("baseline", "key"),
    *(Column(name, format=".4f") for name in NARROW_CLASSES),
)
# Blocks along an axis, and ids.
TABLES = ((16, 8192), (16, 65536), (8, 8192), (8, 65536))
NARROW_TITLE = "IoU by narrow gaps per occupied voxel"
DECODED = 5  # grids of each set that are read back


def table_of(text: str) -> tuple[Lattice, int]:
    """Read BLOCKS:IDS or X,Y,Z:IDS."""
    blocks, _, ids = text.partition(":")
    sizes = [int(size) for size in blocks.split(",")]
    X, Y, Z = sizes if len(sizes) == 3 else sizes * 3
    if min(X, Y, Z) < 1 or int(ids) < 2:
        raise ValueError
    return (X, Y, Z), int(ids)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data_dir", required=True, help="training grids: data roots, separated by commas")
    flags.add_argument("--eval_dir", action="append", required=True, metavar="NAME=ROOTS", help="grids to score")
    flags.add_argument("--kinds", metavar="FILE.csv", help="the kind of objects of each source; see evaluate.py")
    flags.add_argument(
        "--table",
        action="append",
        type=table_of,
        metavar="BLOCKS:IDS",
        help="a table of patterns: blocks along an axis, or X,Y,Z, and ids; may be repeated (default: 16 and 8 blocks, "
        "8192 and 65536 ids each)",
    )
    flags.add_argument("--resolution", type=int, default=64, help="voxels along an axis (default: 64)")
    flags.add_argument("--output", type=Path, metavar="FILE.md", help="write the report here and its rows to FILE.json")
    args = flags.parse_args(argv)
    args.eval_dir = [text.partition("=")[::2] for text in args.eval_dir]
    if not all(name and root for name, root in args.eval_dir):
        flags.error("--eval_dir must be NAME=ROOTS, such as val=data/val.npz")
    args.table = args.table or [((blocks, blocks, blocks), ids) for blocks, ids in TABLES]
    return args


def coded_bits(fitted: Baselines, dataset: SparseStructure) -> float:
    """Return the mean bits of grids as the arithmetic coder writes them. Read the first ones back, bit by bit."""
    lengths: list[int] = []
    for grids in grid_batches(dataset, range(len(dataset))):
        for grid in grids:
            code = fitted.model.compress(grid)
            if len(lengths) < DECODED and not np.array_equal(fitted.model.decompress(code, len(grid)), grid):
                raise RuntimeError(f"grid {len(lengths)} does not come back from its code")
            lengths.append(8 * len(code))
    return float(np.mean(lengths))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    kind_of = read_kinds(args.kinds) if args.kinds else {}
    for lattice, _ in args.table:
        for blocks in lattice:
            if args.resolution % blocks:
                raise ConfigError(
                    f"--table {','.join(map(str, lattice))}: {args.resolution} voxels do not divide into {blocks} "
                    "blocks; give divisors of --resolution"
                )
    training = SparseStructure(args.data_dir, resolution=args.resolution, split="train")
    sets = {name: SparseStructure(root, resolution=args.resolution, split="val") for name, root in args.eval_dir}
    work = {"resolution": args.resolution, "training grids": len(training)}
    report = Report("Baselines without a network", __file__, argv, torch.device("cpu"), args.output, work)
    fitted = Baselines.fit(training, range(len(training)), args.table)
    trained = " and ".join(Path(root).stem for root in training.roots)
    notes = [
        f"Fitted to the {len(training)} training grids of {trained}. An id of a table is a "
        "pattern of a block's voxels, the nearest one by Hamming distance; id 0 is the empty block. LM tokens are the "
        "codes of blocks that hold something, and the masks of the octree that says which. kbit: per object, each code "
        "and mask at a fixed length; used: by the entropy of single codes and masks. Lossless: the ideal code length "
        "under a fixed model of 22 neighbors, in the column of what is used; kbit is what an arithmetic coder writes, "
        "to whole bytes."
    ]
    rows: list[list] = []
    narrow: list[list] = []
    for name, dataset in sets.items():
        sources = [dataset.source(i) for i in range(len(dataset))]
        kinds = [kind_of.get(source or "") or dataset.kind(i) for i, source in enumerate(sources)]
        tables = {
            baseline: summarize(scores, sources, kinds)
            for baseline, scores in fitted.scores(dataset, range(len(dataset))).items()
        }
        bits = fitted.bits(dataset, range(len(dataset)))
        for baseline, found in tables.items():
            rows.append([name, baseline, *table_row(found)])
            rows += [[f"{name}, {kind}", baseline, *group_row(part)] for kind, part in found["kinds"].items()]
            classes = [found["narrow"].get(label, {"objects": 0, "iou": None}) for label in NARROW_CLASSES]
            if baseline == next(iter(tables)):
                narrow.append([name, "number of objects", *(part["objects"] for part in classes)])
            narrow.append([name, baseline, *(part["iou"] for part in classes)])
        for baseline, values in bits.items():
            found = summarize_bits(values, sources, kinds)
            written = coded_bits(fitted, dataset) if baseline == "lossless" else found["bits_per_object"]
            rows.append([name, baseline, found["objects"], *lossless(written, found["bits_per_object"])])
            notes += [f"{name}, {baseline}: median {found['bits_per_object_median'] / 1e3:.2f} kbit."]
            rows += [
                [f"{name}, {kind}", baseline, part["objects"], *lossless(None, part["bits_per_object"])]
                for kind, part in found["kinds"].items()
            ]
        text = report.write(*notes, Table(COLUMNS, rows), Table(NARROW_COLUMNS, narrow, NARROW_TITLE))
    print(text)


def table_row(found: dict) -> list:
    """Return the columns after "baseline" of a table's summary."""
    scores = [found[key] for key in ("iou", "iou_median", "iou_p5", "codes_per_object", "lm_tokens")]
    return [found["objects"], *scores, found["bits_per_object"] / 1e3, found["entropy_bits_per_object"] / 1e3]


def group_row(part: dict) -> list:
    """Return the same columns for a kind of objects."""
    codes = part["tokens"]
    return [part["objects"], part["iou"], None, part["iou_p5"], codes, codes + part["masks"], None, None]


def lossless(written: float | None, ideal: float) -> list:
    """Return the columns after "objects" of what loses nothing. written, ideal: bits."""
    return [1.0, None, None, None, None, None if written is None else written / 1e3, ideal / 1e3]


if __name__ == "__main__":
    sys.exit(run_command(main, None))
