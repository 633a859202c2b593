"""What a process of scripts/to_tokens.py does: encode the objects of some shards, and write them and conversations.

Axes: B objects of a batch, R voxels along an axis, T ids of an object.
"""

import argparse
import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.token_sources import DataSource, MeshSource, Shard, TokenObject
from trellis.evaluation.metrics import voxel_metrics
from trellis.grids.voxels import unpack_bits_on_device
from trellis.tokenizer import Precision, SparseStructureTokenizer
from trellis.tokens import parquet, sharegpt
from trellis.tokens.forms import Form, form_of
from trellis.utils.command import available_cores
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import host_name, remove_leftovers
from trellis.utils.progress import waiting
from trellis.utils.ray_cluster import Cluster, Lost, Node, Slot

PACKAGES = ("trellis", "dataset_toolkits", "scripts")  # what workers on other machines need of the project
SEEN_SECONDS = 60  # until a network disk shows this machine what another one has written


def encode_batches(
    tokenizer: SparseStructureTokenizer, batches: Iterable[Tensor], precision: Precision, iou: bool
) -> list[np.ndarray]:
    """Return ids [n, T] and numbers of voxels [n]; with `iou`, also each object's IoU [n] after decoding.

    Results are fetched one batch later, so that a GPU does not wait for the host.
    batches: [B, R³ / 8] uint8.
    """
    device, done, running = tokenizer.device, [], None

    def collect(running: tuple[list[Tensor], torch.cuda.Event | None]) -> None:
        results, ready = running
        if ready is not None:
            ready.synchronize()
        done.append([result.numpy().copy() for result in results])  # pinned memory is for the next batches

    # Threads other than the first do not inherit the process's device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for bits in batches:
            grids = unpack_bits_on_device(bits.to(device, non_blocking=True), tokenizer.resolution)
            ids = tokenizer.encode(grids, precision)
            results = [ids.int(), grids.flatten(1).sum(1, dtype=torch.int32)]
            if iou:
                results.append(voxel_metrics(tokenizer.decode(ids, precision), grids)["iou"])
            results = [result.to("cpu", non_blocking=True) for result in results]
            ready = torch.cuda.Event() if device.type == "cuda" else None
            if ready is not None:
                ready.record()
            if running is not None:
                collect(running)
            running = results, ready
        if running is not None:
            collect(running)
    if not done:
        done.append([np.zeros((0, tokenizer.num_tokens), np.int32), *([np.zeros(0)] * (1 + iou))])
    return [np.concatenate(column) for column in zip(*done, strict=True)]


class Work(NamedTuple):
    """What the processes of this machine share."""

    args: argparse.Namespace
    info: parquet.TokenInfo
    source: DataSource | MeshSource
    shards: dict[int, slice]  # {number: its objects}
    total: int  # of shards, of all machines
    made_from: dict  # what the ids of the folder have in common besides `info`
    prompts: sharegpt.Prompts | None
    captions: dict[str, list[str]]
    cuda: bool
    frames: bool  # whether an object says where it lies in its scan

    def path(self, number: int) -> Path:
        return Path(self.args.output_dir, parquet.shard_name(number, self.total))

    def jsonl(self, number: int) -> Path:
        return Path(self.args.sharegpt, sharegpt.DATASET, self.path(number).with_suffix(".jsonl").name)

    def files(self, number: int) -> list[Path]:
        return [self.path(number)] if self.prompts is None else [self.path(number), self.jsonl(number)]

    def length(self, number: int) -> int:
        return len(range(len(self.source.objects))[self.shards[number]])

    @property
    def form(self) -> Form:
        return form_of(self.info.form, self.info.empty_code)

    def unfinished(self, number: int) -> bool:
        return not all(path.exists() for path in self.files(number))


class Report(NamedTuple):
    """What a process has done."""

    objects: int  # with new ids
    seconds: float  # without start-up
    records: int  # conversations written
    noted: list[tuple[str, str]]  # files and what a user should know of them


