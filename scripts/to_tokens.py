"""Turn objects into ids: Parquet files of a whole data set, and conversations for fine-tuning a language model.

    python scripts/to_tokens.py --tokenizer outputs/stage2 --data_dir data/voxels --output_dir outputs/tokens
    python scripts/to_tokens.py --tokenizer TOKENIZER --meshes meshes/ --output_dir outputs/tokens --sharegpt

Grids come from data roots, as for train.py, or from meshes, which are voxelized with the tokenizer's settings;
--up_axis takes the axes of their files in another way. Objects are divided into shards,
shard-00000-of-00012.parquet … (layout: trellis/tokens/parquet.py). Each is written atomically, and a rerun of the same
command writes only missing shards. All shards of a folder have the same tokenizer, data set, up axis, precision, form,
shard size and --iou. --form says how they hold an object's ids (trellis/tokens/forms.py). The folder has Parquet files
alone: meshes that cannot be voxelized are listed beside it, in OUTPUT_DIR_failed.csv; to retry one, delete its shard.
--sharegpt writes conversations as LLaMA-Factory reads them (rules: trellis/tokens/sharegpt.py) into another folder.
Each caption of an object gives two records, caption to mesh and mesh to caption. Captions come from --captions, else
from the column caption or captions of the roots' shards or metadata.csv. Given again with other captions or prompts, it
replaces the conversations, without encoding anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import functools
import pickle
import tempfile
import time
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import torch

from dataset_toolkits.records import FAILED_FIELDS, write_table
from dataset_toolkits.report import by_kind
from scripts.token_sources import BATCH, DataSource, MeshSource
from scripts.token_work import PACKAGES, Report, Work, add_up, encode_batches, run_on_cluster, run_process
from trellis.evaluation.metrics import voxel_metrics
from trellis.grids.placing import UP_AXES, check_settings
from trellis.grids.voxels import unpack_bits_on_device
from trellis.tokenizer import SparseStructureTokenizer
from trellis.tokens import parquet, sharegpt
from trellis.tokens.forms import FORMS, form_of
from trellis.utils.command import DEVICES, available_cores, check_output_folder, pick_device, run_command
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.processes import run_all
from trellis.utils.progress import waiting
from trellis.utils.ray_cluster import Cluster, joined
from trellis.utils.signals import Stopped

FAILED = "_failed.csv"  # ending of the table of meshes that cannot be voxelized
REASONS_SHOWN = 5
COMPARED = 16  # objects that a run in bf16 encodes in fp32 too
# Processes may choose different kernels in bf16, and rounding decides between equally near codes.
EQUAL_IN_BF16 = 0.9


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SOURCE",
        help="tokenizer folder, run folder, file in ShapeLLM-Omni's layout, or id on the Hub",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", help="data roots as train.py takes them, separated by commas")
    source.add_argument("--meshes", nargs="+", metavar="PATH", help="mesh files, and folders to search recursively")
    parser.add_argument(
        "--up_axis",
        choices=UP_AXES,
        help="how the axes of --meshes are taken, as voxelize.py's flag (default: the tokenizer's setting)",
    )
    parser.add_argument(
        "--split", choices=("train", "val", "all"), default="all", help="split of --data_dir (default: all)"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 (default) defines the ids; bf16 is faster, but some ids differ",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="how files hold ids: all of them, or as an octree without empty blocks, breadth-first or depth-first "
        "(default: octree if the tokenizer has an empty code, else dense)",
    )
    parser.add_argument("--iou", action="store_true", help="also decode, and record each object's IoU")
    parser.add_argument("--shard_size", type=int, default=4096, help="objects per file (default: 4096)")
    parser.add_argument(
        "--verify",
        type=int,
        default=0,
        metavar="N",
        help="at the end read back N random objects, decode them, and encode their grids again: the ids "
        f"must be equal (in bf16, {EQUAL_IN_BF16:.0%}% of an object's ids)",
    )
    parser.add_argument(
        "--sharegpt",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="also write conversations, into this folder (default: OUTPUT_DIR_sharegpt, beside the other)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="question that asks for a mesh, with {caption} and {name} (default: "
        f"{sharegpt.PROMPT_OF_CAPTION!r}; without captions, {{name}} instead)",
    )
    parser.add_argument(
        "--describe_prompt",
        metavar="TEXT",
        default=sharegpt.DESCRIBE_PROMPT,
        help="question that asks for a caption, with {mesh} and {name} (default: %(default)r)",
    )
    parser.add_argument("--captions", metavar="FILE", help="CSV or JSON with sha256 and caption")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--num_gpus", type=int, default=-1, help="processes on this machine; -1: one per GPU, or one on a CPU"
    )
    parser.add_argument("--rank", type=int, default=0, help="this machine's share, from 0")
    parser.add_argument(
        "--world_size", type=int, default=1, help="number of machines that share the work and the folder"
    )
    parser.add_argument(
        "--max_workers",
        type=int,
        help="with --meshes, voxelizing processes on this machine, with --ray on each node (default: one per core)",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="do the work on a Ray cluster, see docs/cluster.md: auto for the one of this machine, or host:port; "
        "without ADDRESS, one that is made of this machine. Then --num_gpus is the number of processes of a node",
    )
    parser.add_argument("--timeout", type=float, default=120, help="with --meshes, seconds per file (default: 120)")
    args = parser.parse_args(argv)
    args.workers_of_node = args.max_workers
    if args.max_workers is None:
        args.max_workers = available_cores()
    for name, low in (("shard_size", 1), ("verify", 0), ("world_size", 1), ("rank", 0), ("max_workers", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {low}")
    if args.rank >= args.world_size:
        parser.error(f"--rank is {args.rank}; with --world_size {args.world_size} it must be less")
    if args.ray is not None and args.world_size > 1:
        parser.error("--ray does not go with --rank and --world_size: Ray shares the work itself")
    if args.num_gpus == 0 or args.num_gpus < -1:
        parser.error(f"--num_gpus is {args.num_gpus}; it must be -1 or at least 1")
    if args.timeout <= 0:
        parser.error(f"--timeout is {args.timeout}; it must be above 0")
    if args.up_axis and not args.meshes:
        parser.error("--up_axis goes with --meshes: grids of --data_dir are turned already")
    args.sharegpt = beside(args.output_dir, "_sharegpt") if args.sharegpt == "" else args.sharegpt
    if args.sharegpt:
        tokens, conversations = Path(args.output_dir).resolve(), Path(args.sharegpt).resolve()
        if conversations.is_relative_to(tokens):
            parser.error(
                f"--sharegpt is {args.sharegpt}, in --output_dir, which has Parquet files alone: readers of Parquet "
                "folders stumble over others. Give another folder"
            )
    if args.captions and not args.sharegpt:
        parser.error("--captions goes with --sharegpt")
    return args


def beside(folder: str, ending: str) -> str:
    """Return a path beside a folder: its own with an ending."""
    path = Path(folder).absolute()
    return str(path.with_name(path.name + ending)) if path.name else str(path / ending.strip("_"))


# --- processes ------------------------------------------------------------------------------------------------


def _spawned(work: Work, numbers: list[list[int]], reports: Path, process: int) -> int:
    """Run one process, which leaves its Report in a folder: a pipe may be too short for what there is to note."""
    if not work.cuda:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(numbers)))
    tokenizer = SparseStructureTokenizer.load(work.args.tokenizer)
    if work.cuda:
        torch.cuda.set_device(process)
        tokenizer.to(torch.device("cuda", process))
    report = run_process(work, tokenizer, numbers[process], process, len(numbers))
    (reports / str(process)).write_bytes(pickle.dumps(report))
    return 0


def run_processes(work: Work, tokenizer: SparseStructureTokenizer, numbers: list[int], processes: int) -> Report:
    """Divide the shards among processes, one for each GPU, and add up their reports."""
    if processes == 1:
        return run_process(work, tokenizer, numbers, 0, 1)
    shares = [numbers[i::processes] for i in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        if code := run_all(functools.partial(_spawned, work, shares, Path(folder)), processes):
            raise Stopped(code - 128)
        reports = [pickle.loads((Path(folder) / str(process)).read_bytes()) for process in range(processes)]
    return add_up(reports)


# --- all of it ------------------------------------------------------------------------------------------------


def plan_work(
    args: argparse.Namespace, tokenizer: SparseStructureTokenizer, cuda: bool, cluster: Cluster | None = None
) -> Work:
    """Read the data's index, and claim the output folder.

    cluster: of Ray, which does the work; None: this machine.
    Raise UserError if the folder was made with other settings, or if there is nothing to do.
    """
    parquet.require_pyarrow()
    folder = Path(args.output_dir)
    up_axis = args.up_axis or tokenizer.up_axis
    check_settings(up_axis, tokenizer.normalization)
    settings = tokenizer.resolution, up_axis, tokenizer.normalization
    source: DataSource | MeshSource
    if args.meshes:
        source = MeshSource(args.meshes, *settings, args.max_workers, args.timeout, folder, cluster)
    else:
        source = DataSource(args.data_dir, args.split, *settings)
    form = form_of(args.form, tokenizer.empty_code)
    info = replace(tokenizer.token_info(args.precision, form), up_axis=up_axis)
    largest = 2**31 // (2 * info.num_tokens)  # objects; the masks of an octree are fewer than the ids
    if min(args.shard_size, len(source.objects)) > largest:
        raise ConfigError(
            f"--shard_size is {args.shard_size}; a file holds at most {largest} objects of this tokenizer"
        )
    starts = range(0, len(source.objects), args.shard_size)
    shards = {number: slice(start, start + args.shard_size) for number, start in enumerate(starts)}
    prompts, captions = plan_conversations(args, source) if args.sharegpt else (None, {})

    folder.mkdir(parents=True, exist_ok=True)
    frames = source.has_frames()
    made_from = {"data": source.key(), "iou": args.iou, "shard_size": args.shard_size, "shards": len(shards)}
    parquet.claim(folder, info, made_from, args.iou, frames)
    if prompts is not None:
        tokens = {**asdict(info), "data": made_from["data"], "shard_size": args.shard_size}
        digest = sharegpt.captions_digest(captions)
        if sharegpt.claim(Path(args.sharegpt), prompts, digest, tokens, args.world_size == 1):
            source.notes.append(f"{args.sharegpt}: its conversations had other prompts or captions and are replaced")
    return Work(args, info, source, shards, len(shards), made_from, prompts, captions, cuda, frames)


def plan_conversations(
    args: argparse.Namespace, source: DataSource | MeshSource
) -> tuple[sharegpt.Prompts, dict[str, list[str]]]:
    """Return the questions, and captions by sha256. Raise DataError if no object would have a record."""
    captions = sharegpt.read_captions(Path(args.captions), required=True) if args.captions else source.captions()
    captions = {sha256: captions[sha256] for sha256, *_ in source.objects if sha256 in captions}
    if args.captions and not captions:
        raise DataError(f"{args.captions}: has no caption of any object. Its sha256 must be the data's.")
    default = sharegpt.PROMPT_OF_CAPTION if captions else sharegpt.PROMPT_OF_NAME
    prompts = sharegpt.Prompts(args.prompt or default, args.describe_prompt)
    made = [
        bool(sharegpt.records(item.sha256, item.name, "-", captions.get(item.sha256, ()), prompts))
        for item in source.objects
    ]
    fields = " or ".join(f"{{{name}}}" for name in prompts.fields)
    if not any(made):
        raise DataError(
            f"--prompt {prompts.make!r}: no object has every field that it uses ({fields}). Give --captions, or "
            "another prompt."
        )
    if not captions and not args.prompt:
        source.notes.append("the objects have no captions: conversations ask for them by the names of their files")
    if not all(made):
        source.notes.append(
            f"{len(made) - sum(made)} of {len(made)} objects have no {fields or 'caption'}, and so no conversation"
        )
    return prompts, captions


def verify(work: Work, tokenizer: SparseStructureTokenizer, numbers: list[int]) -> str:
    """Read back random objects of these shards, decode them, and encode their grids again. Return the result in words.

    Raise DataError naming the first object whose row does not match its grid.
    """
    lengths = np.array([parquet.count_rows(work.path(number)) for number in numbers])
    chosen = np.sort(np.random.default_rng().permutation(lengths.sum())[: work.args.verify])
    ends, rows = lengths.cumsum(), []
    for number, first, end in zip(numbers, ends - lengths, ends, strict=True):
        wanted = set((chosen[(chosen >= first) & (chosen < end)] - first).tolist())
        if wanted:
            rows += [row for i, row in enumerate(parquet.read_shards(work.path(number))) if i in wanted]
    grids, stored = work.source.grids([row["sha256"] for row in rows]), np.stack([row["tokens"] for row in rows])
    precision, size = work.args.precision, BATCH[tokenizer.device.type]
    ids, num_voxels = encode_batches(tokenizer, grids.split(size), precision, False)
    equal = (ids == stored).mean(1)
    ious = np.concatenate(
        [
            voxel_metrics(
                tokenizer.decode(torch.from_numpy(stored[start : start + size]), precision),
                unpack_bits_on_device(grids[start : start + size].to(tokenizer.device), tokenizer.resolution),
            )["iou"]
            .cpu()
            .numpy()
            for start in range(0, len(rows), size)
        ]
    )
    for row, voxels, share, iou in zip(rows, num_voxels, equal, ious, strict=True):
        if share < (1 if precision == "fp32" else EQUAL_IN_BF16):
            raise DataError(
                f"--verify: {row['sha256']} has only {share:.2%} of the ids that its grid has now (IoU of the stored "
                f"ids {iou:.4f}). Another device or version may round differently; otherwise delete the shards and "
                "run again."
            )
        if row["num_voxels"] != voxels or abs(row.get("iou", iou) - iou) > 0.01:
            raise DataError(
                f"--verify: {row['sha256']} has {voxels} voxels and IoU {iou:.4f}, but its row says "
                f"{row['num_voxels']} and {row.get('iou', iou):.4f}. Delete the shards and run again."
            )
    return (
        f"verified {len(rows)} objects read back: {equal.mean():.2%} of the ids equal, IoU mean {ious.mean():.4f}, "
        f"minimum {ious.min():.4f}"
    )


def agreement(work: Work, tokenizer: SparseStructureTokenizer, numbers: list[int]) -> str:
    """Return, in words, the share of the first objects' ids that fp32 gives too."""
    rows = list(islice((row for number in numbers for row in parquet.read_shards(work.path(number))), COMPARED))
    stored = np.stack([row["tokens"] for row in rows])
    ids, _ = encode_batches(tokenizer, [work.source.grids([row["sha256"] for row in rows])], "fp32", False)
    return f"{(ids == stored).mean():.2%} of the ids of {len(rows)} objects equal fp32's"


