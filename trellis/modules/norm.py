"""Normalization, always computed in fp32.

Axes: B batch, C channels, X Y Z voxels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelLayerNorm32(nn.LayerNorm):
    """Layer norm over the channels of each voxel (arXiv:1607.06450), computed in fp32.

    x: [B, C, X, Y, Z] of any float dtype; the result has the same shape, dtype and memory format.
    """

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last_3d the two movedims are views, so nothing is copied.
        y = F.layer_norm(
            x.movedim(1, -1).float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype).movedim(-1, 1)


class GroupNorm32(nn.GroupNorm):
    """Group norm (arXiv:1803.08494), computed in fp32. x: [B, C, X, Y, Z] of any float dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def norm_layer(norm_type: str, channels: int) -> nn.Module:
    """Build the norm "layer" or "group" (32 groups). Raise ValueError for another name or channels that do not fit."""
    if norm_type == "layer":
        return ChannelLayerNorm32(channels)
    if norm_type == "group":
        if channels % 32:
            raise ValueError(f"norm_type 'group' uses 32 groups; {channels} channels do not divide by 32")
        return GroupNorm32(32, channels)
    raise ValueError(f"norm_type is {norm_type!r}; it must be 'layer' or 'group'")
