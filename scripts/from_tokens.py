"""Turn ids back into meshes or voxels: ids from scripts/to_tokens.py, or from a language model's answers.

    python scripts/from_tokens.py --tokenizer outputs/stage2 --tokens outputs/tokens --output_dir outputs/meshes
    python scripts/from_tokens.py --tokenizer TOKENIZER --text answers.jsonl --output_dir outputs/meshes --repair

--tokens takes a folder or a Parquet file; each object becomes a file of its name and the first digits of its hash, such
as chair_1f0c9a2e.glb, and names.csv says which object that is: its columns are sha256, name (as in the Parquet file)
and file.
--text takes a file with one answer per line, which becomes line000001.glb. A line of a .jsonl is a text, or an object
that has the answer as `predict` (LLaMA-Factory's predictions), `output`, `response` or `text`, or has `conversations`,
of which the last mesh is taken. An answer must contain exactly one whole object; with --repair, other answers are
repaired and the repairs printed.
Files are written atomically, by several processes. A rerun of the same command makes only those that are missing, and
of another one into the same folder is refused, unless it makes another format. Nothing is overwritten. If objects
cannot be written, they are listed and the exit code is 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trellis.grids.mesh_pool import run_in_pool
from trellis.grids.placing import UP_AXES, axis_to_write
from trellis.grids.surface import save_mesh, surface_mesh
from trellis.grids.volumes import Frame, write_nifti
from trellis.grids.voxels import voxel_centers, write_ply
from trellis.tokens.forms import FORMS, form_of
from trellis.utils.command import DEVICES, available_cores, check_output_folder, pick_device, run_command
from trellis.utils.errors import DataError
from trellis.utils.files import atomic_write, remove_leftovers
from trellis.utils.progress import waiting

# Workers import this file again, and they need no torch.
if TYPE_CHECKING:
    from scripts.id_sources import IdObject, Reader
    from trellis.tokenizer import SparseStructureTokenizer
    from trellis.tokens.parquet import TokenInfo

FORMATS = {"glb": ".glb", "obj": ".obj", "ply": ".ply", "stl": ".stl", "voxels": ".ply", "nifti": ".nii.gz"}
NAMES = "names.csv"
NAME_FIELDS = ("sha256", "name", "file")
BATCH = {"cpu": 8, "cuda": 64}  # objects that are decoded together


class Report(NamedTuple):
    """What came of the objects.

    written: the number of new files.
    present: of files that an earlier run made.
    left_out: (name, reason) of the other objects.
    open: how many of the new label maps come from surfaces that are not closed.
    surfaces: how many come from surfaces.
    """

    written: int
    present: int
    left_out: list[tuple[str, str]]
    open: int
    surfaces: int


class Task(NamedTuple):
    """A file to write."""

    path: Path
    bits: bytes  # [R, R, R], a bit for each voxel
    resolution: int  # R
    kind: str  # of FORMATS
    to_y_up: bool  # of a mesh
    frame: str | None  # where the object lies in its scan, see grids.volumes.Frame


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SOURCE",
        help="tokenizer folder, run folder, file in ShapeLLM-Omni's layout, or id on the Hub",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokens", metavar="PATH", help="folder of scripts/to_tokens.py, or a Parquet file")
    source.add_argument("--text", metavar="FILE", help="answers of a language model, one per line; or .jsonl")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="glb",
        help="mesh format (default: glb); voxels: a PLY file of their centers, as voxelize.py writes; nifti: a label "
        "map in the space of the scan that an object of --tokens comes from",
    )
    parser.add_argument(
        "--up_axis",
        choices=UP_AXES,
        help="axes of the meshes: auto for those of the format (a GLB is y-up, the others z-up as the grid), y, z, or "
        "keep for the grid's (default: the setting that --tokens were made with, else the tokenizer's)",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="of the answers in --text, as to_tokens.py's flag (default: octree if the tokenizer has an empty code, "
        "else dense)",
    )
    parser.add_argument("--repair", action="store_true", help="repair damaged answers of --text")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--max_workers", type=int, default=available_cores(), help="processes that write files (default: one per core)"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds to write a file (default: 120)")
    args = parser.parse_args(argv)
    if args.max_workers < 1:
        parser.error(f"--max_workers is {args.max_workers}; it must be at least 1")
    if args.timeout <= 0:
        parser.error(f"--timeout is {args.timeout}; it must be above 0")
    if args.format == "nifti" and args.text:
        parser.error("--format nifti goes with --tokens: an answer does not say which scan it belongs to")
    if args.repair and not args.text:
        parser.error("--repair goes with --text")
    if args.form and not args.text:
        parser.error("--form goes with --text: the files of --tokens say their form")
    if args.up_axis and args.format in ("voxels", "nifti"):
        parser.error("--up_axis goes with meshes: voxels have the axes of the grid")
    return args


def write_file(*fields) -> bool | None:
    """Write the file of a Task. Raise DataError if the object has no voxel, or for NIfTI no frame.

    Return whether the surface that a label map was filled from is closed; None if it comes from no surface.
    """
    task = Task(*fields)
    side = task.resolution
    grid = np.unpackbits(np.frombuffer(task.bits, np.uint8), count=side**3).reshape(side, side, side).astype(bool)
    if not grid.any():
        raise DataError("decodes to no voxel")
    if task.kind == "voxels":
        write_ply(task.path, voxel_centers(np.argwhere(grid), side))
        return None
    if task.kind != "nifti":
        save_mesh(surface_mesh(grid), task.path, task.to_y_up)
        return None
    if task.frame is None:
        raise DataError(
            "comes from no scan whose space is known, so it cannot be written as NIfTI: take another --format"
        )
    frame = Frame.from_json(task.frame)
    closed = write_nifti(task.path, grid, frame)
    return closed if frame.fill == "surface" else None


class Plan(NamedTuple):
    """What is to be done."""

    objects: "list[IdObject]"  # all
    readers: "Callable[[], Iterator[Reader]]"  # of their ids, in the same order
    settings: dict[str, str | bool]  # what the files depend on, besides the objects
    to_y_up: bool


def plan_objects(args: argparse.Namespace, tokenizer: "SparseStructureTokenizer") -> Plan:
    """Return the objects of --tokens or --text. Raise DataError if they cannot be read or are another tokenizer's."""
    from scripts import id_sources
    from trellis.tokens import parquet

    settings: dict[str, str | bool] = {"tokenizer": tokenizer.hash}
    up_axis = args.up_axis or tokenizer.up_axis
    if args.tokens:
        info: TokenInfo = parquet.read_info(args.tokens)
        id_sources.check_tokenizer(args.tokens, info, tokenizer)
        up_axis = args.up_axis or info.up_axis
        objects = id_sources.objects_of_parquet(args.tokens)
        settings |= {"tokens_up_axis": info.up_axis, "precision": info.precision}
        if key := parquet.read_data_key(args.tokens):  # an object may have other grids in other data
            settings["data"] = json.dumps(key, sort_keys=True)
    else:
        objects = id_sources.objects_of_text(args.text)
        digest = hashlib.sha256(Path(args.text).read_bytes()).hexdigest()
        form = form_of(args.form, tokenizer.empty_code)
        settings |= {"answers": digest, "form": form, "repair": args.repair}
    mesh = args.format not in ("voxels", "nifti")
    to_y_up = mesh and axis_to_write(up_axis, FORMATS[args.format], tokenizer.normalization) == "y"
    if mesh:
        settings["to_y_up"] = to_y_up

    def readers() -> "Iterator[Reader]":
        if args.tokens:
            return id_sources.ids_of_parquet(args.tokens, tokenizer)
        return id_sources.ids_of_text(args.text, form, tokenizer, args.repair)

    return Plan(objects, readers, settings, to_y_up)


