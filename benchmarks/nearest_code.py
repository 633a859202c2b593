"""Nearest code against torch.cdist().argmin(): time, extra memory and agreement with fp64.

    python benchmarks/nearest_code.py                 # GPU: 131072 x 8192 x 8-d and 32768 x 8192 x 32-d
    python benchmarks/nearest_code.py --device cpu    # 16384 x 8192 x 8-d and 4096 x 8192 x 32-d
    python benchmarks/nearest_code.py --growth        # also with 1k ... 64k codes

Vectors and codes are normal random numbers. Limit: the 2·N·K·D operations of their products over the fp32 product
rate measured in this run; a first pass on tensor cores may pass it. Extra memory is what one call adds at its peak
to what is allocated before it, the result included: on a GPU by torch's allocator, on a CPU by the peak of a process
of its own (Linux only). Equal ids: share of the first vectors whose code is the one of least fp64 distance, the
lowest index on ties.
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
from trellis.modules.quantizers.nearest import nearest_code

SIZES = {"cuda": [(131072, 8192, 8), (32768, 8192, 32)], "cpu": [(16384, 8192, 8), (4096, 8192, 32)]}
GROWTH = [1024, 4096, 16384, 65536]
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": nearest_code, "plain": plain.nearest}
CHECKED = 2048  # vectors compared with fp64


def problem(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Vectors [N, D] and codebook [K, D] of a size (N, K, D)."""
    n, k, d = size
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, d, generator=generator).to(device) for rows in (n, k))


def fp64_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The reference: least sum of squared differences in fp64, the lowest index on ties."""
    rows = max(1, 2**24 // codebook.numel())
    found = []
    for part in vectors.double().split(rows):
        distance = (part[:, None] - codebook.double()[None]).square().sum(-1)
        least = distance == distance.min(1, keepdim=True).values
        found.append(least.int().argmax(1))  # the first of them
    return torch.cat(found)


# --- memory ----------------------------------------------------------------------------------------------


def extra_mib(method: str, size: tuple[int, int, int], device: torch.device) -> float | None:
    """Memory that one call needs beyond its inputs, in MiB; None where the system does not tell."""
    if device.type == "cpu":
        return _extra_mib_cpu(method, size)
    inputs = problem(size, device)
    METHODS[method](*inputs)  # what stays, such as a library's workspace, is not the call's
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
    """In a process of its own: the growth of this process's peak memory by one call, in MiB."""
    device = torch.device("cpu")
    METHODS[method](*problem((64, 64, size[2]), device))  # threads and libraries come with the first call
    inputs = problem(size, device)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    before = _status_kib("VmHWM")
    METHODS[method](*inputs)
    print((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


# --- table -----------------------------------------------------------------------------------------------


def measure(size: tuple[int, int, int], device: torch.device, ceilings: common.Ceilings) -> list[list]:
    """Rows of the table for one size."""
    vectors, codebook = problem(size, device)
    reference = fp64_nearest(vectors[:CHECKED], codebook)
    limit = ceilings.seconds(plain.nearest_flops(*size), vectors.nbytes + codebook.nbytes, torch.float32)
    seconds = {}
    rows = []
    for method in reversed(METHODS):  # the baseline first
        function = METHODS[method]
        seconds[method] = common.median_seconds(lambda f=function: f(vectors, codebook), device)
        equal = (function(vectors, codebook)[:CHECKED] == reference).float().mean().item()
        rows.append(
            [
                " × ".join(map(str, size)),
                method,
                seconds[method] * 1e3,
                limit * 1e3,
                limit / seconds[method],
                seconds["plain"] / seconds[method],
                extra_mib(method, size, device),
                f"{equal:.6f}",
            ]
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument("--sizes", nargs="+", type=_size, metavar="N,K,D", help="instead of the device's usual ones")
    flags.add_argument("--growth", action="store_true", help="also the first size with 1k to 64k codes")
    flags.add_argument("--peak_of", nargs=4, help=argparse.SUPPRESS)  # METHOD N K D, see print_peak_growth
    args = flags.parse_args(argv)
    if args.peak_of:
        print_peak_growth(args.peak_of[0], tuple(map(int, args.peak_of[1:])))
        return
    device = common.pick_device(args.device)
    ceilings = common.measure_ceilings(device)
    sizes = args.sizes or SIZES[device.type]
    if args.growth:
        n, _, d = sizes[0]
        sizes = [*sizes, *((n, k, d) for k in GROWTH)]
    columns = ["N × K × D", "", "ms", "limit ms", "of limit", "times as fast as plain", "extra MiB", "equal ids"]
    table = []
    for size in sizes:
        table += measure(size, device, ceilings)
        parts = [common.describe_machine(device), f"Ceilings: {ceilings}.", common.markdown_table(columns, table)]
        text = common.write_report("Nearest code", parts, args.output)
    print(text)


def _size(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,K,D, such as 4096,8192,8")
    return tuple(map(int, parts))


if __name__ == "__main__":
    main()
