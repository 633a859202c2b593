"""Baselines in plain PyTorch: the same network and nearest-code search, and a count of their operations.

The network does what published code does: channels first, with a layer norm that moves the channels last, copies,
normalizes in fp32, moves them back and copies again. Its parameters have the names and shapes of `trellis.models`, so
that state dicts load strictly; in fp32 the outputs agree.

Axes: B batch, C channels, X Y Z voxels, N vectors, K codes, D channels of a code.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trellis.models import MODELS
from trellis.utils.config import complete_component

KINDS = ("kl", "stage1", "stage1_cached", "stage2")


class LayerNorm(nn.LayerNorm):
    """Layer norm over channels in fp32, with a copy to channels last before and one back after."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 4, 1).contiguous()
        y = super().forward(last.float()).to(x.dtype)
        return y.permute(0, 4, 1, 2, 3).contiguous()


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Down(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels * 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        B, C, X, Y, Z = h.shape
        h = h.reshape(B, C // 8, 2, 2, 2, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return h.reshape(B, C // 8, 2 * X, 2 * Y, 2 * Z)


class UNet(nn.Module):
    """Encoder or decoder. fp16: run the blocks between the first and the last layer in fp16 autocast."""

    fp16 = False

    def run(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        h = self.input_layer(x.float())
        with torch.autocast("cuda", torch.float16) if self.fp16 else contextlib.nullcontext():
            for block in blocks:
                h = block(h)
        return self.out_layer(h.float())


def _levels(channels: list[int], num_res_blocks: int, change: type[nn.Module]) -> nn.ModuleList:
    blocks = nn.ModuleList()
    for level, width in enumerate(channels):
        blocks.extend(ResBlock(width) for _ in range(num_res_blocks))
        if level + 1 < len(channels):
            blocks.append(change(width, channels[level + 1]))
    return blocks


class Encoder(UNet):
    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: list[int],
        num_res_blocks_middle: int = 2,
    ):
        super().__init__()
        self.input_layer = nn.Conv3d(in_channels, channels[0], 3, padding=1)
        self.blocks = _levels(channels, num_res_blocks, Down)
        self.middle_block = nn.Sequential(*(ResBlock(channels[-1]) for _ in range(num_res_blocks_middle)))
        last = nn.Conv3d(channels[-1], latent_channels * 2, 3, padding=1)
        self.out_layer = nn.Sequential(LayerNorm(channels[-1]), nn.SiLU(), last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode [B, 1, R, R, R] to (mean, logvar)."""
        return self.run(x, [*self.blocks, *self.middle_block]).chunk(2, dim=1)


class Decoder(UNet):
    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: list[int],
        num_res_blocks_middle: int = 2,
    ):
        super().__init__()
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResBlock(channels[0]) for _ in range(num_res_blocks_middle)))
        self.blocks = _levels(channels, num_res_blocks, Up)
        last = nn.Conv3d(channels[-1], out_channels, 3, padding=1)
        self.out_layer = nn.Sequential(LayerNorm(channels[-1]), nn.SiLU(), last)

    def forward(self, z: Tensor) -> Tensor:
        """Decode a latent to logits [B, 1, R, R, R]."""
        return self.run(z, [*self.middle_block, *self.blocks])


class Quantizer(nn.Module):
    """Plain codebook: all distances at once, straight-through gradients."""

    def __init__(self, n_embed: int = 8192, embed_dim: int = 8, latent_channels: int = 8):
        super().__init__()
        self.embed_dim = embed_dim
        self.embeddings = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (codes for the decoder, indices, codebook loss, commitment loss). z: [B, C, X, Y, Z]."""
        cells = z.float().permute(0, 2, 3, 4, 1).contiguous()
        indices = nearest(cells.view(-1, self.embed_dim), self.embeddings.weight)
        codes = self.embeddings(indices).view(cells.shape).permute(0, 4, 1, 2, 3).contiguous()
        vq, commit = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        return codes + (z - z.detach()), indices, vq, commit


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code, [N] int64, from all N × K distances. vectors: [N, D]; codebook: [K, D]."""
    return torch.cdist(vectors, codebook).argmin(1)


NETWORKS = {"SparseStructureEncoder": Encoder, "SparseStructureDecoder": Decoder, "VectorQuantizer": Quantizer}


def build(spec: dict) -> nn.Module:
    """Build the plain counterpart of {"name", "args"}. Raise ValueError for a norm that it lacks."""
    args = dict(spec.get("args", {}))
    norm = args.pop("norm_type", "layer")
    if norm != "layer":
        raise ValueError(f"norm_type is {norm!r}; the plain network has layer norm only")
    for key in ("use_fp16", "init"):  # precision and initial weights are chosen by the caller
        args.pop(key, None)
    return NETWORKS[spec["name"]](**args)


def tokens_per_sample(models: dict[str, dict], resolution: int) -> int:
    """Return how many vectors per sample are quantized. models: those of a configuration."""
    cells = (resolution // 2 ** (len(models["encoder"]["args"]["channels"]) - 1)) ** 3
    args = quantizer_args(models)
    return cells * args["latent_channels"] // args["embed_dim"]


def quantizer_args(models: dict[str, dict]) -> dict[str, Any]:
    """Return the arguments of a configuration's quantizer with defaults filled in."""
    return complete_component(models["quantizer"], MODELS, "models.quantizer")["args"]


def convolution_flops(models: dict[str, dict], kind: str, resolution: int) -> int:
    """Count the operations of the convolutions for one sample without executing them. A multiply-add counts as two.

    models: those of a configuration.
    kind: "encode" (encoder forward), "forward" (encoder and decoder forward), "kl" and "stage2" (forward and all
        gradients), "stage1" (encoder forward; decoder forward and the gradient of its input), "stage1_cached" (stage1
        without the encoder). No gradient is counted for the grid, which needs none.
    """
    cells = resolution // 2 ** (len(models["encoder"]["args"]["channels"]) - 1)
    with torch.device("meta"):
        encoder, decoder = build(models["encoder"]), build(models["decoder"])
        grid = torch.empty(1, 1, resolution, resolution, resolution)
        latent = torch.empty(1, models["encoder"]["args"]["latent_channels"], cells, cells, cells)
    for model in (encoder, decoder):
        model.requires_grad_(kind in ("kl", "stage2"))
    with FlopCounterMode(display=False) as counter:
        if kind != "stage1_cached":
            latent = encoder(grid)[0]
        if kind in ("stage1", "stage1_cached"):
            latent.requires_grad_()  # the codebook before the decoder is trained
        if kind != "encode":
            logits = decoder(latent)
        if kind in KINDS:
            logits.sum().backward()
    return counter.get_total_flops()


def nearest_flops(vectors: int, codes: int, channels: int) -> int:
    """Return the operations of the products of all vectors and codes."""
    return 2 * vectors * codes * channels
