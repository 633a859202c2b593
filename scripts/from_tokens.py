"""Turn ids back into meshes or voxels: ids from scripts/to_tokens.py, or from a language model's answers.

    python scripts/from_tokens.py --tokenizer outputs/stage2 --tokens outputs/tokens --output_dir outputs/meshes
    python scripts/from_tokens.py --tokenizer TOKENIZER --text answers.jsonl --output_dir outputs/meshes --repair

--tokens takes a folder or a Parquet file; each object becomes {sha256}.glb, and names.csv says which object that is:
its columns are sha256, name (as in the Parquet file) and file.
--text takes a file with one answer per line, which becomes line000001.glb. A line of a .jsonl is a text, or an object
that has the answer as `predict` (LLaMA-Factory's predictions), `output`, `response` or `text`, or has `conversations`,
of which the last mesh is taken. An answer must contain exactly one whole object; with --repair, other answers are
repaired and the repairs printed.
Nothing is overwritten. If objects cannot be written, they are listed and the exit code is 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trellis.grids.placing import UP_AXES
from trellis.grids.volumes import Frame, write_nifti
from trellis.grids.voxels import occupancy_to_points, write_ply
from trellis.tokenizer import SparseStructureTokenizer
from trellis.tokens import parquet
from trellis.utils.command import DEVICES, pick_device, run_command
from trellis.utils.errors import DataError
from trellis.utils.files import atomic_write

FORMATS = {"glb": ".glb", "obj": ".obj", "ply": ".ply", "stl": ".stl", "voxels": ".ply", "nifti": ".nii.gz"}
NAMES = "names.csv"
NAME_FIELDS = ("sha256", "name", "file")
ANSWERS = ("predict", "output", "response", "text")

# Reads the ids of one object and its frame in a scan, if any, later: one may fail while others are fine.
Reader = Callable[[], tuple[Tensor, str | None]]


class Report(NamedTuple):
    """What came of the objects.

    written: the paths of their files.
    left_out: (name, reason) of the others.
    open: how many of the label maps come from surfaces that are not closed.
    surfaces: how many come from surfaces.
    """

    written: list[Path]
    left_out: list[tuple[str, str]]
    open: int
    surfaces: int


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
    parser.add_argument("--repair", action="store_true", help="repair damaged answers of --text")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)
    if args.format == "nifti" and args.text:
        parser.error("--format nifti goes with --tokens: an answer does not say which scan it belongs to")
    if args.repair and not args.text:
        parser.error("--repair goes with --text")
    if args.up_axis and args.format in ("voxels", "nifti"):
        parser.error("--up_axis goes with meshes: voxels have the axes of the grid")
    return args


def from_parquet(path: str, tokenizer: SparseStructureTokenizer) -> Iterator[tuple[str, Reader]]:
    """Yield the name and the ids of each object. Raise DataError if another tokenizer made them."""
    info = parquet.read_info(path)
    if info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{path}: its ids come from the tokenizer with hash {info.tokenizer_hash[:12]}…, but this one has "
            f"{tokenizer.hash[:12]}…. Give the one that made them{_settings_that_differ(info, tokenizer)}."
        )
    for row in parquet.read_shards(path):
        if not re.fullmatch(r"[\w-]+", row["sha256"] or ""):
            raise DataError(f"{path}: sha256 {row['sha256']!r} is not a hash and cannot name a file.")
        yield row["sha256"], partial(_of_row, row)


def _settings_that_differ(info: parquet.TokenInfo, tokenizer: SparseStructureTokenizer) -> str:
    here = tokenizer.token_info()
    names = ("resolution", "normalization", "up_axis")
    pairs = [(name, getattr(info, name), getattr(here, name)) for name in names]
    differing = ", ".join(f"{name} {there} and not {value}" for name, there, value in pairs if there != value)
    return f", with {differing}" if differing else ""


def _of_row(row: dict[str, Any]) -> tuple[Tensor, str | None]:
    return torch.from_numpy(row["tokens"]), row.get("frame")


def from_text(path: str, tokenizer: SparseStructureTokenizer, repair: bool) -> Iterator[tuple[str, Reader]]:
    """Yield the name and the ids of each answer; blank lines are skipped.

    Raise DataError if the file cannot be read. A reader raises it for a damaged answer.
    """
    words, fill = tokenizer.token_format(), tokenizer.empty_ids if repair else None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a text file or a .jsonl.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Give a text file or a .jsonl.") from error

    def read(line: str, name: str) -> tuple[Tensor, None]:
        answer = answer_of(line, words.start) if path.lower().endswith(".jsonl") else line
        parsed = words.from_text(answer, tokenizer.num_tokens, strict=not repair, fill=fill)
        for problem in parsed.problems:
            tqdm.write(f"repaired: {name}: {problem}")
        return parsed.ids, None

    found = False
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = True
            name = f"line{number:06d}"
            yield name, partial(read, line, name)
    if not found:
        raise DataError(f"{path}: is empty. Give a text file with an answer in each line, or a .jsonl.")


def answer_of(line: str, start: str) -> str:
    """Return the answer in a line of a .jsonl. Raise DataError if there is none. start: the first word of a mesh."""
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"is not JSON ({error})") from error
    if isinstance(value, dict):
        turns = value.get("conversations")
        # The mesh is gpt's answer, or part of the question if gpt describes it.
        texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [text for text in texts if isinstance(text, str) and start in text]
        answers = [value[key] for key in ANSWERS if key in value]
        value = answers[0] if answers else texts[-1] if texts else None
    if not isinstance(value, str):
        raise DataError(f"has no text as {', '.join(ANSWERS)} or in conversations")
    return value


def write_objects(args: argparse.Namespace) -> Report:
    """Write a file for each object, and for --tokens NAMES.

    Raise DataError, before any file is written, if one exists already.
    """
    device = pick_device(args.device)
    tokenizer = SparseStructureTokenizer.load(args.tokenizer).to(device)

    def objects() -> Iterator[tuple[str, Reader]]:
        if args.tokens:
            return from_parquet(args.tokens, tokenizer)
        return from_text(args.text, tokenizer, args.repair)

    up_axis = args.up_axis or (parquet.read_info(args.tokens).up_axis if args.tokens else None)
    folder, suffix = Path(args.output_dir), FORMATS[args.format]
    names = Counter(name for name, _ in objects())
    for name, number in names.items():
        if number > 1:
            raise DataError(f"{args.tokens}: has {name} {number} times. Give the files one by one.")
        if (folder / f"{name}{suffix}").exists():
            raise DataError(f"{folder / f'{name}{suffix}'}: exists already. Give another --output_dir.")
    named = read_names(folder / NAMES) if args.tokens else []
    folder.mkdir(parents=True, exist_ok=True)
    written, left_out, surfaces_closed = [], [], []
    for name, read in tqdm(objects(), total=len(names), unit="object", disable=not sys.stderr.isatty()):
        path = folder / f"{name}{suffix}"
        try:
            ids, frame = read()
            closed = write(tokenizer, ids, frame, path, args.format, up_axis)
        except DataError as error:
            left_out.append((name, str(error)))
        else:
            written.append(path)
            if closed is not None:
                surfaces_closed.append(closed)
    if args.tokens:
        write_names(folder / NAMES, named, args.tokens, written)
    return Report(written, left_out, surfaces_closed.count(False), len(surfaces_closed))


def read_names(path: Path) -> list[list[str]]:
    """Return the rows that earlier runs wrote, none without a file. Raise DataError for another kind of table."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as table:
            header, *rows = csv.reader(table)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give another --output_dir.") from error
    if tuple(header) != NAME_FIELDS:
        raise DataError(f"{path}: is a table of something else ({', '.join(header)}). Give another --output_dir.")
    return rows


