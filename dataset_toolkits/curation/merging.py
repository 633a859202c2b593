"""dataset.py merge: several data roots become one folder of large shards."""

import argparse

import numpy as np

from dataset_toolkits.report import count
from dataset_toolkits.shard_files import chunks
from trellis.datasets.metadata import compare_settings
from trellis.datasets.sparse_structure import SparseStructure
from trellis.utils.errors import DataError
from trellis.utils.progress import waiting

from .objects import bits_of, check_shard_folder, write_objects


def run(args: argparse.Namespace) -> None:
    check_shard_folder(args)
    roots = [root.strip() for root in args.roots.split(",")]
    each = [SparseStructure(root, resolution=args.resolution, split="all") for root in roots]
    compare_settings({root: dataset.settings[root] for root, dataset in zip(roots, each, strict=True)})
    repeated = np.array([_compare_repeated(dataset, each[:number]) for number, dataset in enumerate(each)])
    # A root that has nothing of its own would be refused.
    own = [root for root, dataset, number in zip(roots, each, repeated, strict=True) if number < len(dataset)]
    dataset = SparseStructure(",".join(own), resolution=args.resolution, split="all")
    print(dataset.summary())
    shards = write_objects(dataset, np.arange(len(dataset)), args.output, what="merging")
    once = f", {repeated.sum()} times one that an earlier root has" if repeated.any() else ""
    print(f"{args.output}: {count(len(dataset), 'object')}{once}, in {count(shards, 'shard')}")


def _compare_repeated(dataset: SparseStructure, earlier: list[SparseStructure]) -> int:
    """Return how many objects of a root are in earlier ones. Raise DataError for one that has another grid there."""
    left = np.arange(len(dataset))
    with waiting(f"comparing {dataset.roots[0]}", len(earlier), "root") as progress:
        for number, other in enumerate(earlier):
            found = other.find(dataset.texts("sha256", left))
            for part in chunks(np.flatnonzero(found >= 0)):
                differing = (bits_of(dataset, left[part]) != bits_of(other, found[part])).any(axis=1)
                if differing.any():
                    name = dataset.sha256(int(left[part][np.argmax(differing)]))
                    raise DataError(
                        f"{dataset.roots[0]}: has another grid of {name} than {other.roots[0]}. Make both with the "
                        "same settings of voxelize.py, or leave one out."
                    )
            left = left[found < 0]
            progress(number + 1)
    return len(dataset) - len(left)
