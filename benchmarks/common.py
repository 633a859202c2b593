"""Parts of several benchmarks: flags, ceilings of the machine, timers, data and random weights.

Ceilings are measured in the same run as the figures, so that a ratio means the same on any machine.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
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
from trellis.utils.command import DEVICES
from trellis.utils.errors import DataError

# More than the L2 cache of any GPU so far. Written between timed calls, so that no call finds its inputs in the cache.
SCRUB_BYTES = 2**28
# Noise on codes taken from latents, relative to the latents' deviation. Cells of empty space have equal latents,
# and equal codes would be exact ties, which are rare in a trained codebook.
CODE_JITTER = 0.1
MIN_RUNS = 5  # timed calls
MAX_RUNS = 200  # on a GPU, where all calls are enqueued at once


# --- arguments -------------------------------------------------------------------------------------------


def parser(description: str, *, data: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark takes; with `data`, also those that choose grids."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=DEVICES, default="auto")
    flags.add_argument(
        "--output",
        type=_markdown_file,
        metavar="FILE.md",
        help="write the report to this Markdown file and its rows to FILE.json, which check.py compares",
    )
    if data:
        flags.add_argument("--data_dir", help="a packed .npz file or a folder of them (default: made-up shells)")
        flags.add_argument("--resolution", type=int, default=64, help="voxels along an axis (default: 64)")
        flags.add_argument("--objects", type=int, default=512, help="number of made-up grids (default: 512)")
    return flags


def _markdown_file(text: str) -> Path:
    if text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"{text}: give the Markdown file's name; the rows are written beside it as JSON"
        )
    return Path(text)


# --- ceilings --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Highest rates of the machine, reached on the simplest work.

    copy: bytes read plus bytes written, per second.
    arithmetic: FLOP/s of wide products of random numbers, by the dtype of the operands.
    """

    copy: float
    arithmetic: dict[torch.dtype, float]

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Return the least time for `flops` operations in `dtype` and `moved` bytes, if the two overlap."""
        rate = self.arithmetic[torch.bfloat16 if dtype == torch.float16 else dtype]  # fp16 runs as fast as bf16
        return max(flops / rate, moved / self.copy)

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        rates = ", ".join(f"{names[dtype]} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in self.arithmetic.items())
        return f"copy {self.copy / 1e9:.0f} GB/s (read and written), products {rates}"


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure copy bandwidth and product rates on random data. fp32 products run without TF32, as is torch's default.

    A CPU's product rate is the higher of a square product's and a wide convolution's. The two come from different
    libraries, and either may fall short of the machine.
    """
    if device.type == "cuda":
        arithmetic = {dtype: _product_rate(8192, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
        ceilings = Ceilings(_copy_rate(2**28, device), arithmetic)
        torch.cuda.empty_cache()
        return ceilings
    rate = max(_product_rate(1024, torch.float32, device), _convolution_rate())
    return Ceilings(_copy_rate(2**26, device), {torch.float32: rate})


def _ceiling_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return a GPU's median time, at the clock it keeps under load; a CPU's least, since other work may interfere."""
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
    """Return a CPU's FLOP/s in a float32 convolution of 128 channels, which fill vector units of any width."""
    x, weight = torch.randn(1, 128, 16, 16, 16), torch.randn(128, 128, 3, 3, 3)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, weight))
    seconds = _ceiling_seconds(lambda: F.conv3d(x, weight, padding=1), torch.device("cpu"))
    return 2 * weight.numel() * 16**3 / seconds


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype whose product rate limits training: bf16 on a GPU (fp16 runs as fast), fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- timing ----------------------------------------------------------------------------------------------


def median_seconds(function: Callable[[], object], device: torch.device, *, budget: float = 1.0) -> float:
    """Return the median time of a call, in seconds; see `call_seconds`."""
    return statistics.median(call_seconds(function, device, budget=budget))


