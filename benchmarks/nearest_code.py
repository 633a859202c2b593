"""Nearest code against torch.cdist().argmin(): time, extra memory and agreement with fp64.

    python benchmarks/nearest_code.py                 # GPU: 131072 x 8192 x 8-d and 32768 x 8192 x 32-d
    python benchmarks/nearest_code.py --device cpu    # 16384 x 8192 x 8-d and 4096 x 8192 x 32-d
    python benchmarks/nearest_code.py --growth        # also with 1k ... 64k codes

Vectors and codes are normal random numbers. Limit: the 2·N·K·D operations of their products over the fp32 product
rate measured in this run; a search whose first pass runs on tensor cores can exceed it. Extra memory: the peak of one
call above what was allocated before it, with the result; on a GPU by torch's allocator, on a CPU in a process of its
own (Linux only). Equal ids: share of the first vectors that get the code of least fp64 distance, the lowest index on
ties.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain
from benchmarks.report import Column, Report, Table
from trellis.modules.quantizers.nearest import nearest_code
from trellis.utils.command import pick_device, run_command

SIZES = {"cuda": [(131072, 8192, 8), (32768, 8192, 32)], "cpu": [(16384, 8192, 8), (4096, 8192, 32)]}
GROWTH = [1024, 4096, 16384, 65536]
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": nearest_code, "plain": plain.nearest}
CHECKED = 2048  # vectors compared with fp64
COLUMNS = (
    Column("N × K × D", "key"),
    Column("ms"),
    Column("limit ms"),
    Column("of limit", "ratio"),
    Column("plain ms"),
    Column("ratio to plain", "ratio"),
    Column("extra MiB"),
    Column("plain extra MiB"),
    Column("equal ids", format=".6f"),
    Column("plain equal ids", format=".6f"),
)


def problem(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return vectors [N, D] and a codebook [K, D] for a size (N, K, D)."""
    n, k, d = size
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, d, generator=generator).to(device) for rows in (n, k))


def fp64_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the reference, [N] int64: the least sum of squared differences in fp64, the lowest index on ties."""
    rows = max(1, 2**24 // codebook.numel())
    found = []
    for part in vectors.double().split(rows):
        distance = (part[:, None] - codebook.double()[None]).square().sum(-1)
        least = distance == distance.min(1, keepdim=True).values
        found.append(least.int().argmax(1))  # the first of them
    return torch.cat(found)


# --- memory ----------------------------------------------------------------------------------------------


def extra_mib(method: str, size: tuple[int, int, int], device: torch.device) -> float | None:
    """Return the memory of one call beyond its inputs, in MiB; None if the system does not report it."""
    if device.type == "cpu":
        return _extra_mib_cpu(method, size)
    inputs = problem(size, device)
    METHODS[method](*inputs)  # memory that stays, such as a library's workspace, does not count
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = METHODS[method](*inputs)
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before
    del result
    return extra / 2**20


def _extra_mib_cpu(method: str, size: tuple[int, int, int]) -> float | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    done = subprocess.run(
        [sys.executable, __file__, "--peak_of", method, *map(str, size)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


def print_peak_growth(method: str, size: tuple[int, int, int]) -> None:
    """Print by how many MiB one call raises the peak memory of this process, which should do nothing else."""
    device = torch.device("cpu")
    METHODS[method](*problem((64, 64, size[2]), device))  # the first call starts threads and loads libraries
    inputs = problem(size, device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present use
    before = _status_kib("VmHWM")
    METHODS[method](*inputs)
    print((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


# --- table -----------------------------------------------------------------------------------------------


def measure(size: tuple[int, int, int], device: torch.device, ceilings: common.Ceilings) -> list[object]:
    """Return the row of the table for one size."""
    vectors, codebook = problem(size, device)
    reference = fp64_nearest(vectors[:CHECKED], codebook)
    limit = ceilings.seconds(plain.nearest_flops(*size), vectors.nbytes + codebook.nbytes, torch.float32)
    seconds, equal = {}, {}
    for method in reversed(METHODS):  # the baseline first
        function = METHODS[method]
        seconds[method] = common.median_seconds(lambda f=function: f(vectors, codebook), device)
        equal[method] = (function(vectors, codebook)[:CHECKED] == reference).float().mean().item()
    return [
        " × ".join(map(str, size)),
        seconds["ours"] * 1e3,
        limit * 1e3,
        limit / seconds["ours"],
        seconds["plain"] * 1e3,
        seconds["plain"] / seconds["ours"],
        *(extra_mib(method, size, device) for method in METHODS),
        *(equal[method] for method in METHODS),
    ]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument(
        "--sizes", nargs="+", type=_size, metavar="N,K,D", help="sizes to measure instead of the device's usual ones"
    )
    flags.add_argument("--growth", action="store_true", help="also measure the first size with 1k to 64k codes")
    flags.add_argument("--peak_of", nargs=4, help=argparse.SUPPRESS)  # METHOD N K D, see print_peak_growth
    args = flags.parse_args(argv)
    if args.peak_of:
        print_peak_growth(args.peak_of[0], tuple(map(int, args.peak_of[1:])))
        return
    device = pick_device(args.device)
    ceilings = common.measure_ceilings(device)
    sizes = args.sizes or SIZES[device.type]
    if args.growth:
        n, _, d = sizes[0]
        sizes = [*sizes, *((n, k, d) for k in GROWTH)]
    report, table = Report("Nearest code", __file__, argv, device, args.output), []
    for size in sizes:
        table.append(measure(size, device, ceilings))
        text = report.write(f"Ceilings: {ceilings}.", Table(COLUMNS, table))
    print(text)


def _size(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,K,D, such as 4096,8192,8")
    return tuple(map(int, parts))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