def write_names(path: Path, before: list[list[str]], tokens: str, written: list[Path]) -> None:
    """Add the files to the table of files, with the names that their objects have in the Parquet files."""
    files = {file.name.split(".")[0]: file.name for file in written}
    rows = [
        [row["sha256"], row["name"], files[row["sha256"]]]
        for row in parquet.read_shards(tokens)
        if row["sha256"] in files
    ]
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as table:
        csv.writer(table, lineterminator="\n").writerows([NAME_FIELDS, *before, *rows])


def write(
    tokenizer: SparseStructureTokenizer, ids: Tensor, frame: str | None, path: Path, kind: str, up_axis: str | None
) -> bool | None:
    """Write the object of ids [T] as one of FORMATS. Raise DataError if it has no voxel, or for NIfTI no frame.

    frame: where it lies in its scan, see grids.volumes.Frame.
    up_axis: of a mesh; None for the tokenizer's setting.
    Return whether the surface that a label map was filled from is closed; None if it comes from no surface.
    """
    if kind not in ("voxels", "nifti"):
        tokenizer.save_mesh(ids, path, up_axis=up_axis)
        return None
    grid = (tokenizer.decode(ids)[0, 0] > 0).cpu()
    if not grid.any():
        raise DataError("decodes to no voxel")
    if kind == "voxels":
        write_ply(path, occupancy_to_points(grid))
        return None
    if frame is None:
        raise DataError(
            "comes from no scan whose space is known, so it cannot be written as NIfTI: take another --format"
        )
    place = Frame.from_json(frame)
    closed = write_nifti(path, grid.numpy(), place)
    return closed if place.fill == "surface" else None


def report_objects(args: argparse.Namespace) -> int:
    written, left_out, open_surfaces, surfaces = write_objects(args)
    print(f"{args.output_dir}: {len(written)} {'file' if len(written) == 1 else 'files'} written")
    for name, reason in left_out:
        print(f"left out: {name}: {reason}")
    if open_surfaces:
        print(
            f"{open_surfaces} of {surfaces} surfaces were not closed, so their label maps are hollow: make grids with "
            "--fill solid"
        )
    if left_out:
        print(f"error: {len(left_out)} of {len(written) + len(left_out)} objects could not be written", file=sys.stderr)
    return 1 if left_out else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(report_objects, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