def run_process(
    work: Work, tokenizer: SparseStructureTokenizer, numbers: list[int], process: int, processes: int
) -> Report:
    """Write those of these shards and of their conversations that are missing, with the tokenizer on its device."""
    args, info = work.args, work.info
    missing = {number: work.shards[number] for number in numbers if not work.path(number).exists()}
    count = 0
    if missing and work.cuda:  # the first call loads kernels, and in bf16 times them
        torch.backends.cudnn.benchmark = args.precision == "bf16"
        nothing = torch.zeros(1, (info.resolution**3 + 7) // 8, dtype=torch.uint8)
        encode_batches(tokenizer, [nothing], args.precision, args.iou)
    total = sum(map(work.length, missing))
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as writer, waiting("tokenize", total, shown=process == 0 and total > 0) as progress:
        writing: Future | None = None

        def tokenize(shard: Shard) -> None:
            nonlocal writing, count
            columns = encode_batches(tokenizer, shard.batches, args.precision, args.iou)
            if writing is not None:
                writing.result()
            fields = zip(*shard.objects, strict=True) if shard.objects else ((),) * 4
            sha256, names, sources, frames = map(list, fields)
            writing = writer.submit(
                parquet.write_shard,
                work.path(shard.number),
                info,
                sha256,
                names,
                sources,
                tokens=columns[0],
                num_voxels=columns[1],
                iou=columns[2] if args.iou else None,
                left_out=shard.left_out,
                frames=frames if work.frames else None,
                made_from=work.made_from,
            )
            count += len(sha256)

        if missing:
            work.source.feed(
                missing, tokenizer.device, processes, tokenize, lambda read: progress(progress.done + read)
            )
        if writing is not None:
            writing.result()
    seconds = time.perf_counter() - started
    records = 0
    if work.prompts is not None:
        with waiting("conversations", len(numbers), "shard", shown=process == 0) as progress:
            for done, number in enumerate(numbers):
                progress(done)
                records += write_conversations(work, work.prompts, tokenizer, number)
    return Report(count, seconds, records, list(work.source.noted))


def write_conversations(work: Work, prompts: sharegpt.Prompts, tokenizer: SparseStructureTokenizer, number: int) -> int:
    """Write a shard's records if they are missing. Return how many are written."""
    if work.jsonl(number).exists():
        return 0
    words = tokenizer.token_format(form=work.form)
    return sharegpt.write_jsonl(
        work.jsonl(number),
        (
            record
            for row in parquet.read_shards(work.path(number))
            for record in sharegpt.records(
                row["sha256"],
                row["name"],
                words.to_text(row["tokens"]),
                work.captions.get(row["sha256"], ()),
                prompts,
            )
        ),
    )


# --- on a Ray cluster -----------------------------------------------------------------------------------------


class NodeTask(NamedTuple):
    """A shard for a worker of a Ray cluster."""

    number: int
    names: str  # digest of its objects' names
    source: MeshSource | None  # of its objects; None: the worker reads the data roots
    captions: dict[str, list[str]]  # of its objects


class NodeWorker:
    """What writes shards on a node, with a tokenizer that is loaded once. See `run_on_cluster`.

    work: without captions and meshes, which tasks bring.
    present: a name in the output folder.
    Raise ConfigError if the node sees other files than the machine where the program was started.
    """

    def __init__(self, work: Work, present: str | None, slot: Slot):
        args = work.args
        for folder in filter(None, (args.output_dir, args.sharegpt)):
            if not Path(folder).is_dir() or (present and not Path(args.output_dir, present).exists()):
                raise ConfigError(f"{folder} is not what it is where this program was started: share it with all nodes")
        if not work.cuda:
            torch.set_num_threads(max(1, slot.cpus))
        self.tokenizer = SparseStructureTokenizer.load(args.tokenizer)
        info = self.tokenizer.token_info(args.precision, form_of(work.info.form, work.info.empty_code))
        if replace(info, up_axis=work.info.up_axis) != work.info:
            raise ConfigError(f"{args.tokenizer} is another tokenizer than where this program was started")
        if work.cuda:
            self.tokenizer.to("cuda")
        self.work = work
        self.max_workers = args.workers_of_node or available_cores()
        self.processes = max(1, available_cores() // max(1, slot.cpus))  # that share the node

    def __call__(self, task: NodeTask) -> Report:
        work = self.work._replace(captions=task.captions)
        if task.source is not None:
            task.source.max_workers = self.max_workers
            work = work._replace(source=task.source, shards={task.number: slice(None)})
        elif _digest(work.source.objects[work.shards[task.number]]) != task.names:
            raise ConfigError(
                f"{work.args.data_dir}: node {host_name()} has other objects there: share it with all nodes"
            )
        # 1: the first process shows its progress, which nobody sees here.
        return run_process(work, self.tokenizer, [task.number], 1, self.processes)


def slots_of_node(processes: int, cuda: bool, node: Node) -> list[Slot]:
    """Return a slot for each process on a node, which share its CPUs, and have a GPU each if `cuda`.

    processes: -1: one for each GPU, or one on CPUs; else at most so many.
    """
    most = node.gpus if cuda else node.cpus
    count = (node.gpus if cuda else min(1, node.cpus)) if processes == -1 else min(processes, most)
    return [Slot(node.cpus // count, int(cuda), 1)] * count if count else []


def run_on_cluster(work: Work, cluster: Cluster, numbers: list[int]) -> Report:
    """Divide the shards among the nodes of a Ray cluster, which all see the output folder. Add up the reports.

    Raise ConfigError if a node does not see the same files, DataError if workers are lost over a shard again and again.
    """
    args = work.args
    folders = [Path(folder) for folder in (args.output_dir, args.sharegpt) if folder]
    done: list[Report] = []

    def tasks() -> Iterator[NodeTask]:
        for number in numbers:
            objects = work.source.objects[work.shards[number]]
            captions = {item.sha256: work.captions[item.sha256] for item in objects if item.sha256 in work.captions}
            part = work.source.part(work.shards[number]) if isinstance(work.source, MeshSource) else None
            yield NodeTask(number, _digest(objects), part, captions)

    with waiting("tokenize", sum(work.length(number) for number in numbers), shown=bool(numbers)) as progress:

        def finish(task: NodeTask, report: Report | Lost) -> None:
            if isinstance(report, Lost):
                raise DataError(f"{work.path(task.number)}: {report.reason}. Run the same command again to go on.")
            done.append(report)
            progress(progress.done + work.length(task.number))

        bare = work._replace(captions={})
        if isinstance(work.source, MeshSource):
            bare = bare._replace(source=work.source.part(slice(0)))
        present = next((path.name for path in Path(args.output_dir).iterdir() if not path.name.startswith(".")), None)
        try:
            slots = partial(slots_of_node, args.num_gpus, work.cuda)
            cluster.run_tasks(partial(NodeWorker, bare, present), slots, tasks(), finish, most=len(numbers))
        finally:
            for folder in folders:
                remove_leftovers(folder, cluster.processes)
    seconds = 0.0 if cluster.ready is None else time.monotonic() - cluster.ready
    _wait_until_seen([path for number in numbers for path in work.files(number)])
    return add_up(done)._replace(seconds=seconds)


def _digest(objects: Iterable[TokenObject]) -> str:
    return hashlib.sha256("\n".join(item.sha256 for item in objects).encode()).hexdigest()


def _wait_until_seen(paths: list[Path]) -> None:
    """Wait until this machine sees files that nodes have written. Raise ConfigError if it does not."""
    deadline = time.monotonic() + SEEN_SECONDS
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise ConfigError(f"{missing[0]} was written by a node, but is not there: share the folder with all nodes")
        time.sleep(1)


def add_up(reports: list[Report]) -> Report:
    """Return what several processes have done together."""
    return Report(
        sum(report.objects for report in reports),
        max((report.seconds for report in reports), default=0.0),
        sum(report.records for report in reports),
        [each for report in reports for each in report.noted],
    )
