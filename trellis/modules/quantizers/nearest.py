"""Nearest code: the index of the codebook entry closest to each vector.

The answer is defined in exact arithmetic, as the lowest index among the closest codes, so it depends neither
on the device nor on the batch. A matrix product in fp32 rules out all but a few codes per vector, using a bound on
its own rounding error; fp64 decides between the rest. On GPUs a kernel does this, `nearest_triton`; elsewhere it is
done in tiles that stay in the cache.

Axes: N vectors, K codes, D channels.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.launch import kernels_run

# Scores of one tile, in elements. On a CPU a tile stays near the cache; a GPU wants long rows of work.
TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
# Codes per block. Only blocks whose smallest score is low enough are looked at again.
BLOCK = 64
# Pairs of vector and code that fp64 compares at once.
PAIRS_AT_ONCE = 2**17


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code in Euclidean distance, the lowest on ties, as [N] int64.

    vectors: [N, D], codebook: [K, D], both used as float32. No [N, K] matrix exists: memory grows with the tile only.
    For a vector that is not finite, the index is undefined but lies in [0, K).
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(f"vectors {tuple(vectors.shape)} and codebook {tuple(codebook.shape)} must be [N, D], [K, D]")
    vectors, codebook = vectors.float(), codebook.float()
    if kernels_run(vectors):
        from .nearest_triton import nearest_code_cuda

        return nearest_code_cuda(vectors, codebook)
    with torch.autocast(vectors.device.type, enabled=False), _full_fp32():
        return _by_tiles(vectors, codebook)


def _by_tiles(vectors: Tensor, codebook: Tensor) -> Tensor:
    N, D = vectors.shape
    K = len(codebook)
    blocks = -(-K // BLOCK)
    # The error of a score, a sum of D + 1 products, is at most (D + 1)·u·(|z||e| + |e|²/2), in any order of summation
    # (Higham, Accuracy and Stability of Numerical Algorithms, Sec. 3.1), and so at most bound·(|z|²/2 + |e|²); four
    # more roundings cover the norms.
    bound = (D + 5) * 2.0**-24
    # A score is half the squared distance minus |z|²/2, minus the part of its error bound that depends on e.
    bias = ((0.5 - bound) * codebook.double().square().sum(1)).float()
    padding = blocks * BLOCK - K
    codes = torch.cat(
        [F.pad(-codebook, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=torch.inf)[:, None]], dim=1
    )
    vectors_and_one = F.pad(vectors, (0, 1), value=1.0)
    rows = max(1, TILE_ELEMENTS.get(vectors.device.type, 2**21) // (blocks * BLOCK))
    indices = torch.zeros(N, dtype=torch.int64, device=vectors.device)
    # One buffer for all tiles: the system would map freed and allocated memory again for each.
    buffer = torch.empty(blocks * BLOCK * min(rows, N), device=vectors.device)
    parts = zip(vectors.split(rows), vectors_and_one.split(rows), indices.split(rows), strict=True)
    for tile, tile_and_one, index in parts:
        # Codes by vectors: vector units are fast at a product of this shape and at a minimum over rows.
        scores = buffer[: len(codes) * len(tile)].view(len(codes), len(tile))
        scores = torch.mm(codes, tile_and_one.T, out=scores).view(blocks, BLOCK, len(tile))
        smallest_of_block = scores.amin(1)
        smallest = smallest_of_block.amin(0)
        # The nearest code's score exceeds the smallest by at most 2·bound·(|z|² + |e|²), e being the code of the
        # smallest. From |z·e| <= |z|² + |e|²/4 follows |e|² <= 4·(score + |z|²); 1.01 covers the roundings here.
        limit = smallest + 2.02 * bound * (5 * tile.square().sum(1) + 4 * smallest)
        block, vector = (smallest_of_block <= limit).nonzero(as_tuple=True)
        pair, member = (scores[block, :, vector] <= limit[vector, None]).nonzero(as_tuple=True)
        # The limit of a vector whose square overflows is infinite, as the scores of padding are.
        code = (block[pair] * BLOCK + member).clamp(max=K - 1)
        _decide(tile, codebook, vector[pair], code, index)
    return indices


def _decide(vectors: Tensor, codebook: Tensor, vector: Tensor, code: Tensor, index: Tensor) -> None:
    """Set index[v] to the nearest code, in fp64, among those paired with vector v, the lowest on ties.

    vector, code: [P] int64, the pairs.
    index: [N] int64; unchanged for a vector without a pair.
    """
    distance = torch.cat(
        [
            (vectors[v].double() - codebook[c].double()).square().sum(1)
            for v, c in zip(vector.split(PAIRS_AT_ONCE), code.split(PAIRS_AT_ONCE), strict=True)
        ]
    )
    best = distance.new_full((len(index),), torch.inf).scatter_reduce(0, vector, distance, "amin")
    tied = (distance == best[vector]).nonzero()[:, 0]
    index.scatter_reduce_(0, vector[tied], code[tied], "amin", include_self=False)


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """Run matrix products in full fp32, and restore the caller's TF32 setting after."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
