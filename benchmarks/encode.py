"""Grids to ids: how many grids per second the encoder and the codebook tokenize.

    python benchmarks/encode.py                   # GPU: the full-size encoder in bf16 and in fp32
    python benchmarks/encode.py --device cpu      # the demo's encoder in fp32

Grids are on the device, bit-packed; each batch is unpacked, encoded and quantized. Each row runs in the precision that
it names: the configuration's `use_fp16` is switched off, TF32 is off in convolutions and products, and the command
stops if the blocks of an encoder give another dtype. Plain: the plain network in the same precision, with
torch.cdist().argmin(). Limit: operations of the encoder's convolutions over the product rate in that precision,
measured in this run. Equal ids: share of the tokens whose id equals the fp32 encoder's.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from benchmarks.report import Column, Report, Table
from trellis import models as model_registry
from trellis.grids.voxels import unpack_bits_on_device
from trellis.models import load_weights, read_weights
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

COLUMNS = (
    Column("precision", "key"),
    Column("batch", "key"),
    Column("samples/s"),
    Column("limit"),
    Column("of limit", "ratio"),
    Column("plain samples/s"),
    Column("ratio to plain", "ratio"),
    Column("equal ids", format=".4f"),
)


def build(models: dict[str, dict], weights: dict[str, str], device: torch.device) -> dict[str, nn.Module]:
    """Return our and the plain encoder and codebook with the same weights, frozen on the device.

    Our encoder leaves its precision to `arithmetic`, whatever the configuration's `use_fp16` says.
    """
    built = {}
    for name in ("encoder", "quantizer"):
        built[name] = model_registry.build(models[name], f"models.{name}")
        load_weights(built[name], f"{weights[name]}.safetensors")
        built[f"plain {name}"] = plain.build(models[name])
        built[f"plain {name}"].load_state_dict(read_weights(f"{weights[name]}.safetensors"))
    built["encoder"].convert_to_fp32()
    return {name: model.to(device).requires_grad_(False).eval() for name, model in built.items()}


@contextlib.contextmanager
def arithmetic(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run the block in autocast to `dtype`, or for float32 without autocast; TF32 is off either way."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@torch.no_grad()
def tokenize(models: dict[str, nn.Module], bits: Tensor, resolution: int, dtype: torch.dtype) -> Tensor:
    """Return ids, [B·tokens] int64, with the encoder in `dtype`. bits: [B, R^3 / 8] uint8 on the device."""
    grid = unpack_bits_on_device(bits, resolution)
    with arithmetic(grid.device, dtype):
        z = models["encoder"](grid.float())
    return models["quantizer"](z.float()).indices.flatten()


@torch.no_grad()
def tokenize_plainly(models: dict[str, nn.Module], bits: Tensor, resolution: int, dtype: torch.dtype) -> Tensor:
    """Do the same with the plain network."""
    grid = unpack_bits_on_device(bits, resolution)
    with arithmetic(grid.device, dtype):
        mean = models["plain encoder"](grid)[0]
    return models["plain quantizer"](mean.float())[1].flatten()


def block_dtypes(models: dict[str, nn.Module], call: Callable[[], object]) -> set[torch.dtype]:
    """Return the dtypes of what the middle blocks of the encoders give while `call` runs."""
    seen: set[torch.dtype] = set()
    blocks = [block for name in ("encoder", "plain encoder") for block in models[name].middle_block]
    hooks = [block.register_forward_hook(lambda module, args, output: seen.add(output.dtype)) for block in blocks]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def check_precision(models: dict[str, nn.Module], bits: Tensor, resolution: int, dtype: torch.dtype) -> None:
    """Raise RuntimeError if an encoder does not run in `dtype`."""
    for function in (tokenize, tokenize_plainly):
        found = block_dtypes(models, lambda f=function: f(models, bits, resolution, dtype))
        if found != {dtype}:
            raise RuntimeError(f"{function.__name__}: the encoder ran in {found}, but {dtype} was to be measured")


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--batch_size", type=int, help="default: 32 on a GPU, 4 on a CPU")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    batch = args.batch_size or (32 if cuda else 4)
    specs = load_config(runs.config_path("vqvae_stage1" if cuda else "demo_stage1"))["models"]
    work = {"resolution": args.resolution, "channels": specs["encoder"]["args"]["channels"]}
    report = Report("Grid to ids", __file__, argv, device, args.output, work)
    torch.backends.cudnn.benchmark = True

    ceilings = common.measure_ceilings(device)
    with tempfile.TemporaryDirectory() as name:
        rows = common.packed_rows(common.data_for(args, Path(name)))[:batch]
        models = build(specs, common.random_weights(specs, rows, Path(name), device), device)
    bits = torch.from_numpy(rows).to(device)
    flops = plain.convolution_flops(specs, "encode", args.resolution)
    reference = tokenize(models, bits, args.resolution, torch.float32)
    table = []
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        check_precision(models, bits, args.resolution, dtype)
        limit = 1 / ceilings.seconds(flops, 0, dtype)
        rates = [
            len(rows)
            / common.median_seconds(lambda f=function, d=dtype: f(models, bits, args.resolution, d), device, budget=3.0)
            for function in (tokenize, tokenize_plainly)
        ]
        equal = (tokenize(models, bits, args.resolution, dtype) == reference).float().mean().item()
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        table.append([name, len(rows), rates[0], limit, rates[0] / limit, rates[1], rates[0] / rates[1], equal])
    print(report.write(f"Ceilings: {ceilings}.", Table(COLUMNS, table)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
