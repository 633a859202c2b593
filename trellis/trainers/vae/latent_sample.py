"""Latent vectors that a fresh codebook is made from.

Nine tenths of the tokens are empty and much alike. Codes that k-means spends on them are missing at the surface, so
the sample is stratified: an equal share of each object, and mostly tokens with occupied voxels. Some empty tokens stay,
since the decoder needs codes for the ones near the surface; with an empty code none do.

Axes: B objects, C latent channels, X Y Z latent cells, R voxels along an axis, L tokens of an object, D channels of a
token, N vectors.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...evaluation.metrics import occupied_blocks
from ...modules.quantizers.base import Quantizer
from ...utils.random_utils import permutation

# A code should stand for this many vectors, so that k-means fits the data and not its sample.
VECTORS_PER_CODE = 128
# And the vectors should come from at least this many objects, since neighboring cells of one object are alike.
OBJECTS_AT_LEAST = 256
# Share of empty tokens in the sample; the others hold occupied voxels.
EMPTY_SHARE = 1 / 4
# Largest number of elements in the sample, 1 GiB, whatever the codebook's size.
LARGEST_SAMPLE = 2**28


@torch.no_grad()
def latent_sample(
    latents_of: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    order: np.ndarray,
    quantizer: Quantizer,
    *,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Return a stratified sample of latent vectors of the training data, [N, D] float32, fixed by the seed.

    latents_of: returns latents [B, C, X, Y, Z] and grids [B, 1, R, R, R] of objects [B] int64.
    order: objects to take them from, the first ones first, [n] int64; one may stand in it several times.
    batch_size: objects at once.
    Small data give fewer than VECTORS_PER_CODE vectors per code: all with occupied voxels, and a share of the others.
    """
    empty_share = 0.0 if quantizer.empty_code else EMPTY_SHARE
    wanted = min(VECTORS_PER_CODE * quantizer.codebook_size, LARGEST_SAMPLE // quantizer.embed_dim)
    wanted_occupied = round((1 - empty_share) * wanted)
    most = -(-wanted_occupied // min(OBJECTS_AT_LEAST, len(order)))  # occupied tokens of an object
    vectors, found = [], 0
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        z, ss = latents_of(part)
        tokens = quantizer.to_vectors(z.float())
        filled = occupied_blocks(ss, tokens.shape[1:4])
        for number, own, occupied in zip(part.tolist(), tokens.flatten(1, 3), filled.flatten(1), strict=True):
            shuffled = torch.from_numpy(permutation(len(own), "kmeans", seed, number)).to(own.device)
            inside = shuffled[occupied[shuffled]][:most]
            outside = shuffled[~occupied[shuffled]][: round(len(inside) * empty_share / (1 - empty_share))]
            vectors.append(own[torch.cat([inside, outside])])
            found += len(inside)
            if found >= wanted_occupied:
                return torch.cat(vectors)
    return torch.cat(vectors)
