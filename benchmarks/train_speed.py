"""Training speed and memory, with the real loader, logging, averages and clipping, beside a plain trainer.

    python benchmarks/train_speed.py                          # GPU: full-size networks at batch 32 and 4
    python benchmarks/train_speed.py --memory_saving          # GPU: batch 32 in parts, in at most 10 GiB
    python benchmarks/train_speed.py --device cpu             # the demo's networks at batch 4

Each figure is a run of train.py on a shipped configuration from random weights: the median of samples_per_second over
the intervals of its log after warm-up. The plain trainer (plain_train.py) runs right after it on the same data.
Limit: operations of the convolutions over the product rate measured in this run, in bf16 on a GPU and fp32 on a CPU;
for the codebook alone, of the products of vectors and codes over the fp32 rate.
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
from trellis.utils.config import load_config

MEMORY_SAVING_GIB = 10.0
PLAIN_WARM_STEPS = 10  # on a GPU, so that the fp16 loss scale has come down from its start


@dataclass(frozen=True)
class Row:
    """One kind of training. full, demo: configurations for a GPU and a CPU. kind: of its convolutions, see `plain`;
    None where there are none. plain: kind of the plain trainer beside it. cache: whether latents come from a cache.
    samples: in an interval of the log, on a GPU and on a CPU."""

    full: str
    demo: str
    kind: str | None
    plain: str
    cache: bool | None = None
    settings: tuple[tuple[str, object], ...] = ()
    samples: tuple[int, int] = (320, 16)


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
    """What all runs share: device, data and a folder for runs, weights and caches."""

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: Path):
        self.args, self.device, self.folder = args, device, folder
        self.data_dir = common.data_for(args, folder)
        self.rows = common.packed_rows(self.data_dir)
        self.plain_results: dict[tuple[str, int], runs.Speed] = {}
        self.count = 0

    def config(self, row: Row) -> Path:
        return runs.config_path(row.full if self.device.type == "cuda" else row.demo)

    def interval(self, row: Row, batch: int) -> int:
        """Steps between two entries of the log."""
        return max(2, row.samples[self.device.type == "cpu"] // batch)

    def weights(self, config: dict) -> dict[str, str]:
        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        return common.random_weights(config["models"], self.rows, folder, self.device)

    def ours(self, row: Row, batch: int, split: int = 1) -> runs.Speed:
        self.count += 1
        output = self.folder / f"run{self.count}"
        config, interval = load_config(self.config(row)), self.interval(row, batch)
        warm = runs.WARM_INTERVALS
        if row.cache:  # the first pass over the data fills it
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
        """The plain trainer's, measured once for each kind and batch."""
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
        """Samples per second."""
        models = load_config(self.config(row))["models"]
        if row.kind is not None:
            flops = plain.convolution_flops(models, row.kind, self.args.resolution)
            return 1 / ceilings.seconds(flops, 0, common.compute_dtype(self.device))
        book = models["quantizer"].get("args", {})
        tokens = plain.tokens_per_sample(models, self.args.resolution)
        flops = plain.nearest_flops(tokens, book.get("n_embed", 8192), book.get("embed_dim", 8))
        return 1 / ceilings.seconds(flops, 0, torch.float32)

    def saving(self, row: Row, batch: int) -> tuple[int, runs.Speed]:
        """The fewest parts of the batch, a power of two, that need no more than MEMORY_SAVING_GIB."""
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
    flags.add_argument("--intervals", type=int, default=6, help="intervals of the log that count (default: 6)")
    flags.add_argument(
        "--memory_saving",
        action="store_true",
        help=f"work the batch off in parts that need at most {MEMORY_SAVING_GIB:g} GiB together",
    )
    args = flags.parse_args(argv)
    device = common.pick_device(args.device)
    if args.memory_saving and device.type == "cpu":
        flags.error("--memory_saving counts GPU memory; there is none on a CPU")
    cuda = device.type == "cuda"
    names = args.rows or (["kl"] if args.memory_saving else list(ROWS))
    batches = args.batch_sizes or ([32, 4] if cuda and not args.memory_saving else [32] if cuda else [4])

    ceilings = common.measure_ceilings(device)
    header = [common.describe_machine(device), f"Ceilings: {ceilings}."]
    columns = [
        "training",
        "batch",
        "parts",
        "samples/s",
        "GiB",
        "limit",
        "of limit",
        "plain samples/s",
        "plain GiB",
        "ratio to plain",
    ]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, Path(folder))
        header.append(
            f"{'Data: ' + args.data_dir if args.data_dir else 'Made-up grids'}, {len(bench.rows)} objects of "
            f"{args.resolution}³."
        )
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
                text = common.write_report(
                    "Training speed", [*header, common.markdown_table(columns, table)], args.output
                )
    print(text)


if __name__ == "__main__":
    main()