def call_seconds(
    function: Callable[[], object], device: torch.device, *, budget: float, scrub: bool = True
) -> list[float]:
    """Return the times of calls, in seconds, after a warm-up.

    budget: about how many seconds to spend; at least MIN_RUNS calls are timed.
    scrub: empty a GPU's L2 cache before each call. This also gives the host time to enqueue the call while the GPU is
        busy. Each call on a GPU is timed between two events.
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


# --- data ------------------------------------------------------------------------------------------------


def make_grids(number: int, resolution: int, seed: int = 0) -> np.ndarray:
    """Return grids [number, R, R, R] bool, each with the shells of two random ellipsoids or boxes.

    A shell is one voxel thick; at 64³ 2 to 3 % of the voxels are occupied.
    """
    rng = np.random.default_rng(seed)
    axis = (np.arange(resolution) + 0.5) / resolution
    grids = np.zeros((number, resolution, resolution, resolution), dtype=bool)
    for grid in grids:
        for _ in range(2):
            center, radius = rng.uniform(0.4, 0.6, 3), rng.uniform(0.1, 0.35, 3)
            x, y, z = (np.abs(axis - c) / r for c, r in zip(center, radius, strict=True))
            x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
            if rng.random() < 0.5:
                distance = np.maximum(np.maximum(x, y), z)
            else:
                distance = np.sqrt(x * x + y * y + z * z)
            grid |= (distance < 1) & (distance > 1 - 1 / (resolution * radius.mean()))
    return grids


def make_data(folder: Path, number: int, resolution: int) -> str:
    """Write made-up grids as one packed file, all in the training split, and return its path."""
    bits = np.concatenate([pack_bits(make_grids(1, resolution, seed)) for seed in range(number)])
    path = folder / f"shells{resolution}.npz"
    np.savez(path, bits=bits, split=np.full(number, "train"))
    return str(path)


def data_for(args: argparse.Namespace, folder: Path) -> str:
    """Return the data root that the flags name, or make one in `folder` if they name none."""
    return os.path.abspath(args.data_dir) if args.data_dir else make_data(folder, args.objects, args.resolution)


def packed_rows(data_dir: str) -> np.ndarray:
    """Return the training rows [N, R^3 / 8] uint8 of a packed file or a folder of packed files. Raise DataError."""
    path = Path(data_dir)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{data_dir} has no .npz file; the benchmarks read packed data, which pack.py makes")
    rows = []
    for file in files:
        arrays = load_packed(file)
        named_val = "split" not in arrays and file.stem.endswith("val")
        split = arrays.get("split", np.full(len(arrays["bits"]), "val" if named_val else "train"))
        rows.append(arrays["bits"][split == "train"])
    return np.concatenate(rows)


def grids_of(rows: np.ndarray, device: torch.device) -> Tensor:
    """Unpack rows [N, R^3 / 8] uint8 to [N, 1, R, R, R] uint8, 0 or 1, on the device."""
    return unpack_bits(rows, round((rows.shape[1] * 8) ** (1 / 3)))[:, None].to(device)


# --- weights ---------------------------------------------------------------------------------------------


def tiny_models(**quantizer: object) -> dict[str, dict]:
    """Return the models of a tokenizer of 16³ grids with 4³ tokens."""
    shape = {"latent_channels": 4, "num_res_blocks": 1, "num_res_blocks_middle": 1}
    return {
        "encoder": {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": [4, 8, 8], **shape}},
        "decoder": {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": [8, 8, 4], **shape}},
        "quantizer": {
            "name": "VectorQuantizer",
            "args": {"n_embed": 32, "embed_dim": 4, "latent_channels": 4, **quantizer},
        },
    }


def random_weights(models: dict[str, dict], rows: np.ndarray, folder: Path, device: torch.device) -> dict[str, str]:
    """Write random weights for the `models` of a configuration and return {model: path} for finetune_ckpt.

    A fresh network has zeros in half of its convolutions, and products with zeros can run faster than others. So these
    convolutions get random weights too. The codebook holds latents of the data with a little noise.
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
    """Return a codebook [K, embed_dim] of randomly drawn latent vectors of packed grids, with noise."""
    encoder.to(device)
    latents = [quantizer.to_vectors(encoder(grids_of(row[None], device).float())).flatten(0, -2) for row in rows]
    vectors = torch.cat(latents).float()
    picked = vectors[torch.randint(len(vectors), (quantizer.n_embed,), device=device)]
    return picked + CODE_JITTER * vectors.std(0) * torch.randn_like(picked)
