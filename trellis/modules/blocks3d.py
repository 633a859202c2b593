"""The three blocks of the sparse-structure U-Net. Parameter names match the published weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .conv import Conv3d, conv3d
from .norm import ChannelLayerNorm32
from .spatial import voxel_shuffle_3d


class ResBlock3d(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv plus the input; the second conv starts at zero (arXiv:1512.03385).

    The published models always use layer norm here, whatever their `norm_type` says.
    """

    def __init__(self, channels: int, out_channels: int | None = None):
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = ChannelLayerNorm32(channels)
        self.norm2 = ChannelLayerNorm32(out_channels)
        self.conv1 = Conv3d(channels, out_channels)
        self.conv2 = Conv3d(out_channels, out_channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if fused.usable(x) and isinstance(self.skip_connection, nn.Identity):
            return fused.residual_block(x, self.norm1, self.conv1, self.norm2, self.conv2)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip_connection(x)


class DownsampleBlock3d(nn.Module):
    """Halve each axis: [B, C, X, Y, Z] -> [B, C', X/2, Y/2, Z/2] by a 2³ convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpsampleBlock3d(nn.Module):
    """Double each axis: a 3³ convolution to 8·C' channels, then the pixel shuffle (arXiv:1609.05158).

    Channel 8·c + s of the convolution goes to channel c of the s-th of eight voxels. Its weight is reordered so that
    it computes them in the order s, c, and the shuffle moves whole voxels.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels * 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.unflatten(0, (-1, 8)).transpose(0, 1).flatten(0, 1)
        bias = self.conv.bias.view(-1, 8).t().flatten()
        return voxel_shuffle_3d(conv3d(x, weight.contiguous(memory_format=torch.channels_last_3d), bias), 2)
