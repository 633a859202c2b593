"""How much memory training takes, and how many samples fit: for --tryrun.

Steps of two sizes are taken and the peak of memory is read after each: allocated tensors on a GPU, resident memory of
the process on a CPU. What grows between them is of the samples; the rest is of weights, optimizer and averages.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..utils import dist_utils
from ..utils.command import available_memory
from ..utils.environment import linux_memory, peak_memory
from .basic import BasicTrainer

GIB = 2**30
# Share of the memory that a run may fill: allocators lose some to fragments, and other programs need some.
USABLE = 0.92
# Growth per sample below which resident memory says nothing: libraries take more than this now and then.
LEAST_GROWTH = 2**20


@dataclass(frozen=True)
class Need:
    """Peak memory of one process as a line over the samples that pass through the models at once (a micro-batch).

    base, sample: bytes; sample is None if it was too small to see.
    sizes: of the steps that were measured.
    limit: bytes that the process may take; None if the system does not say.
    what: what was measured.
    """

    base: float
    sample: float | None
    sizes: tuple[int, int]
    limit: float | None
    what: str

    def of(self, samples: int) -> float:
        """Return the bytes that a micro-batch takes."""
        return self.base + samples * (self.sample or 0)

    def most(self) -> int | None:
        """Return the largest micro-batch that fits, 0 if none does; None if it cannot be said."""
        if self.limit is None or self.sample is None:
            return None
        return max(0, int((USABLE * self.limit - self.base) / self.sample))


def measure(trainer: BasicTrainer) -> Need:
    """Take steps and return the memory that they need. The weights in memory change. Call it on all ranks."""
    batch = next(trainer.batches())
    split, trainer.batch_split = trainer.batch_split, 1
    try:
        return _on_gpu(trainer, batch) if trainer.device.type == "cuda" else _on_cpu(trainer, batch)
    finally:
        trainer.batch_split = split


def _on_gpu(trainer: BasicTrainer, batch: dict[str, Tensor]) -> Need:
    small = 2 if trainer.micro_batch_size > 2 else 1
    _take_step(trainer, batch, 1)  # makes the optimizer's state, and kernels
    low, high = (_peak_of_step(trainer, batch, size) for size in (small, 2 * small))
    free, _ = torch.cuda.mem_get_info(trainer.device)
    limit = free + torch.cuda.memory_reserved(trainer.device)
    sample = (high - low) / small
    return Need(low - small * sample, sample, (small, 2 * small), limit, "allocated on the GPU")


def _on_cpu(trainer: BasicTrainer, batch: dict[str, Tensor]) -> Need:
    """Measure resident memory, which never falls: what was held before the steps hides those that take less.

    Sizes then double up to the configured one, and all that is held beyond the models counts as the samples', which
    says rather too much than too little.
    """
    before = _resident()
    _take_step(trainer, batch, 1)  # makes the optimizer's state
    size, hidden = 1, False
    low, high = _peak_of_step(trainer, batch, 1), _peak_of_step(trainer, batch, 2)
    while high - low < LEAST_GROWTH * size and 4 * size <= trainer.micro_batch_size:
        size, low, hidden = 2 * size, high, True
        high = _peak_of_step(trainer, batch, 2 * size)
    available = available_memory()
    # All processes of a run on CPUs share the memory; several machines are rare.
    limit = None if available is None else available / dist_utils.world_size() + _resident()
    what = "resident memory of a process"
    if high - low < LEAST_GROWTH * size:
        return Need(high, None, (size, 2 * size), limit, what)
    if hidden:
        return Need(before, (high - before) / (2 * size), (size, 2 * size), limit, what)
    sample = (high - low) / size
    return Need(low - size * sample, sample, (size, 2 * size), limit, what)


def lines(need: Need, micro_batch: int, batch_per_rank: int) -> list[str]:
    """Return what --tryrun says of memory.

    micro_batch, batch_per_rank: samples at once and in a step of one process, as configured.
    """
    how = f"measured by training steps of {need.sizes[0]} and {need.sizes[1]} samples, {need.what}"
    if need.sample is None:
        return [
            f"memory: {need.base / GIB:.2f} GiB ({how}); a sample takes too little to be seen beside what the process "
            "holds anyway"
        ]
    text = (
        f"memory: {need.base / GIB:.2f} GiB and {need.sample / GIB:.3f} GiB for each sample at once ({how}); "
        f"{micro_batch} at once, as configured, take about {need.of(micro_batch) / GIB:.2f} GiB"
    )
    most = need.most()
    if most is None or need.limit is None:
        return [text]
    free = f"{need.limit / GIB:.1f} GiB"
    if most >= micro_batch:
        return [f"{text}; about {most} would fit into the {free} that a process may take"]
    splits = [n for n in range(1, batch_per_rank + 1) if batch_per_rank % n == 0 and batch_per_rank // n <= most]
    remedy = (
        f"set trainer.args.batch_split to {splits[0]}, which changes no result but rounding"
        if splits
        else "not even one sample fits: take smaller models or another device"
    )
    return [text, f"WARNING: that does not fit into the {free} that a process may take, about {most} would; {remedy}"]


def _take_step(trainer: BasicTrainer, batch: dict[str, Tensor], samples: int) -> None:
    trainer.run_step({name: value[torch.arange(samples) % len(value)] for name, value in batch.items()})


def _peak_of_step(trainer: BasicTrainer, batch: dict[str, Tensor], samples: int) -> float:
    """Return the most bytes held during a step."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
        _take_step(trainer, batch, samples)
        torch.cuda.synchronize(trainer.device)
        return torch.cuda.max_memory_allocated(trainer.device)
    _forget_peak()
    _take_step(trainer, batch, samples)
    return peak_memory() or 0


def _forget_peak() -> None:
    """Let Linux count the process's peak of resident memory anew. Where it cannot, the peak is since the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _resident() -> int:
    """Return the bytes that this process holds now."""
    return linux_memory("VmRSS") or peak_memory() or 0