def list_failures(work: Work) -> list[dict[str, str]]:
    """Write OUTPUT_DIR_failed.csv from the shards of all machines that exist so far. Return its rows."""
    present = [work.path(number) for number in work.shards if work.path(number).exists()]
    rows = work.source.failures + [row for path in present for row in parquet.read_left_out(path)]
    path = Path(beside(work.args.output_dir, FAILED))
    if rows:
        write_table(path, FAILED_FIELDS, sorted(rows, key=lambda row: row["file"]))
    elif path.exists():  # else a folder that is finished, on a read-only disk, would be an error
        path.unlink()
    return rows


def count_gpus(args: argparse.Namespace, cluster: Cluster | None) -> tuple[int, bool]:
    """Return the number of GPUs, 1 without any, and whether there are any. Raise ConfigError if too few."""
    if cluster is None:
        cuda = pick_device(args.device).type == "cuda"
        there = torch.cuda.device_count() if cuda else 1
        if cuda and args.num_gpus > there:
            raise ConfigError(f"--num_gpus is {args.num_gpus}, but this machine has {there}")
        return there, cuda
    there = 0 if args.device == "cpu" else sum(node.gpus for node in cluster.nodes())
    if args.device == "cuda" and not there:
        raise ConfigError(f"--device cuda: no node of --ray {args.ray} has a GPU that Ray knows of; use --device cpu")
    return max(1, there), there > 0


