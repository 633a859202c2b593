"""What the benchmarks share: the machine's description and ceilings, timers, tables, data and random weights.

Ceilings are measured in the same run as the figures, so that a ratio means the same on any machine.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trellis import models as model_registry
from trellis.datasets.packed import load_packed
from trellis.grids.voxels import pack_bits, unpack_bits
from trellis.utils.errors import DataError

# More than the L2 cache of any GPU so far: written between timed runs, so that none finds its inputs there.
SCRUB_BYTES = 2**28
# Noise on codes taken from latents, relative to the latents' deviation. Cells of empty space have equal latents,
# and equal codes would be exact ties, which no trained codebook has many of.
CODE_JITTER = 0.1
MIN_RUNS, MAX_RUNS = 5, 200  # of a timed call; the latter on a GPU, where all are enqueued at once


# --- arguments -------------------------------------------------------------------------------------------


def parser(description: str, *, data: bool = True) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes. data: also the flags of grids to work on."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--output", type=Path, help="file to write the table to, in Markdown")
    if data:
        flags.add_argument("--data_dir", help="a packed .npz file or a folder of them (default: made-up shells)")
        flags.add_argument("--resolution", type=int, default=64, help="cells along an axis (default: 64)")
        flags.add_argument("--objects", type=int, default=512, help="made-up grids where no --data_dir is given")
    return flags


def pick_device(name: str) -> torch.device:
    """Raises SystemExit for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: torch finds no GPU here; use --device cpu")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


# --- machine ---------------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> str:
    """One line: processor or GPU, threads, and the versions that decide speed."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cpu":
        return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    count = torch.cuda.device_count()
    return (
        f"{count} x {torch.cuda.get_device_name(device)}, {os.cpu_count()} CPU cores, {versions}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, triton {triton}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches on the simplest work. copy: bytes read plus written per second. arithmetic: FLOP/s of
    wide products of random numbers, by the operands' type."""

    copy: float
    arithmetic: dict[torch.dtype, float]

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time for this many operations in `dtype` and bytes moved, the two overlapping."""
        rate = self.arithmetic[torch.bfloat16 if dtype == torch.float16 else dtype]  # they run alike
        return max(flops / rate, moved / self.copy)

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        rates = ", ".join(f"{names[dtype]} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in self.arithmetic.items())
        return f"copy {self.copy / 1e9:.0f} GB/s (read and written), products {rates}"


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth and product rates on random data. fp32 products stay fp32: torch's default, no TF32.

    A CPU's rate is the better of a square product and a wide convolution, which come from different libraries, of
    which either may fall short of the machine.
    """
    if device.type == "cuda":
        arithmetic = {dtype: _product_rate(8192, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
        ceilings = Ceilings(_copy_rate(2**28, device), arithmetic)
        torch.cuda.empty_cache()
        return ceilings
    rate = max(_product_rate(1024, torch.float32, device), _convolution_rate())
    return Ceilings(_copy_rate(2**26, device), {torch.float32: rate})


def _ceiling_seconds(function: Callable[[], object], device: torch.device) -> float:
    """A GPU's median, at the clock that it keeps under load; a CPU's best, since other work may be in the way."""
    times = call_seconds(function, device, budget=0.5, scrub=False)
    return statistics.median(times) if device.type == "cuda" else min(times)


def _copy_rate(elements: int, device: torch.device) -> float:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _ceiling_seconds(lambda: target.copy_(source), device)


def _product_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _ceiling_seconds(lambda: a @ b, device)


def _convolution_rate() -> float:
    """On a CPU, of 128 to 128 channels in float32, which fill vector units of any width."""
    x, weight = torch.randn(1, 128, 16, 16, 16), torch.randn(128, 128, 3, 3, 3)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, weight))
    seconds = _ceiling_seconds(lambda: F.conv3d(x, weight, padding=1), torch.device("cpu"))
    return 2 * weight.numel() * 16**3 / seconds


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type whose product rate bounds training: bf16 on a GPU (fp16 runs as fast), fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- timing ----------------------------------------------------------------------------------------------


def median_seconds(function: Callable[[], object], device: torch.device, *, budget: float = 1.0) -> float:
    """Median time of a call, in seconds; see `call_seconds`."""
    return statistics.median(call_seconds(function, device, budget=budget))


