"""`voxelize.py --dry_run`: what there is to do and about how long it takes, without writing anything."""

import concurrent.futures
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from trellis.grids.formats import FORMATS, suffix_of
from trellis.grids.mesh_pool import MeshPool
from trellis.utils.errors import DataError

from . import report
from .inputs import Found, printable
from .work import Outcome, Settings, make_grids

SAMPLES = 12
SAMPLE_SECONDS = 10
PLY_HEADER = 130  # bytes of a voxel file besides 12 for each voxel
NO_SHA256 = "0" * 64  # the name of a grid that is not written


class _Sample(NamedTuple):
    """A file that was tried, for `stands_for` files of about its size."""

    path: Path
    stands_for: int
    seconds: float
    outcome: Outcome | DataError


def dry_run(
    found: Found, recorded: set[str], settings: Settings, workers: int, timeout: float, memory: int | None
) -> list[str]:
    """Return what a run would do, in lines for people.

    found: the files of this rank.
    recorded: names of files that have a grid by metadata.csv.
    workers, timeout, memory: as of the run.
    """
    sizes = {}
    for name, path in found.files.items():
        try:
            sizes[name] = path.stat().st_size
        except OSError:
            continue  # it has just gone; the run will say so
    kinds = Counter(suffix_of(found.files[name], FORMATS) or "" for name in sizes)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    lines = [f"{len(sizes)} files, {report.size(sum(sizes.values()))}: {listed}"]
    lines += [f"left out: {line}" for line in report.by_kind(found.left_out.items())]
    new = {name: size for name, size in sizes.items() if name not in recorded}
    if len(new) < len(sizes):
        lines.append(f"{len(sizes) - len(new)} are recorded as done, by their names")
    same_size = len(new) - len(set(new.values()))
    if same_size:
        lines.append(f"at most {same_size} are duplicates, by their sizes: nothing was hashed")
    if not new:
        return [*lines, "nothing to do"]

    samples = _try([(found.files[name], size) for name, size in new.items()], settings, workers, timeout, memory)
    if not samples:
        return [*lines, f"no time is known: none of the files tried was done within {SAMPLE_SECONDS} s"]
    represented = sum(sample.stands_for for sample in samples)
    scale = len(new) / represented
    seconds = scale * sum(sample.stands_for * sample.seconds for sample in samples) / workers
    good = [(sample, sample.outcome) for sample in samples if isinstance(sample.outcome, Outcome)]
    disk = scale * sum(
        sample.stands_for * sum(12 * made.num_voxels + PLY_HEADER for made in outcome.made) for sample, outcome in good
    )
    about = f"about {report.duration(seconds)} with {workers} workers and {report.size(disk)} of disk"
    lines.append(f"{len(new)} to do: {about}, by {len(samples)} of them, of all sizes, that were tried")
    reasons = [
        (printable(sample.path), str(sample.outcome)) for sample in samples if isinstance(sample.outcome, DataError)
    ]
    lines += [f"of those tried, would be left out: {line}" for line in report.by_kind(reasons)]
    notes = [(printable(sample.path), note) for sample, outcome in good for made in outcome.made for note in made.notes]
    lines += [f"of those tried, noted: {line}" for line in report.by_kind(notes)]
    return lines


def _try(
    files: list[tuple[Path, int]], settings: Settings, workers: int, timeout: float, memory: int | None
) -> list[_Sample]:
    """Make the grids of a few files, spread over all sizes, for at most SAMPLE_SECONDS, and keep none."""
    by_size = [path for path, _ in sorted(files, key=lambda item: item[1])]
    count = min(SAMPLES, len(by_size))
    bounds = [len(by_size) * i // count for i in range(count + 1)]
    strata = {by_size[(low + high) // 2]: high - low for low, high in zip(bounds, bounds[1:], strict=False)}
    samples = []
    with MeshPool(min(workers, count)) as pool:
        started: dict[Future, Path] = {}
        for path in strata:
            task = pool.submit(_timed, path, settings, timeout=timeout, memory=memory)
            started[task] = path
        concurrent.futures.wait(started, return_when=concurrent.futures.FIRST_COMPLETED, timeout=timeout)
        ended, _ = concurrent.futures.wait(started, timeout=SAMPLE_SECONDS)
        for task in ended:
            path = started[task]
            try:
                seconds, outcome = task.result()
            except DataError as error:
                seconds, outcome = timeout, error
            samples.append(_Sample(path, strata[path], seconds, outcome))
    return samples


def _timed(path: Path, settings: Settings) -> tuple[float, Outcome | DataError]:
    begun = time.perf_counter()
    try:
        outcome: Outcome | DataError = make_grids(path, NO_SHA256, None, settings)
    except DataError as error:
        outcome = error
    return time.perf_counter() - begun, outcome