def run(args: argparse.Namespace) -> None:
    """Tokenize this machine's share and print what was done."""
    started = time.perf_counter()
    for flag, folder in (("--output_dir", args.output_dir), ("--sharegpt", args.sharegpt)):
        if folder:
            check_output_folder(folder, flag)
    if args.ray is None:
        do_work(args, started)
        return
    with joined(args.ray, PACKAGES) as cluster:
        do_work(args, started, cluster)


def do_work(args: argparse.Namespace, started: float, cluster: Cluster | None = None) -> None:
    """Do the work of `run` on this machine, or on a Ray cluster. started: when the program was."""
    there, cuda = count_gpus(args, cluster)
    tokenizer = SparseStructureTokenizer.load(args.tokenizer)
    with waiting("reading the list of objects"):
        work = plan_work(args, tokenizer, cuda, cluster)
    for note in work.source.notes:
        print(f"note: {note}")
    numbers = list(work.shards)[args.rank :: args.world_size]
    todo = [number for number in numbers if work.unfinished(number)]
    processes = max(1, min(there if args.num_gpus == -1 else args.num_gpus, len(todo)))
    here = pick_device("auto" if cuda else "cpu")
    if cluster is not None:
        report = run_on_cluster(work, cluster, todo)
        processes = len(cluster.processes)
    else:
        if cuda and processes == 1:
            tokenizer.to("cuda")
        report = run_processes(work, tokenizer, todo, processes)
    total = time.perf_counter() - started

    failures = list_failures(work)
    rows = sum(parquet.count_rows(work.path(number)) for number in numbers)
    share = f" (rank {args.rank} of {args.world_size})" if args.world_size > 1 else ""
    print(f"{args.output_dir}: {rows} objects, {report.objects} of them new; shards: {len(numbers)}{share}")
    if report.objects:
        print(
            f"  {report.objects / report.seconds:.1f} objects/s in {args.precision}, {report.seconds:.1f} s without "
            f"start-up, {total:.1f} s with it; processes: {processes} on {'GPUs' if cuda else 'the CPU'}"
        )
    if args.iou and rows:
        ious = np.concatenate([parquet.read_column(work.path(number), "iou") for number in numbers])
        print(f"  IoU mean {ious.mean():.4f}, median {np.median(ious):.4f}")
    if args.sharegpt:
        print(
            f"  {report.records} new conversations in {args.sharegpt}; data set {sharegpt.DATASET} of {sharegpt.INFO}"
        )
    for line in by_kind(report.noted):
        print(f"  noted: {line}")
    for row in failures[:REASONS_SHOWN]:
        print(f"  left out: {row['file']}: {row['reason']}")
    if failures:
        print(f"  all reasons ({len(failures)}): {beside(args.output_dir, FAILED)}")
    if numbers and not rows:
        raise DataError(f"{args.output_dir}: no object has ids; {beside(args.output_dir, FAILED)} has the reasons")
    if rows and args.precision == "bf16":
        with waiting("encoding in fp32"):
            text = agreement(work, tokenizer.to(here), numbers)
        print("  " + text)
    if args.verify and rows:
        tokenizer.to(here)
        with waiting("verifying"):
            text = verify(work, tokenizer, numbers)
        print("  " + text)


def main(argv: list[str] | None = None) -> int:
    return run_command(run, parse_args(argv), interrupted="interrupted: run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
