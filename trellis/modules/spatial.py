"""Rearrangements between channels and voxels."""

from torch import Tensor


def voxel_shuffle_3d(x: Tensor, scale: int) -> Tensor:
    """Move the scale³ parts of each voxel's channels to voxels of their own.

    x: [B, scale³·C, X, Y, Z]; channel ((i·scale + j)·scale + k)·C + c goes to channel c at voxel offset (i, j, k).
    Returns [B, C, X·scale, Y·scale, Z·scale] in channels_last_3d.
    """
    B, C, X, Y, Z = x.shape
    C //= scale**3
    blocks = x.permute(0, 2, 3, 4, 1).reshape(B, X, Y, Z, scale, scale, scale, C)
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return blocks.reshape(B, X * scale, Y * scale, Z * scale, C).permute(0, 4, 1, 2, 3)
