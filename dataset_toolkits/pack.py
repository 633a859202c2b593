"""Convert between a folder of voxel files and one packed .npz file, both ways and without loss.

    python dataset_toolkits/pack.py --input data/voxels --output data/voxels.npz
    python dataset_toolkits/pack.py --unpack data/voxels.npz --output_dir data/voxels

A packed file keeps the grid, sha256, name, source and split of each object, how the files were normalized and turned,
and where an organ lies in its scan. Training loads it as a whole, which is fast and takes R^3 / 8 bytes of memory per
object. Nothing is ever overwritten.
"""

import argparse
import os
import secrets
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import records
from trellis.datasets.packed import load_packed, packed_resolution, save_packed
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import occupancy_to_points, pack_bits, packed_size, write_ply
from trellis.utils.command import check_output_folder, run_command
from trellis.utils.errors import DataError
from trellis.utils.files import LEFTOVER, host_name, is_running
from trellis.utils.progress import waiting

KEPT = ("kind", "up_axis", "normalization", "fill", "mm_per_cell", "frame")  # columns of metadata.csv


def pack(root: str, output: Path, resolution: int) -> int:
    """Write all objects of a voxel folder, or of several separated by commas, into one .npz file.

    Return their number. Raise DataError if a root cannot be read in full or `output` exists.
    """
    if resolution % 2:
        raise DataError(f"--resolution {resolution}: a packed file holds grids of an even resolution.")
    if output.suffix != ".npz":
        raise DataError(f"{output}: the name of a packed file ends in .npz")
    _refuse_existing(output)
    check_output_folder(output.parent, "--output")
    dataset = SparseStructure(root, resolution=resolution, split="all")
    print(dataset.summary())
    bits = np.empty((len(dataset), packed_size(resolution)), dtype=np.uint8)
    with waiting("packing", len(dataset), "grid") as progress:
        for index in range(len(dataset)):
            bits[index] = pack_bits(dataset[index]["ss"])[0]
            progress(index + 1)
    texts = {
        key: np.array([getattr(entry, key) or "" for entry in dataset.entries])
        for key in ("sha256", "name", "source", "split")
    }
    kept = {root: _kept(Path(root)) for root in dataset.roots}
    for name in KEPT:
        values = [kept[entry.root][name].get(entry.sha256, "") for entry in dataset.entries]
        if any(values):
            texts[name] = np.array(values)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_packed(output, bits, texts)
    return len(dataset)


def unpack(packed: Path, output_dir: Path) -> int:
    """Write the objects of an .npz file as `voxels/<sha256>.ply` and `metadata.csv` into a new folder.

    Return their number. Raise DataError if the file cannot be read in full or `output_dir` exists.
    """
    _refuse_existing(output_dir)
    check_output_folder(output_dir.parent)
    bits = load_packed(packed)["bits"]
    resolution = packed_resolution(bits)
    if resolution is None:
        raise DataError(f"{packed}: rows of {bits.shape[1]} bytes are not a cube of voxels")
    dataset = SparseStructure(str(packed), resolution=resolution, split="all")
    for left in output_dir.parent.glob(f".{output_dir.name}.*.tmp"):  # of an unpacking of this folder that was killed
        found = LEFTOVER.fullmatch(left.name)
        if found and found["host"] == host_name() and not is_running(int(found["pid"])):
            shutil.rmtree(left)
    name = f".{output_dir.name}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    partial = output_dir.with_name(name)
    try:
        (partial / "voxels").mkdir(parents=True)
        rows = []
        kept = {name: texts for name, texts in _kept(packed).items() if any(texts.values())}
        with waiting("unpacking", len(dataset), "grid") as progress:
            for index, entry in enumerate(dataset.entries):
                points = occupancy_to_points(dataset[index]["ss"][0])
                write_ply(partial / "voxels" / f"{entry.sha256}.ply", points)
                rows.append(
                    {
                        "sha256": entry.sha256,
                        "file": "" if entry.name == entry.sha256 else entry.name,
                        "source": entry.source or "",
                        "split": entry.split,
                        "voxelized": "True",
                        "num_voxels": str(len(points)),
                        **{name: texts[entry.sha256] for name, texts in kept.items()},
                    }
                )
                progress(index + 1)
        records.write_table(partial / "metadata.csv", rows[0].keys(), rows)
        partial.rename(output_dir)
    except OSError as error:  # nobody knows the temporary name
        if error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(output_dir)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(dataset)


def _kept(root: Path) -> dict[str, dict[str, str]]:
    """Return {column of KEPT: {sha256: text}} of metadata.csv, or of the text arrays of packed files in its place."""
    found: dict[str, dict[str, str]] = {name: {} for name in KEPT}
    packed = [root] if root.suffix == ".npz" else sorted(root.glob("*.npz"))
    for path in packed:
        arrays = load_packed(path)
        for name in arrays.keys() & found:
            found[name] |= zip(arrays["sha256"].tolist(), arrays[name].tolist(), strict=True)
    for sha256, row in () if packed else records.read_rows(root)[1].items():
        for name in row.keys() & found:
            found[name][sha256] = row[name]
    return found


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise DataError(f"{path}: exists already. Delete it or choose another name.")


def run(args: argparse.Namespace) -> None:
    """Pack or unpack, and print how many grids."""
    if args.unpack is None:
        print(f"{args.output}: {pack(args.input, args.output, args.resolution)} grids")
    else:
        print(f"{args.output_dir}: {unpack(args.unpack, args.output_dir)} grids")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="ROOT", help="folder of voxel files to pack; needs --output")
    source.add_argument("--unpack", type=Path, metavar="FILE.npz", help="packed file to unpack; needs --output_dir")
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help="packed file to write")
    parser.add_argument("--output_dir", type=Path, metavar="ROOT", help="folder to write")
    parser.add_argument("--resolution", type=int, default=64, help="voxels per axis of --input (default 64)")
    args = parser.parse_args(argv)
    if (args.input is None) != (args.output is None) or (args.unpack is None) != (args.output_dir is None):
        parser.error("--input goes with --output, --unpack with --output_dir")
    return run_command(run, args)


if __name__ == "__main__":
    sys.exit(main())
