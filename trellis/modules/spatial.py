"""Rearrangements between channels and voxels."""

from torch import Tensor


def pixel_shuffle_3d(x: Tensor, scale: int) -> Tensor:
    """Move blocks of scale³ channels into space, the 3-D form of arXiv:1609.05158.

    x: [B, C·scale³, X, Y, Z]; channel c·scale³ + (i·scale + j)·scale + k goes to voxel offset (i, j, k).
    Returns [B, C, X·scale, Y·scale, Z·scale] in the memory format of x.
    """
    B, C, X, Y, Z = x.shape
    C //= scale**3
    blocks = x.reshape(B, C, scale, scale, scale, X, Y, Z)
    # Channels stay last while the data moves, so channels_last_3d in gives channels_last_3d out.
    blocks = blocks.permute(0, 5, 2, 6, 3, 7, 4, 1)
    return blocks.reshape(B, X * scale, Y * scale, Z * scale, C).permute(0, 4, 1, 2, 3)
