"""What a language model will see: entropy and lengths of the ids of objects.

    python scripts/token_stats.py --tokens outputs/tokens --output_dir outputs/token_stats
    python scripts/token_stats.py --tokens outputs/tokens --tokenizer outputs/stage2 --data_dir data/voxels \\
        --output_dir outputs/token_stats
    python scripts/token_stats.py --tokenizer TOKENIZER --data_dir data/voxels --output_dir outputs/token_stats

--tokens is a folder of scripts/to_tokens.py, in any form; without it, grids are encoded here, in fp32. The tokenizer is
needed for statistics of empty tokens and of the sparse form (not for ids with an empty code), the grids for statistics
of occupied positions and for the size of grids themselves. At most 1000 objects are compressed, evenly spaced. Writes
stats.json (keys: trellis/tokens/stats.py), stats.md, which says the same in words, and pictures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from trellis.datasets.metadata import compare_with_tokenizer
from trellis.datasets.sparse_structure import SparseStructure
from trellis.evaluation.metrics import occupied_blocks
from trellis.tokenizer import SparseStructureTokenizer
from trellis.tokens import parquet, stats
from trellis.tokens.stats import COMPRESSORS, ORDERS, TokenSet
from trellis.tokens.stats_report import draw, reading, require_matplotlib
from trellis.utils.command import DEVICES, check_output_folder, pick_device, run_command
from trellis.utils.environment import versions
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import atomic_write
from trellis.utils.progress import waiting

GRIDS_AT_ONCE = 64


class Subject(NamedTuple):
    """The ids to measure."""

    tokens: TokenSet
    resolution: int  # voxels along an axis
    total: int  # objects in the folder or data, of which `tokens` has at most --max_objects
    about: dict  # where the ids come from, for stats.json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", metavar="FOLDER", help="Parquet files of scripts/to_tokens.py")
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="tokenizer folder, run folder, file in ShapeLLM-Omni's layout, or id on the Hub",
    )
    parser.add_argument("--data_dir", help="data roots as train.py takes them, separated by commas")
    parser.add_argument(
        "--split", choices=("train", "val", "all"), default="all", help="split of --data_dir (default: all)"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--max_objects",
        type=int,
        default=5000,
        metavar="N",
        help="measure at most N objects, evenly spaced (default: 5000)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device to encode on")
    args = parser.parse_args(argv)
    if not args.tokens and not (args.tokenizer and args.data_dir):
        parser.error("give --tokens, or --tokenizer with --data_dir")
    if args.max_objects < 1:
        parser.error(f"--max_objects is {args.max_objects}; it must be at least 1")
    return args


# --- reading ----------------------------------------------------------------------------------------------------


def open_data(args: argparse.Namespace, info: parquet.TokenInfo) -> SparseStructure:
    """Open --data_dir, and print notes on its roots. Raise DataError for grids that the ids cannot be made of."""
    dataset = SparseStructure(args.data_dir, resolution=info.resolution, split=args.split)
    differing = compare_with_tokenizer(dataset.settings, info.up_axis, info.normalization)
    for note in (*dataset.notes, *differing):
        print(f"note: {note}")
    return dataset


def read_tokens(
    args: argparse.Namespace, info: parquet.TokenInfo, tokenizer: SparseStructureTokenizer | None
) -> Subject:
    """Read the ids of --tokens. Raise ConfigError if another tokenizer made them, DataError if there are none."""
    if tokenizer is not None and tokenizer.hash != info.tokenizer_hash:
        raise ConfigError(
            f"{args.tokenizer}: did not make {args.tokens}, whose tokenizer has the hash "
            f"{info.tokenizer_hash[:12]}…, not {tokenizer.hash[:12]}…. Give that tokenizer, or none."
        )
    total = sum(parquet.count_rows(path) for path in parquet.shard_files(args.tokens))
    if not total:
        raise DataError(f"{args.tokens}: has no object. {Path(args.tokens).name}_failed.csv beside it says why.")
    wanted = set(stats.spread(total, args.max_objects).tolist())
    rows = [
        (row["sha256"], row["tokens"].astype(np.int32))
        for i, row in enumerate(parquet.read_shards(args.tokens))
        if i in wanted
    ]
    empty_ids = None if tokenizer is None else tokenizer.empty_ids.numpy()
    if info.empty_code:
        empty_ids = np.zeros(info.num_tokens, dtype=np.int64)
    tokens = TokenSet(
        np.stack([ids for _, ids in rows]),
        np.array([sha256 for sha256, _ in rows]),
        info.lattice,
        info.codes_per_token,
        info.n_embed,
        empty_ids,
        info.empty_code,
    )
    about = {"tokens": args.tokens, "tokenizer_hash": info.tokenizer_hash, "precision": info.precision}
    return Subject(tokens, info.resolution, total, about)


def encode_grids(
    args: argparse.Namespace, dataset: SparseStructure, tokenizer: SparseStructureTokenizer, device: torch.device
) -> Subject:
    """Encode the grids of --data_dir."""
    empty_ids = tokenizer.empty_ids.numpy()
    tokenizer.to(device)
    chosen = stats.spread(len(dataset), args.max_objects)
    parts = []
    for indices in batches(chosen, "encoding"):
        batch = {name: value.to(tokenizer.device) for name, value in dataset.get_batch(indices).items()}
        parts.append(tokenizer.encode(dataset.unpack_batch(batch)["ss"]).int().cpu().numpy())
    tokens = TokenSet(
        np.concatenate(parts),
        np.array(dataset.texts("sha256", chosen)),
        tokenizer.lattice,
        tokenizer.codes_per_token,
        tokenizer.n_embed,
        empty_ids,
        tokenizer.empty_code,
    )
    about = {"tokenizer": args.tokenizer, "tokenizer_hash": tokenizer.hash, "precision": "fp32"}
    return Subject(tokens, tokenizer.resolution, len(dataset), about)


def read_grids(args: argparse.Namespace, dataset: SparseStructure, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Return whether positions have an occupied voxel, [N, L] bool, and bytes of compressed grids, [n, 2].

    Those of the n objects are compressed whose ids are, too.
    Raise DataError if --data_dir lacks the grid of an object.
    """
    sha256s = subject.tokens.objects.tolist()
    numbers = dataset.find(sha256s)
    missing = np.flatnonzero(numbers < 0)
    if len(missing):
        raise DataError(
            f"{args.data_dir}: has no grid of {sha256s[missing[0]]} ({len(missing)} such objects in {args.tokens}). "
            "Give the roots and the split that its ids come from."
        )
    occupied, sizes, done = [], [], 0
    compressed = np.zeros(len(subject.tokens.objects), bool)
    compressed[stats.spread(len(compressed), stats.OBJECTS_TO_COMPRESS)] = True
    for indices in batches(numbers, "grids"):
        batch = dataset.get_batch(indices)
        chosen = compressed[done : done + len(indices)]
        if chosen.any():
            sizes.append(stats.grid_sizes(batch["bits"].numpy()[chosen]))
        done += len(indices)
        occupied.append(occupied_blocks(dataset.unpack_batch(batch)["ss"], subject.tokens.lattice).flatten(1).numpy())
    return np.concatenate(occupied), np.concatenate(sizes)


