"""Training speed and memory with the real loader, logging, averages and clipping, compared with a plain trainer.

    python benchmarks/train_speed.py                          # GPU: full-size networks at batch 32 and 4
    python benchmarks/train_speed.py --memory_saving          # GPU: batch 32 in micro-batches, in at most 10 GiB
    python benchmarks/train_speed.py --device cpu             # the demo's networks at batch 4

Each row is a run of train.py on a shipped configuration from random weights: the median of samples_per_second over the
entries of its log after warm-up. The plain trainer (plain_train.py) runs right after it on the same data. Limit:
operations of the convolutions over the product rate measured in this run, in bf16 on a GPU and in fp32 on a CPU; for
the codebook alone, the products of vectors and codes over the fp32 rate.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from benchmarks.report import Column, Report, Table
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

MEMORY_SAVING_GIB = 10.0
PLAIN_WARM_STEPS = 10  # on a GPU, until the fp16 loss scale has come down from its start
COLUMNS = (
    Column("training", "key"),
    Column("batch", "key"),
    Column("micro-batches", "key"),
    Column("samples/s"),
    Column("GiB"),
    Column("limit"),
    Column("of limit", "ratio"),
    Column("plain samples/s"),
    Column("plain GiB"),
    Column("ratio to plain", "ratio"),
)


@dataclass(frozen=True)
class Row:
    """One kind of training."""

    full: str
    """Configuration for a GPU."""
    demo: str
    """Configuration for a CPU."""
    kind: str | None
    """Which convolutions it runs, one of `plain.KINDS`; None if it runs none."""
    plain: str
    """The kind of plain training to compare with."""
    cache: bool | None = None
    """Whether latents come from a cache; None if the configuration has no frozen encoder."""
    settings: tuple[tuple[str, object], ...] = ()
    """Differences from the configuration."""
    samples: tuple[int, int] = (320, 16)
    """Samples between two entries of the log, on a GPU and on a CPU."""


ROWS = {
    "kl": Row("ss_vae_conv3d_16l8_fp16", "demo_vae", "kl", "kl"),
    "stage2": Row("vqvae_stage2", "demo_stage2", "stage2", "stage2"),
    "stage1": Row("vqvae_stage1", "demo_stage1", "stage1", "stage1", cache=False, samples=(640, 16)),
    "stage1_cached": Row("vqvae_stage1", "demo_stage1", "stage1_cached", "stage1", cache=True, samples=(640, 16)),
    "codebook": Row(
        "vqvae_stage1",
        "demo_stage1",
        None,
        "stage1",
        cache=True,
        settings=(("trainer.args.loss_type", "none"),),
        samples=(16000, 64),
    ),
}


class Bench:
    """Device, data and a folder for runs, weights and caches, shared by all rows."""

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: Path):
        self.args, self.device, self.folder = args, device, folder
        self.data_dir = common.data_for(args, folder)
        self.rows = common.packed_rows(self.data_dir)
        self.plain_results: dict[tuple[str, int], runs.Speed] = {}
        self.count = 0

    def config(self, row: Row) -> Path:
        return runs.config_path(row.full if self.device.type == "cuda" else row.demo)

    def interval(self, row: Row, batch: int) -> int:
        """Return the steps between two entries of the log."""
        return max(2, row.samples[self.device.type == "cpu"] // batch)

    def weights(self, config: dict) -> dict[str, str]:
        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        return common.random_weights(config["models"], self.rows, folder, self.device)

    def ours(self, row: Row, batch: int, split: int = 1) -> runs.Speed:
        """Run train.py and return its speed. split: micro-batches per step."""
        self.count += 1
        output = self.folder / f"run{self.count}"
        config, interval = load_config(self.config(row)), self.interval(row, batch)
        warm = runs.WARM_INTERVALS
        if row.cache:  # the first pass over the data fills the cache
            warm = max(warm, 1 + math.ceil(len(self.rows) / (batch * interval)))
        settings = runs.steady_settings(self.weights(config), (warm + self.args.intervals) * interval, interval)
        settings |= runs.batch_setting(config, batch) | dict(row.settings)
        settings["dataset.args.resolution"] = self.args.resolution
        settings["trainer.args.batch_split"] = split
        if row.cache is not None:
            settings["trainer.args.latent_cache"] = str(self.folder / "latents") if row.cache else False
        return runs.speed(
            runs.arguments(self.config(row), self.device, self.data_dir, output, settings, "--num_gpus", "1"),
            output,
            warm,
        )

    def plain(self, row: Row, batch: int) -> runs.Speed:
        """Return the plain trainer's speed, measured once for each kind and batch."""
        if (row.plain, batch) not in self.plain_results:
            like = next(other for other in ROWS.values() if other.kind == row.plain)
            path, interval = self.config(like), self.interval(like, batch)
            warm = max(PLAIN_WARM_STEPS, interval) if self.device.type == "cuda" else interval
            done = subprocess.run(
                [
                    sys.executable,
                    str(common.ROOT / "benchmarks" / "plain_train.py"),
                    "--config",
                    str(path),
                    "--kind",
                    row.plain,
                    "--data_dir",
                    self.data_dir,
                    "--batch",
                    str(batch),
                    "--weights",
                    json.dumps(self.weights(load_config(path))),
                    "--device",
                    self.device.type,
                    "--warm",
                    str(warm),
                    "--steps",
                    str(max(1, interval // 2)),
                    "--chunks",
                    str(self.args.intervals),
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            self.plain_results[row.plain, batch] = runs.Speed(**json.loads(done.stdout.splitlines()[-1]))
        return self.plain_results[row.plain, batch]

    def limit(self, row: Row, ceilings: common.Ceilings) -> float:
        """Return the highest possible rate, in samples per second."""
        models = load_config(self.config(row))["models"]
        if row.kind is not None:
            flops = plain.convolution_flops(models, row.kind, self.args.resolution)
            return 1 / ceilings.seconds(flops, 0, common.compute_dtype(self.device))
        book = plain.quantizer_args(models)
        tokens = plain.tokens_per_sample(models, self.args.resolution)
        flops = plain.nearest_flops(tokens, book["n_embed"], book["embed_dim"])
        return 1 / ceilings.seconds(flops, 0, torch.float32)

    def saving(self, row: Row, batch: int) -> tuple[int, runs.Speed]:
        """Return the fewest micro-batches, a power of two, that need at most MEMORY_SAVING_GIB, and their speed."""
        split = 2
        while True:
            speed = self.ours(row, batch, split)
            if speed.peak_memory_gib <= MEMORY_SAVING_GIB or split == batch:
                return split, speed
            split *= 2


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument(
        "--rows", nargs="+", choices=ROWS, help="kinds of training (default: all; kl with --memory_saving)"
    )
    flags.add_argument("--batch_sizes", nargs="+", type=int, help="default: 32 4 on a GPU, 4 on a CPU")
    flags.add_argument("--intervals", type=int, default=6, help="entries of the log that count (default: 6)")
    flags.add_argument(
        "--memory_saving",
        action="store_true",
        help=f"accumulate gradients over the fewest micro-batches that need at most {MEMORY_SAVING_GIB:g} GiB",
    )
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    if args.memory_saving and device.type == "cpu":
        flags.error("--memory_saving limits GPU memory and needs a GPU")
    cuda = device.type == "cuda"
    names = args.rows or (["kl"] if args.memory_saving else list(ROWS))
    batches = args.batch_sizes or ([32, 4] if cuda and not args.memory_saving else [32] if cuda else [4])

    ceilings = common.measure_ceilings(device)
    report = Report("Training speed", __file__, argv, device, args.output, {"resolution": args.resolution})
    table = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, Path(folder))
        source = f"Data: {args.data_dir}" if args.data_dir else "Made-up grids"
        data = f"{source}, {len(bench.rows)} objects of {args.resolution}³."
        for name in names:
            row = ROWS[name]
            limit = bench.limit(row, ceilings)
            for batch in batches:
                split, speed = bench.saving(row, batch) if args.memory_saving else (1, bench.ours(row, batch))
                rate, base = speed.samples_per_second, bench.plain(row, batch)
                print(f"{name}, batch {batch}: {rate:.1f} samples/s, plain {base.samples_per_second:.1f}", flush=True)
                table.append(
                    [
                        name,
                        batch,
                        split,
                        rate,
                        speed.peak_memory_gib,
                        limit,
                        rate / limit,
                        base.samples_per_second,
                        base.peak_memory_gib,
                        rate / base.samples_per_second,
                    ]
                )
                text = report.write(f"Ceilings: {ceilings}.", data, Table(COLUMNS, table))
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main, None))
