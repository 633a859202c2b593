"""A trace of a few training steps."""

from pathlib import Path

import torch

from ..utils import dist_utils
from .basic import BasicTrainer

# Steps before the profiler starts, while caches fill and convolutions are timed; its warm-up steps; traced steps.
WAIT, WARMUP, ACTIVE = 3, 2, 5
ROWS = 25


def profile(trainer: BasicTrainer) -> Path:
    """Trace a few steps, print the most expensive operators, and return the trace's path.

    The trace, for https://ui.perfetto.dev, shows each step's forward, backward, clip, optimizer and ema, and the
    operators that they run. The weights in memory change, but nothing else is written.
    """
    trainer.build_training_state()
    path = trainer.output_dir / "profile" / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    # On a CPU, the profiler's records of shapes fragment the memory that steps reuse, and slow them down.
    shapes = trainer.device.type == "cuda"
    with torch.profiler.profile(schedule=schedule, record_shapes=shapes) as profiler:
        for batch, _ in zip(trainer.batches(), range(WAIT + WARMUP + ACTIVE), strict=False):
            trainer.run_step(batch)
            profiler.step()
    if dist_utils.is_main():
        profiler.export_chrome_trace(str(path))
        order = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=ROWS))
    return path