def batches(indices: np.ndarray, what: str) -> Iterator[np.ndarray]:
    """Yield indices [n] in parts, and show progress."""
    with waiting(what, len(indices)) as progress:
        for start in range(0, len(indices), GRIDS_AT_ONCE):
            part = indices[start : start + GRIDS_AT_ONCE]
            yield part
            progress(start + len(part))


# --- all of it --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict:
    """Return the content of stats.json."""
    device = pick_device(args.device)
    tokenizer = SparseStructureTokenizer.load(args.tokenizer) if args.tokenizer else None
    if args.tokens:
        info = parquet.read_info(args.tokens)
        subject = read_tokens(args, info, tokenizer)
        dataset = open_data(args, info) if args.data_dir else None
    else:
        assert tokenizer is not None  # parse_args asks for it
        dataset = open_data(args, tokenizer.token_info())
        subject = encode_grids(args, dataset, tokenizer, device)
    tokens = subject.tokens
    occupied, grid_sizes = read_grids(args, dataset, subject) if dataset else (None, None)
    result = {
        **subject.about, "data_dir": args.data_dir, "objects": len(tokens.ids), "objects_in_all": subject.total,
        "resolution": subject.resolution, "lattice": list(tokens.lattice), "codes_per_token": tokens.codes_per_token,
        "n_embed": tokens.n_embed, "ids_per_object": tokens.ids.shape[1], "log2_n_embed": math.log2(tokens.n_embed),
        "codebook": stats.codebook_stats(tokens),
        "entropy": stats.conditional_entropies(tokens),
        "runs": stats.run_stats(tokens),
        "empty": None, "sparse": None, "octree": stats.octree_stats(tokens) if tokens.empty_code else None,
        "bytes": {
            "objects": min(len(tokens.ids), stats.OBJECTS_TO_COMPRESS), "ids": stats.id_sizes(tokens), "grid": None,
        },
    }  # fmt: skip
    if tokens.empty_ids is not None:
        result["empty"] = stats.empty_stats(tokens, occupied)
        lengths = {order: stats.sparse_lengths(tokens, order) for order in ORDERS}
        result["sparse"] = {order: stats.summary(values) for order, values in lengths.items()}
        result["sparse"]["shorter_in_morton"] = float((lengths["morton"] < lengths["raster"]).mean())
        result["sparse"]["shorter_in_raster"] = float((lengths["raster"] < lengths["morton"]).mean())
    if grid_sizes is not None:
        result["bytes"]["grid"] = {"raw": -(-(subject.resolution**3) // 8)} | {
            name: stats.summary(sizes) for name, sizes in zip(COMPRESSORS, grid_sizes.T, strict=True)
        }
    return {**result, "versions": versions()}


def write_stats(args: argparse.Namespace) -> None:
    folder = check_output_folder(args.output_dir)
    require_matplotlib()
    if (folder / "stats.json").exists():
        raise ConfigError(f"{folder / 'stats.json'} exists already; choose another --output_dir")
    with waiting("statistics"):
        result = measure(args)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(result, folder)
    text = reading(result, pictures)
    for name, content in (("stats.md", text), ("stats.json", json.dumps(result, indent=2) + "\n")):
        with atomic_write(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    print(text)
    print(f"written: {folder}/stats.json, stats.md, {', '.join(pictures)}")


def main(argv: list[str] | None = None) -> int:
    return run_command(write_stats, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
