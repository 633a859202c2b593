"""The convolutional VAE of TRELLIS sparse structures (arXiv:2412.01506, Sec. 3.3 and appendix).

The encoder maps an R³ binary occupancy grid to an (R/4)³ latent (with three levels of channels), and the decoder maps
this to logits. Module names and shapes match the published weights, which load unchanged.

Axes: B batch, C channels, X Y Z voxels.
"""

import contextlib
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ..modules import fused
from ..modules.blocks3d import DownsampleBlock3d, ResBlock3d, UpsampleBlock3d
from ..modules.conv import Conv3d
from ..modules.model import Model
from ..modules.norm import ChannelLayerNorm32, norm_layer
from ..utils.config import Count, Range
from ..utils.errors import ConfigError

MAX_LEVELS = 16  # of channels; a grid of that many can be halved no further


class _UNet(Model):
    """The part that the encoder and the decoder share: which layers may run in reduced precision.

    The first and the last layer always sum in fp32, so that latents and logits are fp32. The torso between them runs
    in the caller's autocast, or in fp16 on a GPU with `use_fp16`. Around a reduced torso, a GPU's kernels round the
    factors of a last layer of one channel to half precision and tf32.
    """

    use_fp16: bool
    input_layer: Conv3d
    out_layer: nn.Sequential  # norm, SiLU, convolution

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def convert_to_fp16(self) -> None:
        """Run the torso in fp16 if the input is on a GPU; parameters stay in fp32. For TRELLIS's callers."""
        self.use_fp16 = True

    def convert_to_fp32(self) -> None:
        """Leave the torso's precision to the caller: plain fp32, or the caller's autocast."""
        self.use_fp16 = False

    def _run(self, x: Tensor, *torso: nn.ModuleList | nn.Sequential) -> Tensor:
        fp16 = self.use_fp16 and x.is_cuda
        with torch.autocast("cuda", torch.float16) if fp16 else contextlib.nullcontext():
            h = self._first(x.float())
            for stage in torso:
                for block in stage:
                    h = block(h)
            return self._last(h)

    def _first(self, x: Tensor) -> Tensor:
        if fused.usable(x):
            return fused.first_layer(x, self.input_layer)
        with torch.autocast(x.device.type, enabled=False):
            h = self.input_layer(x)
        return h.to(fused.working_dtype(h))

    def _last(self, h: Tensor) -> Tensor:
        norm, _, convolution = self.out_layer
        if fused.usable(h) and isinstance(norm, ChannelLayerNorm32) and isinstance(convolution, Conv3d):
            return fused.last_layer(h, norm, convolution)
        with torch.autocast(h.device.type, enabled=False):
            return self.out_layer(h.float())


class SparseStructureEncoder(_UNet):
    """Occupancy grid to latent. Raise ValueError for channels without a level, or with too many."""

    def __init__(
        self,
        in_channels: Count,  # of the grid; 1 in the published weights
        latent_channels: Count,  # 8 in the published weights
        num_res_blocks: Count,  # residual blocks per level
        channels: list[Count],  # width of each level; every level but the last halves the grid
        num_res_blocks_middle: Annotated[int, Range(min=0)] = 2,  # residual blocks after the levels
        norm_type: Literal["layer", "group"] = "layer",  # the norm before the last convolution
        use_fp16: bool = False,  # run the torso in fp16 on a GPU
    ):
        super().__init__()
        _check_levels(channels)
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.channels, self.use_fp16 = list(channels), use_fp16

        self.input_layer = Conv3d(in_channels, channels[0])
        self.blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.blocks.extend(ResBlock3d(width) for _ in range(num_res_blocks))
            if level + 1 < len(channels):
                self.blocks.append(DownsampleBlock3d(width, channels[level + 1]))
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[-1]) for _ in range(num_res_blocks_middle)))
        self.out_layer = nn.Sequential(
            norm_layer(norm_type, channels[-1]),
            nn.SiLU(),
            Conv3d(channels[-1], latent_channels * 2),
        )

    @property
    def downsampling(self) -> int:
        """Voxels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1)

    def forward(
        self, x: Tensor, sample_posterior: bool = False, return_raw: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return z, or (z, mean, logvar) with `return_raw`, each [B, latent_channels, R/d, R/d, R/d].

        x: [B, in_channels, R, R, R] float, 0 or 1. d is `downsampling`. z is the mean, or with `sample_posterior` a
        sample of the posterior.
        """
        mean, logvar = self._run(x, self.blocks, self.middle_block).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if sample_posterior else mean
        return (z, mean, logvar) if return_raw else z


