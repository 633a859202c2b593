"""Time that the device waits for data in training, per step.

    python benchmarks/data_wait.py                    # made-up grids in a packed file
    python benchmarks/data_wait.py --data_dir DIR     # any data that train.py takes

Trains the KL configuration with train.py's own loop and marks the device's timeline before and after it fetches each
batch. Between the two marks a GPU only copies and unpacks that batch, or waits for the host. So the time between them
is the wait. On a CPU loading is part of the same work, and all of it counts. Limit: the training rate over the rate of
the loader alone, which is the smallest share of waiting that is possible without loading ahead.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

LOADER_SECONDS = 1.0  # spent on the loader alone
COLUMNS = (
    Column("batch", "key"),
    Column("samples/s"),
    Column("ms per step"),
    Column("ms waiting"),
    Column("share", format=".2%"),
    Column("loader alone, samples/s"),
    Column("limit", format=".2%"),
)


class Marks:
    """Points on the device's timeline: events on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pairs: list[tuple] = []  # before and after each fetch

    def now(self) -> torch.cuda.Event | float:
        """Return a mark of the present."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, batches: Iterator) -> Iterator:
        """Yield the batches, and mark the time before and after each is fetched."""
        with contextlib.closing(batches):
            while True:
                before = self.now()
                batch = next(batches)
                self.pairs.append((before, self.now()))
                yield batch

    def seconds(self, start, end) -> float:
        """Return the time between two marks."""
        return end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1e3

    def waits_and_steps(self, warm: int) -> tuple[float, float]:
        """Return the mean seconds of waiting and of the whole step, without the first `warm` steps and the last.

        The last step has no mark at its end.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        pairs = self.pairs[warm:]
        waits = [self.seconds(*pair) for pair in pairs[:-1]]
        return sum(waits) / len(waits), self.seconds(pairs[0][0], pairs[-1][0]) / len(waits)


def loader_rate(trainer, batch: int) -> float:
    """Return how many samples per second the trainer's loader yields when nothing is done with them."""
    with contextlib.closing(trainer.batches()) as batches:
        next(batches)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < LOADER_SECONDS:
            next(batches)
            count += batch
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return count / (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--batch_sizes", nargs="+", type=int, help="default: 32 4 on a GPU, 4 on a CPU")
    flags.add_argument("--steps", type=int, help="measured steps (default: 100 on a GPU, 10 on a CPU)")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    steps, warm = args.steps or (100 if cuda else 10), 20 if cuda else 2
    path = runs.config_path("ss_vae_conv3d_16l8_fp16" if cuda else "demo_vae")
    report = Report("Waiting for data", __file__, argv, device, args.output, {"resolution": args.resolution})
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = common.data_for(args, folder)
        for batch in args.batch_sizes or ([32, 4] if cuda else [4]):
            settings = runs.steady_settings(None, warm + steps + 1, 10)
            settings |= runs.batch_setting(load_config(path), batch)
            settings["dataset.args.resolution"] = args.resolution
            trainer = runs.build_trainer(
                runs.arguments(path, device, data_dir, folder / f"run{batch}", settings), device
            )
            alone = loader_rate(trainer, batch)
            marks, fetch = Marks(device), trainer.batches
            trainer.batches = lambda marks=marks, fetch=fetch, **options: marks.around(fetch(**options))
            trainer.run()
            wait, step = marks.waits_and_steps(warm)
            rate = batch / step
            table.append([batch, rate, step * 1e3, wait * 1e3, wait / step, alone, rate / alone])
    source = args.data_dir or f"made-up grids, {args.resolution}³"
    print(report.write(f"Data: {source}.", Table(COLUMNS, table)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
