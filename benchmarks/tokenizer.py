"""Speed of the tokenizer as a user calls it, to ids and to ids with their IoU; and how many ids agree.

    python benchmarks/tokenizer.py                                   # GPU: full size, random weights
    python benchmarks/tokenizer.py --tokenizer outputs/stage2 --data_dir DATA
    python benchmarks/tokenizer.py --device cpu                      # the demo's networks

"encode" is SparseStructureTokenizer.encode on grids that are on the device; "encode, IoU" adds decode and the IoU.
"script" is scripts/to_tokens.py on a packed file, from reading to Parquet, by its own clock, without its start-up.
Limit: operations of the convolutions over the product rate in that precision, measured in this run. Equal ids: share of
the ids that equal fp32's; for a few objects also the share of fp32 ids that equal a CPU's. With random weights these
shares say little.
"""

import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from benchmarks.report import Column, Report, Table
from trellis import SparseStructureTokenizer
from trellis.evaluation.metrics import voxel_metrics
from trellis.models import load_weights
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

ON_CPU = 8  # objects that are encoded on the CPU too
OF_SCRIPT = {("cuda", "bf16"): 8192, ("cuda", "fp32"): 256, ("cpu", "fp32"): 16}  # objects that the script encodes
COLUMNS = (
    Column("precision", "key"),
    Column("task", "key"),
    Column("objects/s"),
    Column("script, objects/s"),
    Column("limit"),
    Column("of limit", "ratio"),
    Column("ids equal to fp32", format=".4f"),
)


def full_size(rows: np.ndarray, resolution: int, folder: Path, device: torch.device) -> SparseStructureTokenizer:
    """Return a tokenizer with random weights: full size and 1024 tokens on a GPU, the demo's networks on a CPU."""
    name = "vqvae_1024_stage1" if device.type == "cuda" else "demo_stage1"
    models = load_config(runs.config_path(name))["models"]
    weights = common.random_weights(models, rows, folder, device)
    tokenizer = SparseStructureTokenizer(models, resolution)
    for key, path in weights.items():
        load_weights(getattr(tokenizer, key), f"{path}.safetensors")
    return tokenizer


def with_iou(tokenizer: SparseStructureTokenizer, grids: Tensor, precision: str) -> Tensor:
    """Encode and decode grids and return their IoU, [B]."""
    ids = tokenizer.encode(grids, precision)
    return voxel_metrics(tokenizer.decode(ids, precision), grids)["iou"]


def of_script(
    tokenizer: SparseStructureTokenizer, rows: np.ndarray, folder: Path, device: torch.device, precision: str, iou: bool
) -> float:
    """Return the objects per second of scripts/to_tokens.py, on copies of the rows with hashes of their own."""
    number = OF_SCRIPT[device.type, precision]
    data = folder / f"objects{number}.npz"
    if not data.exists():
        sha256 = np.array([f"{i:064x}" for i in range(number)])
        np.savez(data, bits=rows[np.arange(number) % len(rows)], sha256=sha256)
    if not (folder / "tokenizer").exists():
        tokenizer.save_pretrained(folder / "tokenizer")
    output = folder / f"{precision}_{iou}"
    line = [
        "--tokenizer",
        str(folder / "tokenizer"),
        "--data_dir",
        str(data),
        "--output_dir",
        str(output),
        "--precision",
        precision,
        "--device",
        device.type,
        "--num_gpus",
        "1",
    ]
    printed = runs.run_script("scripts/to_tokens.py", line + (["--iou"] if iou else []))
    return float(re.search(r"([\d.]+) objects/s", printed)[1])


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--tokenizer", help="tokenizer's folder, run or file (default: random weights)")
    flags.add_argument("--batch_size", type=int, help="default: 64 on a GPU, 4 on a CPU")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    batch = args.batch_size or (64 if cuda else 4)

    ceilings = common.measure_ceilings(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = common.packed_rows(common.data_for(args, folder))
        if args.tokenizer:
            tokenizer = SparseStructureTokenizer.load(args.tokenizer)
        else:
            tokenizer = full_size(rows, args.resolution, folder, device)
        tokenizer = tokenizer.to(device)
        grids = common.grids_of(rows[:batch], device)
        reference = tokenizer.encode(grids)
        work = {
            "resolution": args.resolution,
            "channels": tokenizer.specs["encoder"]["args"]["channels"],
            "tokens": math.prod(tokenizer.lattice),
            "batch": len(grids),
        }
        report, table = Report("Tokenizer", __file__, argv, device, args.output, work), []
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if not cuda and precision == "bf16":
                continue
            equal = (tokenizer.encode(grids, precision) == reference).float().mean().item()
            for task, kind, function in (
                ("encode", "encode", lambda p=precision: tokenizer.encode(grids, p)),
                ("encode, IoU", "forward", lambda p=precision: with_iou(tokenizer, grids, p)),
            ):
                limit = 1 / ceilings.seconds(plain.convolution_flops(tokenizer.specs, kind, args.resolution), 0, dtype)
                rate = len(grids) / common.median_seconds(function, device, budget=3.0)
                script = of_script(tokenizer, rows, folder, device, precision, task != "encode")
                table.append([precision, task, rate, script, limit, rate / limit, equal])
                print(f"{precision} {task}: {rate:.1f} objects/s, script {script:.1f}", file=sys.stderr, flush=True)
        some = grids[:ON_CPU]
        here = reference[: len(some)].cpu()
        there = (tokenizer.cpu().encode(some.cpu()) == here).float().mean().item() if cuda else None
    about = f"{args.tokenizer or 'Random weights'}, batches of {len(grids)}."
    agreement = [] if there is None else [f"fp32 ids of {len(some)} objects equal on GPU and CPU: {there:.6f}."]
    print(report.write(f"Ceilings: {ceilings}.", about, Table(COLUMNS, table), *agreement))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
