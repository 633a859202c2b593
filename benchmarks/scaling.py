"""How the cost of a training step grows with batch, resolution, codes and GPUs.

    python benchmarks/scaling.py                          # everything
    python benchmarks/scaling.py --of gpus --batch 32     # 1, 2, 4 ... GPUs

Batch and resolution are varied in KL training, the number of codes in stage 2, and the number of GPUs in KL training
with a constant batch on each. Every row is a run of train.py as in train_speed.py, with the same limit, for all GPUs
together. Rate, time of a step, and work (operations of a step's convolutions on each GPU) are also given relative to
the first row of their kind.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from benchmarks.report import Column, Report, Table
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import apply_override, load_config

AXES = ("batch", "resolution", "codes", "gpus")
DEFAULTS = {
    "cuda": {"batch": [1, 2, 4, 8, 16, 32, 64], "resolution": [32, 64, 128], "codes": [2**n for n in range(10, 17)]},
    "cpu": {"batch": [1, 2, 4, 8], "resolution": [32, 64], "codes": [2**n for n in range(10, 17)]},
}
CONFIGS = {
    "cuda": {"kl": "ss_vae_conv3d_16l8_fp16", "stage2": "vqvae_stage2"},
    "cpu": {"kl": "demo_vae", "stage2": "demo_stage2"},
}
STEPS = {"cuda": 10, "cpu": 2}  # between two entries of the log
COLUMNS = (
    Column("varied", "key"),
    Column("value", "key"),
    Column("batch", "key"),
    Column("samples/s"),
    Column("rate to first"),
    Column("ms per step"),
    Column("time to first"),
    Column("work to first"),
    Column("GiB"),
    Column("of limit", "ratio"),
)


def run(
    path: Path, device: torch.device, data_dir: str, folder: Path, settings: dict, intervals: int, gpus: int
) -> runs.Speed:
    """Run train.py in `folder` and return its speed. settings: differences from the configuration."""
    config, interval = load_config(path), STEPS[device.type]
    for key, value in settings.items():
        apply_override(config, f"{key}={value}")
    weights = common.random_weights(config["models"], common.packed_rows(data_dir), folder, device)
    steps = (runs.WARM_INTERVALS + intervals) * interval
    settings = runs.steady_settings(weights, steps, interval) | settings
    line = runs.arguments(path, device, data_dir, folder / "run", settings, "--num_gpus", str(gpus))
    return runs.speed(line, folder / "run", runs.WARM_INTERVALS)


def values_of(args: argparse.Namespace, device: torch.device, axis: str) -> list[int]:
    """Return the values to measure; none for GPUs if there is no GPU."""
    if axis == "gpus":
        there = torch.cuda.device_count() if device.type == "cuda" else 0
        return [n for n in (1, 2, 4, 8) if n <= there]
    return args.values or DEFAULTS[device.type][axis]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--of", nargs="+", choices=AXES, default=list(AXES), help="what to vary (default: all)")
    flags.add_argument("--values", nargs="+", type=int, help="with one --of: values to measure")
    flags.add_argument(
        "--batch",
        type=int,
        help="batch size, unless it is varied (default: 16 on a GPU, 2 on a CPU; an eighth of it above 64³)",
    )
    flags.add_argument("--intervals", type=int, default=4, help="entries of the log that count (default: 4)")
    args = flags.parse_args(argv)
    if args.values and (len(args.of) > 1 or args.of == ["gpus"]):
        flags.error("--values needs one --of, of batch, resolution or codes")
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    usual = args.batch or (16 if cuda else 2)
    ceilings = common.measure_ceilings(device)
    report = Report("Scaling", __file__, argv, device, args.output, {"resolution": args.resolution})
    table, text = [], "There is no GPU, so nothing to scale over."
    with tempfile.TemporaryDirectory() as name:
        made: dict[int, str] = {}
        if args.data_dir:
            made[args.resolution] = common.data_for(args, Path(name))
        for axis in args.of:
            path = runs.config_path(CONFIGS[device.type]["stage2" if axis == "codes" else "kl"])
            first = None
            for value in values_of(args, device, axis):
                resolution = value if axis == "resolution" else args.resolution
                gpus = value if axis == "gpus" else 1
                batch = value if axis == "batch" else max(1, usual // 8) if resolution > 64 else usual
                if resolution not in made:
                    made[resolution] = common.make_data(Path(name), args.objects, resolution)
                settings = {"dataset.args.resolution": resolution, **runs.batch_setting(load_config(path), batch)}
                if axis == "codes":
                    settings["models.quantizer.args.n_embed"] = value
                speed = run(path, device, made[resolution], Path(name), settings, args.intervals, gpus)
                flops = plain.convolution_flops(load_config(path)["models"], "kl", resolution)
                rate, step = speed.samples_per_second, batch * gpus / speed.samples_per_second
                limit = gpus / ceilings.seconds(flops, 0, common.compute_dtype(device))
                first = first or (rate, step, batch * flops)
                table.append(
                    [
                        axis,
                        value,
                        batch,
                        rate,
                        rate / first[0],
                        step * 1e3,
                        step / first[1],
                        batch * flops / first[2],
                        speed.peak_memory_gib,
                        rate / limit,
                    ]
                )
                print(f"{axis} {value}: {rate:.1f} samples/s", flush=True)
                text = report.write(f"Ceilings: {ceilings}.", Table(COLUMNS, table))
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main, None))
