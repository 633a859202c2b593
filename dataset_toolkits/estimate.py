"""`voxelize.py --dry_run`: what there is to do and about how long it takes, without writing anything."""

import concurrent.futures
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from trellis.datasets.shards import LEVEL
from trellis.grids.formats import FORMATS, suffix_of
from trellis.grids.mesh_pool import LostTask, MeshPool
from trellis.utils import units
from trellis.utils.errors import DataError

from . import report
from .inputs import Found, printable
from .shard_files import unsqueeze
from .work import Made, Outcome, Settings, make_grids, time_factor

SAMPLES = 12
SAMPLE_SECONDS = 10
SHARD_ROW = 200  # bytes of an object in a shard besides its grid: sha256, name, settings
START_SECONDS = 1  # until the workers of a run have started, once
PLY_HEADER = 130  # bytes of a voxel file besides 12 for each voxel
NO_SHA256 = "0" * 64  # the name of a grid that is not written


class _Sample(NamedTuple):
    """A file that was tried, for `stands_for` files of about its size. outcome: None if there was no time for it."""

    path: Path
    size: int
    stands_for: int
    seconds: float = 0.0
    outcome: Outcome | DataError | None = None


def dry_run(
    found: Found,
    recorded: set[str],
    settings: Settings,
    workers: int,
    timeout: float,
    memory: int | None,
    shards: bool = False,
) -> list[str]:
    """Return what a run would do, in lines for people.

    found: the files of this rank.
    recorded: names of files that have a grid by metadata.csv.
    workers, timeout, memory: as of the run.
    shards: whether the run writes shards.
    """
    sizes = {}
    for name, path in found.files.items():
        try:
            sizes[name] = path.stat().st_size
        except OSError:
            continue  # it has just gone; the run will say so
    kinds = Counter(suffix_of(found.files[name], FORMATS) or "" for name in sizes)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    if found.left_out:
        listed += f"{', ' if listed else ''}{len(found.left_out)} not read"
    number = report.count(len(sizes) + len(found.left_out), "file")
    lines = [f"{number}: {listed}; {units.size(sum(sizes.values()))} to read"]
    lines += [f"left out: {line}" for line in report.by_kind(found.left_out.items())]
    new = {name: size for name, size in sizes.items() if name not in recorded}
    if len(new) < len(sizes):
        lines.append(f"{report.count(len(sizes) - len(new), 'is', 'are')} recorded as done, by their names")
    same_size = len(new) - len(set(new.values()))
    if same_size:
        lines.append(
            f"at most {report.count(same_size, 'is a duplicate', 'are duplicates')}, by size: nothing was hashed"
        )
    if not new:
        return [*lines, "nothing to do"]

    samples = _try([(found.files[name], size) for name, size in new.items()], settings, workers, timeout, memory)
    done = [sample for sample in samples if sample.outcome is not None]
    if not done:
        return [*lines, f"no time is known: none of the files tried was done within {SAMPLE_SECONDS} s"]
    largest = max(done, key=lambda sample: sample.size)
    per_byte = largest.seconds / max(1, largest.size)
    seconds: float = sum(
        sample.stands_for * (sample.seconds if sample.outcome is not None else per_byte * sample.size)
        for sample in samples
    )
    good = [(sample, sample.outcome) for sample in done if isinstance(sample.outcome, Outcome)]
    size_of = _size_in_shard if shards else _size_as_ply
    disk: float = sum(sample.stands_for * sum(map(size_of, outcome.made)) for sample, outcome in good)
    disk *= len(new) / sum(sample.stands_for for sample in done)
    about = (
        f"about {units.duration(START_SECONDS + seconds / workers)} with {report.count(workers, 'worker')} and "
        f"{units.size(disk)} of disk"
    )
    if len(done) == len(samples):
        basis = f"by {len(done)} of them, of all sizes, that were tried"
    else:
        late = len(samples) - len(done)
        basis = f"by {len(done)} of them that were tried, and by the size of {late} that took too long"
    lines.append(f"{len(new)} to do: {about}, {basis}")
    failed = [(printable(sample.path), sample.outcome) for sample in done if isinstance(sample.outcome, DataError)]
    lost = [(name, str(error)) for name, error in failed if isinstance(error, LostTask)]
    reasons = [(name, str(error)) for name, error in failed if not isinstance(error, LostTask)]
    lines += [f"of those tried, would be left out: {line}" for line in report.by_kind(reasons)]
    lines += [f"of those tried, would be tried once more, alone: {line}" for line in report.by_kind(lost)]
    made = [
        (f"{printable(sample.path)}#{each.part}" if each.part else printable(sample.path), each)
        for sample, outcome in good
        for each in outcome.made
    ]
    notes = [(name, note) for name, each in made for note in each.notes]
    objects = {name for name, each in made if each.part}
    lines += [f"of those tried, noted: {line}" for line in report.by_kind(notes, objects)]
    return lines


def _size_in_shard(made: Made) -> int:
    import pyarrow as pa

    codec = pa.Codec("zstd", compression_level=LEVEL)
    frame = codec.compress(unsqueeze(made.grid), asbytes=True)
    return len(frame) + len(made.frame) + len(made.part) + SHARD_ROW


def _size_as_ply(made: Made) -> int:
    return 12 * made.num_voxels + PLY_HEADER


def _try(
    files: list[tuple[Path, int]], settings: Settings, workers: int, timeout: float, memory: int | None
) -> list[_Sample]:
    """Make the grids of a few files, spread over all sizes, for at most SAMPLE_SECONDS, and keep none."""
    by_size = sorted(files, key=lambda item: item[1])
    count = min(SAMPLES, len(by_size))
    bounds = [len(by_size) * i // count for i in range(count + 1)]
    strata = [
        _Sample(*by_size[(low + high) // 2], stands_for=high - low)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    samples = []
    with MeshPool(min(workers, count)) as pool:
        started: dict[Future, tuple[_Sample, float]] = {}
        for sample in strata:
            limit = timeout * time_factor(sample.path)
            task = pool.submit(_timed, sample.path, settings, timeout=limit, memory=memory)
            started[task] = sample, limit
        concurrent.futures.wait(started, return_when=concurrent.futures.FIRST_COMPLETED, timeout=timeout)
        ended, _ = concurrent.futures.wait(started, timeout=SAMPLE_SECONDS)
        for task, (sample, limit) in started.items():
            if task not in ended:
                samples.append(sample)
                continue
            try:
                seconds, outcome = task.result()
            except LostTask as error:
                seconds, outcome = 0.0, error
            except DataError as error:
                seconds, outcome = limit, error
            samples.append(sample._replace(seconds=seconds, outcome=outcome))
    return samples


def _timed(path: Path, settings: Settings) -> tuple[float, Outcome | DataError]:
    begun = time.perf_counter()
    try:
        outcome: Outcome | DataError = make_grids(path, NO_SHA256, None, settings)
    except DataError as error:
        outcome = error
    return time.perf_counter() - begun, outcome