class SparseStructureDecoder(_UNet):
    """Latent to occupancy logits. Raise ValueError for channels without a level, or with too many."""

    def __init__(
        self,
        out_channels: Count,  # of the grid; 1 in the published weights
        latent_channels: Count,  # 8 in the published weights
        num_res_blocks: Count,  # residual blocks per level
        channels: list[Count],  # width of each level, from coarse to fine; every level but the last doubles the grid
        num_res_blocks_middle: Annotated[int, Range(min=0)] = 2,  # residual blocks before the levels
        norm_type: Literal["layer", "group"] = "layer",  # the norm before the last convolution
        use_fp16: bool = False,  # run the torso in fp16 on a GPU
    ):
        super().__init__()
        _check_levels(channels)
        self.out_channels, self.latent_channels = out_channels, latent_channels
        self.channels, self.use_fp16 = list(channels), use_fp16

        self.input_layer = Conv3d(latent_channels, channels[0])
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[0]) for _ in range(num_res_blocks_middle)))
        self.blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.blocks.extend(ResBlock3d(width) for _ in range(num_res_blocks))
            if level + 1 < len(channels):
                self.blocks.append(UpsampleBlock3d(width, channels[level + 1]))
        self.out_layer = nn.Sequential(
            norm_layer(norm_type, channels[-1]),
            nn.SiLU(),
            Conv3d(channels[-1], out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, out_channels, R, R, R] of x [B, latent_channels, r, r, r]; > 0 means occupied."""
        return self._run(x, self.middle_block, self.blocks)


def _check_levels(channels: list[int]) -> None:
    if not 1 <= len(channels) <= MAX_LEVELS:
        raise ValueError(f"channels has {len(channels)} levels; give the widths of 1 to {MAX_LEVELS}")


def check_networks(encoder: nn.Module, decoder: nn.Module) -> None:
    """Raise ConfigError unless these are an encoder and a decoder of the same grids and latents."""
    if not isinstance(encoder, SparseStructureEncoder):
        raise ConfigError(
            f"models.encoder.name is {type(encoder).__name__!r}, which is not an encoder; use SparseStructureEncoder"
        )
    if not isinstance(decoder, SparseStructureDecoder):
        raise ConfigError(
            f"models.decoder.name is {type(decoder).__name__!r}, which is not a decoder; use SparseStructureDecoder"
        )
    if encoder.in_channels != 1 or decoder.out_channels != 1:
        raise ConfigError(
            f"models.encoder.args.in_channels is {encoder.in_channels} and models.decoder.args.out_channels is "
            f"{decoder.out_channels}, but an occupancy grid has one channel; set both to 1"
        )
    if decoder.latent_channels != encoder.latent_channels:
        raise ConfigError(
            f"models.decoder.args.latent_channels is {decoder.latent_channels}, but the encoder's latent has "
            f"{encoder.latent_channels} channels; set it to {encoder.latent_channels}"
        )
    if len(decoder.channels) != len(encoder.channels):
        raise ConfigError(
            f"models.decoder.args.channels has {len(decoder.channels)} levels, but the encoder's has "
            f"{len(encoder.channels)}; a grid keeps its size only with as many levels in both"
        )
