"""The symmetries of the cube on voxel grids: rotations by quarter turns and reflections along the axes.

Each maps voxels to voxels, so nothing is interpolated and no voxel is gained or lost.
"""

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..utils.random_utils import derive_seed

Augmentation = Literal["none", "z", "all"]


class Symmetry(NamedTuple):
    """Axis a of the result is axis `axes[a]` of the grid, reversed if `mirrored[a]`."""

    axes: tuple[int, int, int]
    mirrored: tuple[bool, bool, bool]

    def __call__(self, grids: Tensor) -> Tensor:
        """Apply the symmetry to grids [..., R, R, R], axes x y z. The memory layout of the result may differ."""
        turned = grids.movedim([axis - 3 for axis in self.axes], [-3, -2, -1])
        return turned.flip([axis - 3 for axis in range(3) if self.mirrored[axis]])


_ALL = tuple(
    Symmetry((i, j, k), (x, y, z))
    for i, j, k in itertools.permutations(range(3))
    for x, y, z in itertools.product((False, True), repeat=3)
)
# "z" keeps the z axis and its direction, for objects with an up: four rotations about it, with and without a mirror.
SYMMETRIES: dict[Augmentation, tuple[Symmetry, ...]] = {
    "none": _ALL[:1],
    "z": tuple(symmetry for symmetry in _ALL if symmetry.axes[2] == 2 and not symmetry.mirrored[2]),
    "all": _ALL,
}


def symmetry_of(augmentation: Augmentation, seed: int, sample_id: int) -> Symmetry:
    """Draw one of SYMMETRIES[augmentation], each equally likely, as a function of (seed, sample_id)."""
    choices = SYMMETRIES[augmentation]
    return choices[derive_seed("symmetry", seed, sample_id) % len(choices)]


def augment_grids(grids: Tensor, augmentation: Augmentation, seed: int, sample_ids: Tensor) -> Tensor:
    """Apply to each grid the symmetry of its sample. Does not wait for a GPU.

    grids: [B, 1, R, R, R], on any device.
    sample_ids: [B] int64 on the CPU, the running number of each sample since training began.
    Return new grids of the same shape, contiguous.
    """
    augmented = torch.empty_like(grids, memory_format=torch.contiguous_format)
    for row, grid, sample_id in zip(augmented, grids, sample_ids.tolist(), strict=True):
        row.copy_(symmetry_of(augmentation, seed, sample_id)(grid))
    return augmented