def claim_folder(folder: Path, kind: str, settings: dict[str, str | bool], paths: list[Path]) -> None:
    """Note how the files of a format are made, or compare with what is noted.

    paths: of all objects.
    Raise DataError if the folder has files of other settings, or of unknown ones.
    """
    path = folder / f".from_tokens_{kind}.json"  # hidden: it is of no use to who wants the files
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: is damaged ({error}). Give another --output_dir.") from error
        if found != settings:
            differing = ", ".join(key for key in settings | found if settings.get(key) != found.get(key))
            raise DataError(
                f"{folder}: has {kind} files of other ids or settings ({differing}). Give the same as before, or "
                "another --output_dir."
            )
        return
    if present := next((path for path in paths if path.exists()), None):
        raise DataError(f"{present}: exists already. Give another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def write_objects(args: argparse.Namespace) -> Report:
    """Write the files that are missing, one for each object, and for --tokens NAMES.

    Raise DataError, before any file is written, if the folder has files of other settings.
    """
    from trellis.tokenizer import SparseStructureTokenizer

    folder = check_output_folder(args.output_dir)
    device = pick_device(args.device)
    tokenizer = SparseStructureTokenizer.load(args.tokenizer).to(device)
    plan = plan_objects(args, tokenizer)
    paths = [folder / f"{each.stem}{FORMATS[args.format]}" for each in plan.objects]
    if args.tokens:
        check_names(folder / NAMES, plan.objects, paths)
    if not plan.objects:
        raise DataError(f"{args.tokens}: has no object. Give a folder of scripts/to_tokens.py, or one of its shards.")
    claim_folder(folder, args.format, plan.settings, paths)
    remove_leftovers(folder)
    missing = [not path.exists() for path in paths]
    written = 0
    left_out: list[tuple[str, str]] = []
    surfaces_closed: list[bool] = []
    names = {path: each.name or each.stem for path, each in zip(paths, plan.objects, strict=True)}

    def finish(task: tuple, result: bool | DataError | None) -> None:
        nonlocal written
        progress(progress.done + 1)
        if isinstance(result, DataError):
            left_out.append((names[task[0]], str(result)))
            return
        written += 1
        if result is not None:
            surfaces_closed.append(result)

    def tasks() -> Iterator[Task]:
        waiting = ((path, read) for path, read, new in zip(paths, plan.readers(), missing, strict=True) if new)
        while part := list(islice(waiting, BATCH[device.type])):
            yield from decoded(part)

    def decoded(part: "list[tuple[Path, Reader]]") -> Iterator[Task]:
        import torch

        read = []
        for path, reader in part:
            try:
                read.append((path, *reader()))
            except DataError as error:
                finish((path,), error)
        if read:
            grids = (tokenizer.decode(torch.stack([ids for _, ids, _ in read])) > 0).flatten(1).cpu().numpy()
            for (path, _, frame), bits in zip(read, np.packbits(grids, axis=1), strict=True):
                yield Task(path, bits.tobytes(), tokenizer.resolution, args.format, plan.to_y_up, frame)

    with waiting("writing", sum(missing)) as progress:
        if args.format == "voxels" or args.max_workers == 1:  # voxels are written in no time
            run_here(tasks(), finish)
        else:
            run_in_pool(write_file, tasks(), finish, min(args.max_workers, max(1, sum(missing))), args.timeout)
    if args.tokens:
        write_names(folder / NAMES, plan.objects, paths)
    left_out.sort(key=lambda each: each[0])
    present = len(missing) - sum(missing)
    return Report(written, present, left_out, surfaces_closed.count(False), len(surfaces_closed))


def run_here(tasks: Iterable[Task], finish: Callable[[tuple, bool | DataError | None], None]) -> None:
    """Do tasks as `run_in_pool` does, in this process."""
    for task in tasks:
        try:
            result: bool | DataError | None = write_file(*task)
        except DataError as error:
            result = error
        finish(task, result)


def read_names(path: Path) -> list[list[str]]:
    """Return the rows that earlier runs wrote, none without a file. Raise DataError for another kind of table."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as table:
            header, *rows = csv.reader(table)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give another --output_dir.") from error
    if tuple(header) != NAME_FIELDS or any(len(row) != len(NAME_FIELDS) for row in rows):
        raise DataError(f"{path}: is a table of something else ({', '.join(header)}). Give another --output_dir.")
    return rows


def check_names(path: Path, objects: "list[IdObject]", paths: list[Path]) -> None:
    """Raise DataError if the table of files cannot be read, or gives an object's file to another object.

    paths: of the objects' files.
    """
    owners = {row[-1]: row[0] for row in read_names(path)}
    for each, file in zip(objects, paths, strict=True):
        if (owner := owners.get(file.name, each.sha256)) != each.sha256:
            raise DataError(f"{file}: is of {owner}, not of {each.sha256}. Give another --output_dir.")


def write_names(path: Path, objects: "list[IdObject]", paths: list[Path]) -> None:
    """Add the files that are there to the table of files.

    paths: of the objects' files.
    """
    before = read_names(path)  # now: another format may have been written meanwhile
    listed = {row[-1] for row in before}
    rows = [
        [each.sha256, each.name, file.name]
        for each, file in zip(objects, paths, strict=True)
        if file.name not in listed and file.exists()
    ]
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as table:
        csv.writer(table, lineterminator="\n").writerows([NAME_FIELDS, *before, *rows])


def report_objects(args: argparse.Namespace) -> int:
    written, present, left_out, open_surfaces, surfaces = write_objects(args)
    before = f", {present} were there already" if present else ""
    print(f"{args.output_dir}: {written} {'file' if written == 1 else 'files'} written{before}")
    for name, reason in left_out:
        print(f"left out: {name}: {reason}")
    if open_surfaces:
        print(
            f"{open_surfaces} of {surfaces} surfaces were not closed, so their label maps are hollow: make grids with "
            "--fill solid"
        )
    if left_out:
        total = written + present + len(left_out)
        print(f"error: {len(left_out)} of {total} objects could not be written", file=sys.stderr)
    return 1 if left_out else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(report_objects, parse_args(argv), interrupted="interrupted: run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
