"""Objects read from data roots in parts, and written as a new folder of shards."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_toolkits.shard_files import chunks, grids_per_shard
from trellis.datasets.shards import SUFFIX, require_pyarrow, write_shard
from trellis.grids.voxels import count_voxels
from trellis.utils.command import check_output_folder
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import new_folder
from trellis.utils.progress import waiting

if TYPE_CHECKING:  # it needs torch, which the workers that read shards need not load
    from trellis.datasets.sparse_structure import SparseStructure


def open_roots(args: argparse.Namespace) -> "SparseStructure":
    """Open the data roots, all splits, and print what there is."""
    from trellis.datasets.sparse_structure import SparseStructure

    dataset = SparseStructure(args.roots, resolution=args.resolution, split="all")
    print(dataset.summary())
    return dataset


def bits_of(dataset: "SparseStructure", indices: np.ndarray) -> np.ndarray:
    """Return the grids of objects as bits, [n, R^3 / 8] uint8."""
    return dataset.get_batch(indices)["bits"].numpy()


def voxel_counts(bits: np.ndarray) -> np.ndarray:
    """Return the number of occupied voxels of grids as bits, [n] int64."""
    return np.array([count_voxels(row) for row in bits], np.int64)


def column_names(dataset: "SparseStructure") -> set[str]:
    """Return the columns that some root of the data has."""
    first = {root: index for index, root in reversed(list(enumerate(dataset.texts("root"))))}
    return {name for index in first.values() for name in dataset.columns_of(np.array([index]))}


def check_new(path: Path, flag: str) -> None:
    """Raise ConfigError if what is to be written exists or cannot be written."""
    if path.exists():
        raise ConfigError(f"{flag} {path}: exists already. Delete it or give another name.")
    check_output_folder(path.parent, flag)


def check_shard_folder(args: argparse.Namespace) -> None:
    """Raise ConfigError if --output cannot become a folder of shards, before the data are read."""
    require_pyarrow()
    if args.resolution % 2:
        raise ConfigError(f"--resolution {args.resolution}: shards hold grids of an even resolution.")
    if args.output.suffix:
        raise ConfigError(f"--output {args.output}: is to be a folder of shards; give a name without an ending.")
    check_new(args.output, "--output")


def write_objects(
    dataset: "SparseStructure",
    indices: np.ndarray,
    output: Path,
    columns: Mapping[str, Sequence[Any]] | None = None,
    what: str = "writing",
) -> int:
    """Write objects as a new folder of shards, and return the number of shards.

    indices: of the objects, [n] int64, in the order to write.
    columns: {name: n values} in place of the dataset's.
    what: the work in words.
    Raise DataError if there are none, or if a grid cannot be read.
    """
    if not len(indices):
        raise DataError(f"{output}: no object is left to write.")
    parts = list(chunks(np.arange(len(indices)), grids_per_shard(dataset.resolution)))
    digest = hashlib.sha256()
    for part in chunks(indices):
        digest.update("".join(dataset.texts("sha256", part)).encode())
    with new_folder(output) as folder, waiting(what, len(indices)) as progress:
        for number, part in enumerate(parts):
            bits = np.concatenate([bits_of(dataset, indices[some]) for some in chunks(part)])
            values: dict[str, Sequence[Any]] = {
                name: column
                for name, column in dataset.columns_of(indices[part]).items()
                if name == "sha256" or any(value is not None for value in column)
            }
            values.update({name: [column[row] for row in part] for name, column in (columns or {}).items()})
            path = folder / f"grids-000001-{digest.hexdigest()[:12]}-{number:05d}{SUFFIX}"
            write_shard(path, bits, dataset.resolution, values)
            progress(progress.done + len(part))
    return len(parts)
