"""Turn voxel files into shards, for any number of objects, or into one packed .npz file; both back without loss.

    python dataset_toolkits/pack.py --input data/voxels --output data/packed
    python dataset_toolkits/pack.py --input data/voxels --output data/voxels.npz
    python dataset_toolkits/pack.py --unpack data/packed --output_dir data/voxels

--input takes data roots as train.py does: voxel files, .npz files and shards. An output that ends in .npz is one file,
else a folder of shards (trellis/datasets/shards.py), which keep every column of metadata.csv. Shards are written in
parallel and each as a whole; the same command again writes those that are missing. --append adds the objects that a
folder lacks, as new shards. --rank and --world_size share the work among machines. Nothing is ever overwritten.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import records
from dataset_toolkits.report import count
from dataset_toolkits.shard_files import (
    Task,
    chunks,
    digest_of,
    grids_per_shard,
    next_number,
    squeeze,
    write_shards,
)
from trellis.datasets.metadata import compare_settings
from trellis.datasets.packed import TEXT_ARRAYS, load_packed, packed_resolution, save_packed
from trellis.datasets.remote import is_url, shard_files
from trellis.datasets.shards import FORMAT_VERSION, SUFFIX, TYPES, Shard, require_pyarrow, shards_in
from trellis.datasets.tables import typed
from trellis.grids.voxels import occupancy_to_points, packed_size, write_ply
from trellis.utils.command import available_cores, check_output_folder, run_command
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import new_folder, remove_leftovers
from trellis.utils.inputs import require_memory
from trellis.utils.progress import waiting

if TYPE_CHECKING:  # it needs torch, which the workers that write shards need not load
    from trellis.datasets.sparse_structure import SparseStructure

FILE_SUFFIXES = (SUFFIX, ".zip", ".npy", ".tar", ".parquet")
INTERRUPTED = "interrupted: run the same command again to go on"


def pack(root: str, output: Path, resolution: int) -> int:
    """Write all objects of a voxel folder, or of several separated by commas, into one .npz file.

    Return their number. Raise DataError if a root cannot be read in full or `output` exists.
    """
    _check_resolution(resolution)
    if output.suffix != ".npz":
        raise DataError(f"{output}: the name of a packed file ends in .npz")
    _refuse_existing(output)
    check_output_folder(output.parent, "--output")
    dataset = _open(root, resolution)
    print(dataset.summary())
    size = len(dataset) * packed_size(resolution)
    require_memory(size, f"{output}: takes", DataError, "write shards, by an --output that does not end in .npz")
    bits = np.empty((len(dataset), packed_size(resolution)), dtype=np.uint8)
    texts: dict[str, list[str]] = {}
    with waiting("packing", len(dataset), "grid") as progress:
        for indices in chunks(np.arange(len(dataset))):
            bits[indices] = dataset.get_batch(indices)["bits"].numpy()
            columns = {**_columns(dataset, indices), "name": dataset.texts("name", indices)}
            for name in TEXT_ARRAYS:
                values = map(_text, columns.get(name, [None] * len(indices)))
                texts.setdefault(name, []).extend(values)
            progress(int(indices[-1]) + 1)
    always = ("sha256", "name", "source", "split")
    kept = {name: np.array(values) for name, values in texts.items() if name in always or any(values)}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_packed(output, bits, kept)
    return len(dataset)


def pack_shards(
    root: str,
    output: Path,
    resolution: int,
    shard_size: int | None = None,
    max_workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    append: bool = False,
) -> int:
    """Write this rank's share of the objects of data roots, separated by commas, as shards into a folder.

    shard_size: grids of a shard; None: `grids_per_shard`.
    append: write those objects alone that the folder lacks, which may hold others.
    Return the number of grids that were written. Raise DataError if a root cannot be read, or if the folder has shards
    of other data or settings, ConfigError without pyarrow.
    """
    _check_resolution(resolution)
    require_pyarrow()
    if output.suffix in FILE_SUFFIXES:
        raise DataError(f"{output}: --output is a folder of shards, or one file that ends in .npz. Give another name.")
    check_output_folder(output, "--output")
    if Path(output, "metadata.csv").exists() or list(output.glob("*.npz")):
        raise DataError(f"{output}: has metadata.csv or .npz files, so shards cannot go there. Give another --output.")
    dataset = _open(root, resolution)
    print(dataset.summary())
    shard_size = shard_size or grids_per_shard(resolution)
    indices = np.arange(len(dataset))
    if append:
        known: set[str] = set()
        if shards_in(output):
            there = _open(str(output), resolution)
            for note in compare_settings({**there.settings, **dataset.settings}):
                print(f"note: {note}")
            known = set(there.texts("sha256"))
        share = indices[rank::world_size]  # which does not depend on what other ranks have written by now
        lacking = [sha256 not in known for sha256 in dataset.texts("sha256", share)]
        indices, rank, world_size = share[np.array(lacking, bool)], 0, 1
    parts = list(chunks(indices, shard_size))
    key, names = _content(dataset, indices, shard_size)
    ending = f"{key}-{{:05d}}-of-{len(parts):05d}{SUFFIX}"
    if not append:
        _refuse_others(output, ending, len(parts))
    there_by_ending = {path.name.split("-", 2)[-1] for path in shards_in(output)}
    number = next_number(output) if append else 1
    todo = {
        output / f"grids-{number:06d}-{ending.format(i)}": part
        for i, part in list(enumerate(parts))[rank::world_size]
        if ending.format(i) not in there_by_ending
    }
    if not todo:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    total = sum(map(len, todo.values()))
    try:
        with waiting("packing", total, "grid") as progress:

            def done(grids: int) -> None:
                progress(progress.done + grids)
                if not append:
                    _refuse_others(output, ending, len(parts))

            tasks = (_task(dataset, path, part, names) for path, part in todo.items())
            write_shards(tasks, min(max_workers, len(todo)), done)
    finally:
        remove_leftovers(output)  # of processes that were killed
    return total


def _open(roots: str, resolution: int) -> "SparseStructure":
    from trellis.datasets.sparse_structure import SparseStructure

    return SparseStructure(roots, resolution=resolution, split="all")


def _check_resolution(resolution: int) -> None:
    if resolution % 2:
        raise DataError(f"--resolution {resolution}: a packed file holds grids of an even resolution.")


def _columns(dataset: "SparseStructure", indices: np.ndarray) -> dict[str, list[Any]]:
    """Return the columns that objects have beside their grids, without blank ones."""
    columns = dataset.columns_of(indices)
    if "caption" in columns and "captions" not in columns:
        columns["captions"] = typed(dataset.roots[0], "captions", columns.pop("caption"))
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _content(dataset: "SparseStructure", indices: np.ndarray, shard_size: int) -> tuple[str, list[str]]:
    """Return what stands for the content of all shards of these objects, and the columns that any of them has."""
    names: set[str] = set()

    def parts() -> Iterator[object]:
        yield [FORMAT_VERSION, dataset.resolution, shard_size]
        with waiting("listing objects", len(indices)) as progress:
            for chunk in chunks(indices):
                columns = _columns(dataset, chunk)
                names.update(columns)
                yield columns
                yield dataset.versions(chunk)
                progress(progress.done + len(chunk))

    return digest_of(parts()), sorted(names)


def _task(dataset: "SparseStructure", path: Path, indices: np.ndarray, names: list[str]) -> Task:
    """Return the task to write a shard. Workers read voxel files, which takes long; other grids are read here."""
    folders = {root for root in dataset.roots if Path(root, "metadata.csv").exists()}
    objects = zip(dataset.texts("root", indices), dataset.texts("sha256", indices), strict=True)
    voxel_files = {
        row: Path(root, "voxels", f"{sha256}.ply") for row, (root, sha256) in enumerate(objects) if root in folders
    }
    others = np.array([row not in voxel_files for row in range(len(indices))])
    grids = [squeeze(row) for chunk in chunks(indices[others]) for row in dataset.get_batch(chunk)["bits"].numpy()]
    nothing = dict.fromkeys(names, [None] * len(indices))
    return Task(path, dataset.resolution, {**nothing, **_columns(dataset, indices)}, voxel_files, grids)


def _refuse_others(output: Path, ending: str, shards: int) -> None:
    """Raise DataError if a folder has shards that are not of this call."""
    own = {ending.format(i) for i in range(shards)}
    for path in shards_in(output):
        if path.name.split("-", 2)[-1] not in own:
            raise DataError(
                f"{output}: holds shards of other data, metadata, --resolution or --shard_size, such as {path.name}. "
                "Give another --output, or --append to add the objects that it lacks."
            )


def unpack(packed: str | Path, output_dir: Path) -> int:
    """Write the objects of an .npz file, of a shard, or of a folder or URL of shards into a new folder.

    It has them as `voxels/<sha256>.ply` and `metadata.csv`.
    Return their number. Raise DataError if they cannot be read in full or `output_dir` exists.
    """
    _refuse_existing(output_dir)
    check_output_folder(output_dir.parent)
    dataset = _open(str(packed), _resolution_of(packed))
    parts = list(chunks(np.arange(len(dataset))))
    further = {name for indices in parts for name in _columns(dataset, indices)}
    further -= {"sha256", "name", "source", "split"}
    name_field = "name" if "file" in further else "file"
    fields = ["sha256", name_field, "source", "split", "voxelized", "num_voxels"]
    fields += [name for name in TYPES if name in further] + sorted(further - TYPES.keys())

    def rows(folder: Path) -> Iterator[records.Row]:
        with waiting("unpacking", len(dataset), "grid") as progress:
            for indices in parts:
                columns = _columns(dataset, indices)
                entries = dataset.entries[int(indices[0]) : int(indices[-1]) + 1]
                for row, (index, entry) in enumerate(zip(indices.tolist(), entries, strict=True)):
                    points = occupancy_to_points(dataset[index]["ss"][0])
                    write_ply(folder / "voxels" / f"{entry.sha256}.ply", points)
                    yield {
                        **{name: _text(columns[name][row]) for name in columns.keys() & further},
                        "sha256": entry.sha256,
                        name_field: "" if entry.name == entry.sha256 else entry.name,
                        "source": entry.source or "",
                        "split": entry.split,
                        "voxelized": "True",
                        "num_voxels": str(len(points)),
                    }
                    progress(index + 1)

    with new_folder(output_dir) as folder:
        (folder / "voxels").mkdir()
        records.write_table(folder / "metadata.csv", fields, rows(folder))
    return len(dataset)


def _resolution_of(packed: str | Path) -> int:
    """Return the resolution of an .npz file, or of the first shard."""
    shards = shard_files(str(packed))
    if shards:
        return Shard(*shards[0]).resolution
    bits = load_packed(Path(packed))["bits"]
    resolution = packed_resolution(bits)
    if resolution is None:
        raise DataError(f"{packed}: rows of {bits.shape[1]} bytes are not a cube of voxels")
    return resolution


def _text(value: Any) -> str:
    """Return a value of a column as text for a table; a list as JSON."""
    if value is None:
        return ""
    if isinstance(value, float):
        short = f"{value:.9g}"
        return short if float(short) == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise DataError(f"{path}: exists already. Delete it or choose another name.")


def run(args: argparse.Namespace) -> None:
    """Pack or unpack, and print how many grids."""
    if args.unpack is not None:
        print(f"{args.output_dir}: {unpack(args.unpack, args.output_dir)} grids")
        return
    if args.output.suffix == ".npz":
        print(f"{args.output}: {pack(args.input, args.output, args.resolution)} grids")
        return
    records.check_rank(args.rank, args.world_size)
    if not 1 <= args.max_workers <= 1024:
        raise ConfigError(f"--max_workers {args.max_workers}: must lie between 1 and 1024.")
    if args.shard_size is not None and args.shard_size < 1:
        raise ConfigError(f"--shard_size {args.shard_size}: must be at least 1.")
    sharing = args.rank, args.world_size
    made = pack_shards(
        args.input, args.output, args.resolution, args.shard_size, args.max_workers, *sharing, append=args.append
    )
    rank = f" (rank {args.rank} of {args.world_size})" if args.world_size > 1 else ""
    print(f"{args.output}: {count(made, 'new grid')}{rank}, {count(len(shards_in(args.output)), 'shard')} in all")


def _local(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: write to a folder of this machine, and copy that")
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="ROOTS", help="data roots, separated by commas; needs --output")
    source.add_argument("--unpack", metavar="PACKED", help="shards or .npz to unpack; needs --output_dir")
    parser.add_argument("--output", type=_local, metavar="PATH", help="folder of shards to write, or a file *.npz")
    parser.add_argument("--output_dir", type=_local, metavar="ROOT", help="folder of voxel files to write")
    parser.add_argument("--resolution", type=int, default=64, help="voxels per axis of --input (default 64)")
    parser.add_argument(
        "--shard_size", type=int, metavar="N", help="grids of a shard (default: 4096 of 64^3, fewer of larger ones)"
    )
    parser.add_argument("--append", action="store_true", help="add what a folder of shards lacks, as new shards")
    parser.add_argument(
        "--max_workers", type=int, metavar="N", help="processes that write shards (default: one per core)"
    )
    parser.add_argument("--rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--world_size", type=int, default=1, help="number of machines that share the work")
    args = parser.parse_args(argv)
    if (args.input is None) != (args.output is None) or (args.unpack is None) != (args.output_dir is None):
        parser.error("--input goes with --output, --unpack with --output_dir")
    if args.output is None or args.output.suffix == ".npz":
        if args.shard_size or args.append or args.max_workers or (args.rank, args.world_size) != (0, 1):
            parser.error("--shard_size, --append, --max_workers, --rank and --world_size go with a folder of shards")
    args.max_workers = available_cores() if args.max_workers is None else args.max_workers
    return run_command(run, args, INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
