"""Grids to ids: how many objects per second the encoder and the codebook tokenize.

    python benchmarks/encode.py                   # GPU: the full-size encoder in bf16 and in fp32
    python benchmarks/encode.py --device cpu      # the demo's, in fp32

Grids are on the device, bit-packed; each batch is unpacked, encoded and quantized. fp32 means fp32: convolutions may
not use TF32. Plain: the plain network in the same precision with torch.cdist().argmin(). Limit: operations of the
encoder's convolutions over the product rate in that precision, measured in this run. Equal ids: share of tokens that
are those of the fp32 encoder.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from trellis import models as model_registry
from trellis.grids.voxels import unpack_bits_on_device
from trellis.models import load_weights, read_weights
from trellis.utils.config import load_config


def build(models: dict[str, dict], weights: dict[str, str], device: torch.device) -> dict[str, nn.Module]:
    """Ours and the plain encoder and codebook, with the same weights, frozen on the device."""
    built = {}
    for name in ("encoder", "quantizer"):
        built[name] = model_registry.build(models[name], f"models.{name}")
        load_weights(built[name], f"{weights[name]}.safetensors")
        built[f"plain {name}"] = plain.build(models[name])
        built[f"plain {name}"].load_state_dict(read_weights(f"{weights[name]}.safetensors"))
    return {name: model.to(device).requires_grad_(False).eval() for name, model in built.items()}


@torch.no_grad()
def tokenize(models: dict[str, nn.Module], bits: Tensor, resolution: int, dtype: torch.dtype) -> Tensor:
    """bits: [B, R^3 / 8] uint8 on the device. Returns ids, [B·tokens]."""
    grid = unpack_bits_on_device(bits, resolution)
    with torch.autocast(grid.device.type, dtype, enabled=dtype != torch.float32):
        z = models["encoder"](grid.float())
    return models["quantizer"](z.float()).indices.flatten()


@torch.no_grad()
def tokenize_plainly(models: dict[str, nn.Module], bits: Tensor, resolution: int, dtype: torch.dtype) -> Tensor:
    grid = unpack_bits_on_device(bits, resolution)
    with torch.autocast(grid.device.type, dtype, enabled=dtype != torch.float32):
        mean = models["plain encoder"](grid)[0]
    return models["plain quantizer"](mean.float())[1].flatten()


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--batch_size", type=int, help="default: 32 on a GPU, 4 on a CPU")
    args = flags.parse_args(argv)
    device = common.pick_device(args.device)
    cuda = device.type == "cuda"
    batch = args.batch_size or (32 if cuda else 4)
    specs = load_config(runs.config_path("vqvae_stage1" if cuda else "demo_stage1"))["models"]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False

    ceilings = common.measure_ceilings(device)
    with tempfile.TemporaryDirectory() as name:
        rows = common.packed_rows(common.data_for(args, Path(name)))[:batch]
        models = build(specs, common.random_weights(specs, rows, Path(name), device), device)
    bits = torch.from_numpy(rows).to(device)
    flops = plain.convolution_flops(specs, "encode", args.resolution)
    reference = tokenize(models, bits, args.resolution, torch.float32)
    table = []
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        limit = 1 / ceilings.seconds(flops, 0, dtype)
        rates = [
            len(rows)
            / common.median_seconds(lambda f=function, d=dtype: f(models, bits, args.resolution, d), device, budget=3.0)
            for function in (tokenize, tokenize_plainly)
        ]
        equal = (tokenize(models, bits, args.resolution, dtype) == reference).float().mean().item()
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        table.append(
            [name, len(rows), rates[0], limit, rates[0] / limit, rates[1], rates[0] / rates[1], f"{equal:.4f}"]
        )
    columns = ["encoder", "batch", "samples/s", "limit", "of limit", "plain samples/s", "ratio to plain", "equal ids"]
    parts = [common.describe_machine(device), f"Ceilings: {ceilings}.", common.markdown_table(columns, table)]
    print(common.write_report("Grid to ids", parts, args.output))


if __name__ == "__main__":
    main()
