"""Rearrangements between channels and voxels."""

from torch import Tensor


def voxel_shuffle_3d(x: Tensor, scale: int) -> Tensor:
    """Split each voxel's channels over scale³ voxels. Return [B, C, X·scale, Y·scale, Z·scale] in channels_last_3d.

    x: [B, scale³·C, X, Y, Z]; channel ((i·scale + j)·scale + k)·C + c goes to channel c at voxel offset (i, j, k).
    """
    B, C, X, Y, Z = x.shape
    C //= scale**3
    blocks = x.permute(0, 2, 3, 4, 1).reshape(B, X, Y, Z, scale, scale, scale, C)
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return blocks.reshape(B, X * scale, Y * scale, Z * scale, C).permute(0, 4, 1, 2, 3)