def call_seconds(
    function: Callable[[], object], device: torch.device, *, budget: float, scrub: bool = True
) -> list[float]:
    """Times of calls, in seconds, after a warm-up.

    budget: seconds to spend about; at least MIN_RUNS calls are timed. On a GPU each call is between two events, and
    `scrub` empties the L2 cache before it, which also lets the host enqueue the call while the GPU is busy.
    """
    for _ in range(2):
        function()
    if device.type == "cpu":
        return _cpu_times(function, budget)
    scratch = torch.empty(SCRUB_BYTES if scrub else 0, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    estimate = time.perf_counter() - started
    pairs = []
    for _ in range(min(MAX_RUNS, max(MIN_RUNS, int(budget / max(estimate, 1e-6))))):
        scratch.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        function()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _cpu_times(function: Callable[[], object], budget: float) -> list[float]:
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < budget:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


# --- results ---------------------------------------------------------------------------------------------


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; None shows as a dash and a float in three digits."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_report(title: str, parts: Sequence[str], output: Path | None) -> str:
    """The parts as paragraphs under a title, written to `output` where it is given. A long benchmark writes after
    each row, so that one that is cut off leaves what it has."""
    text = f"# {title}\n\n" + "\n\n".join(parts) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    return text


# --- data ------------------------------------------------------------------------------------------------


def make_grids(number: int, resolution: int, seed: int = 0) -> np.ndarray:
    """Shells one cell thick, each of two random ellipsoids or boxes: bool [number, R, R, R], at 64 cells 2 to 3 %
    occupied."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(resolution) + 0.5) / resolution
    grids = np.zeros((number, resolution, resolution, resolution), dtype=bool)
    for grid in grids:
        for _ in range(2):
            centre, radius = rng.uniform(0.4, 0.6, 3), rng.uniform(0.1, 0.35, 3)
            x, y, z = (np.abs(axis - c) / r for c, r in zip(centre, radius, strict=True))
            x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
            if rng.random() < 0.5:
                distance = np.maximum(np.maximum(x, y), z)
            else:
                distance = np.sqrt(x * x + y * y + z * z)
            grid |= (distance < 1) & (distance > 1 - 1 / (resolution * radius.mean()))
    return grids


def make_data(folder: Path, number: int, resolution: int) -> str:
    """Write made-up grids as one packed file, all in the training split. Returns its path."""
    bits = np.concatenate([pack_bits(make_grids(1, resolution, seed)) for seed in range(number)])
    path = folder / f"shells{resolution}.npz"
    np.savez(path, bits=bits, split=np.full(number, "train"))
    return str(path)


def data_for(args: argparse.Namespace, folder: Path) -> str:
    """The data root that the flags ask for, made in `folder` where they name none."""
    return os.path.abspath(args.data_dir) if args.data_dir else make_data(folder, args.objects, args.resolution)


def packed_rows(data_dir: str) -> np.ndarray:
    """The training rows [N, R^3 / 8] uint8 of a packed file or a folder of packed files. Raises DataError."""
    path = Path(data_dir)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{data_dir}: has no .npz file. The benchmarks read packed data; pack.py makes it")
    rows = []
    for file in files:
        arrays = load_packed(file)
        named_val = "split" not in arrays and file.stem.endswith("val")
        split = arrays.get("split", np.full(len(arrays["bits"]), "val" if named_val else "train"))
        rows.append(arrays["bits"][split == "train"])
    return np.concatenate(rows)


def grids_of(rows: np.ndarray, device: torch.device) -> Tensor:
    """[N, R^3 / 8] uint8 to [N, 1, R, R, R] uint8, 0 or 1, on the device."""
    return unpack_bits(rows, round((rows.shape[1] * 8) ** (1 / 3)))[:, None].to(device)


# --- weights ---------------------------------------------------------------------------------------------


def random_weights(models: dict[str, dict], rows: np.ndarray, folder: Path, device: torch.device) -> dict[str, str]:
    """Write random weights for the `models` of a configuration. Returns {model: path} for finetune_ckpt.

    A fresh network starts with zeros in half of its convolutions, and products of zeros can run faster than real
    ones, so these get random weights too. The codebook holds latents of the data with a little noise.
    """
    from safetensors.torch import save_file

    torch.manual_seed(0)
    paths = {}
    built = {name: model_registry.build(spec, f"models.{name}") for name, spec in models.items()}
    for name, model in built.items():
        state = model.state_dict()
        for value in state.values():
            if value.ndim == 5 and not value.any():
                value.uniform_(-1, 1).div_(value[0].numel() ** 0.5)
        if name == "quantizer":
            state["embeddings.weight"] = latent_codes(built["encoder"], model, rows[:16], device)
        path = folder / name
        path.with_suffix(".json").write_text(model_registry.model_spec(models[name]))
        save_file({key: value.cpu().contiguous() for key, value in state.items()}, path.with_suffix(".safetensors"))
        paths[name] = str(path)
    return paths


@torch.no_grad()
def latent_codes(
    encoder: torch.nn.Module, quantizer: torch.nn.Module, rows: np.ndarray, device: torch.device
) -> Tensor:
    """A codebook [K, embed_dim] of latent vectors of packed grids, drawn at random, with noise."""
    encoder.to(device)
    latents = [quantizer.to_vectors(encoder(grids_of(row[None], device).float())).flatten(0, -2) for row in rows]
    vectors = torch.cat(latents).float()
    picked = vectors[torch.randint(len(vectors), (quantizer.n_embed,), device=device)]
    return picked + CODE_JITTER * vectors.std(0) * torch.randn_like(picked)
