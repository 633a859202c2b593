"""Write built-in shapes as mesh files, to try everything without own data.

    python dataset_toolkits/shapes/make_shapes.py --output_dir data/shapes --num 240 --num_val 24 --seed 0

Thirteen families with random proportions and parts, in `<output_dir>/train` and `<output_dir>/val`, as obj,
stl, ply, glb and off in turn; z is up in all of them. Shape i depends only on the seed, the split and i:
a larger --num adds shapes, and existing files stay as they are.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import trimesh

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any folder

from dataset_toolkits.shapes.household import chair, house, lamp, table, vessel
from dataset_toolkits.shapes.natural import animal, organ, plant
from dataset_toolkits.shapes.technical import bracket, gear, shell, spring, vehicle
from trellis.utils.command import check_output_folder, run_command
from trellis.utils.errors import ConfigError
from trellis.utils.files import atomic_write
from trellis.utils.progress import waiting

FORMATS = ("obj", "stl", "ply", "glb", "off")
SPLITS = ("train", "val")
FAMILIES: dict[str, Callable[[np.random.Generator], list[trimesh.Trimesh]]] = {
    family.__name__: family
    for family in (chair, table, lamp, vessel, gear, bracket, house, vehicle, organ, plant, animal, spring, shell)
}
DECIMALS = 5  # of coordinates, so that processors that differ in the last bit write the same bytes


def shape_name(index: int) -> str:
    """Return the file name of shape `index`. Every pair of the 13 families and 5 formats occurs."""
    family = list(FAMILIES)[index % len(FAMILIES)]
    return f"{index:05d}_{family}.{FORMATS[index % len(FORMATS)]}"


def make_shape(seed: int, split: str, index: int) -> list[trimesh.Trimesh]:
    """Make the parts of shape `index` of a split; the largest extent is 1 and the lowest point at z = 0.

    Half are turned by up to 25 degrees about the vertical, all by a random number of quarter turns.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    parts = list(FAMILIES.values())[index % len(FAMILIES)](rng)
    turn = np.radians(90 * rng.integers(4) + rng.uniform(-25, 25) * rng.integers(2))
    rotation = trimesh.transformations.rotation_matrix(turn, (0, 0, 1))[:3, :3]
    placed = [part.vertices @ rotation.T for part in parts]
    points = np.concatenate(placed)
    low, high = points.min(axis=0), points.max(axis=0)
    origin = np.array([*(low + high)[:2] / 2, low[2]])
    scaled = [((vertices - origin) / (high - low).max()).round(DECIMALS) for vertices in placed]
    return [trimesh.Trimesh(vertices, part.faces, process=False) for vertices, part in zip(scaled, parts, strict=True)]


def write_shape(parts: list[trimesh.Trimesh], path: Path) -> None:
    """Write a shape in the format of the suffix: glb as a scene of one node per part, others as one mesh."""
    whole = trimesh.Scene(parts) if path.suffix == ".glb" else trimesh.util.concatenate(parts)
    with atomic_write(path) as partial:
        whole.export(partial, file_type=path.suffix[1:])


def write_shapes(root: Path, seed: int, counts: dict[str, int]) -> int:
    """Write those of the first counts[split] shapes of each split that are missing.

    Return how many were written. Raise ConfigError if the folder holds shapes of another seed.
    """
    root.mkdir(parents=True, exist_ok=True)
    note = root / "shapes.json"
    before = json.loads(note.read_text())["seed"] if note.exists() else seed
    if before != seed:
        raise ConfigError(
            f"{note}: these shapes have seed {before}, not {seed}. Give that --seed or another --output_dir."
        )
    with atomic_write(note) as partial:
        partial.write_text(json.dumps({"seed": seed}) + "\n")
    missing = [
        (split, index, root / split / shape_name(index))
        for split in SPLITS
        for index in range(counts[split])
        if not (root / split / shape_name(index)).exists()
    ]
    with waiting("making shapes", len(missing), "shape") as progress:
        for done, (split, index, path) in enumerate(missing):
            progress(done)
            path.parent.mkdir(exist_ok=True)
            write_shape(make_shape(seed, split, index), path)
    return len(missing)


def run(args: argparse.Namespace) -> None:
    """Write the shapes and print how many."""
    for name in ("num", "num_val", "seed"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} {getattr(args, name)}: must not be negative.")
    check_output_folder(args.output_dir)
    written = write_shapes(Path(args.output_dir), args.seed, {"train": args.num, "val": args.num_val})
    print(f"{args.output_dir}: {args.num} training and {args.num_val} validation shapes, {written} new")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", required=True, help="gets the folders train and val")
    parser.add_argument("--num", type=int, default=240, help="training shapes (default 240)")
    parser.add_argument("--num_val", type=int, default=24, help="validation shapes (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
