"""Nearest code: the index of the codebook entry closest to each vector.

The answer is defined in exact arithmetic, as the lowest index among the closest codes, so it depends neither
on the device nor on how many vectors come at once. A matrix product in fp32 rules out all but a few codes per
vector, using a bound on its own rounding; where more than one code is left, fp64 decides.

Axes: N vectors, K codes, D channels.
"""

import torch
from torch import Tensor

# Scores of one tile, in elements. On a CPU a tile stays near the cache; a GPU wants long rows of work.
TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
# Pairs of vector and code that fp64 decides at once.
PAIRS_AT_ONCE = 2**20


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in Euclidean distance, the lowest on ties.

    vectors: [N, D], codebook: [K, D], both used as float32. Returns [N] int64. No [N, K] matrix exists:
    memory grows with the tile only. A vector that is not finite gets an index without meaning.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(f"vectors {tuple(vectors.shape)} and codebook {tuple(codebook.shape)} must be [N, D], [K, D]")
    device = vectors.device.type
    with torch.autocast(device, enabled=False), _full_fp32():
        vectors, codebook = vectors.float(), codebook.float().contiguous()
        squared = codebook.double().square().sum(1)
        # |fl(z·e) - z·e| <= D·u·(|z|² + |e|²)/2 for any order of summation (Higham, Accuracy and Stability
        # of Numerical Algorithms, Sec. 3.1); four more roundings cover the norms and the subtraction.
        bound = (codebook.shape[1] + 4) * 2.0**-24
        lower_bias = (squared * (0.5 - bound)).float()
        rows = max(1, TILE_ELEMENTS.get(device, 2**19) // codebook.shape[0])
        indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for start in range(0, len(vectors), rows):
            tile = vectors[start : start + rows]
            # Half the squared distance less |z|²/2, and less the share of its error bound that depends on e.
            lower = torch.addmm(lower_bias, tile, codebook.T, alpha=-1)
            smallest, index = lower.min(1)
            slack = 2 * bound * (tile.square().sum(1) + squared[index].float())
            close = lower <= (smallest + slack)[:, None]
            undecided = (close.sum(1) > 1).nonzero()[:, 0]
            if len(undecided):
                index[undecided] = _decide(tile[undecided], codebook, close[undecided])
            indices[start : start + rows] = index
    return indices


def _decide(vectors: Tensor, codebook: Tensor, candidates: Tensor) -> Tensor:
    """Nearest candidate in fp64, the lowest index on ties. candidates: [n, K] bool, some in each row."""
    row, code = candidates.nonzero(as_tuple=True)
    distance = torch.cat(
        [
            (vectors[r].double() - codebook[c].double()).square().sum(1)
            for r, c in zip(row.split(PAIRS_AT_ONCE), code.split(PAIRS_AT_ONCE), strict=True)
        ]
    )
    best = distance.new_full((len(vectors),), torch.inf).scatter_reduce(0, row, distance, "amin")
    code = code.where(distance == best[row], len(codebook))
    return code.new_full((len(vectors),), len(codebook)).scatter_reduce(0, row, code, "amin")


class _full_fp32:
    """Matrix products in full fp32 inside, with the caller's TF32 setting restored after."""

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32 = self.before
