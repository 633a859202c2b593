"""How well grids are reconstructed, how well a codebook is used, and what a posterior costs.

Axes: B object, X Y Z cells, T tokens of an object, Q codes of a token, K code.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Voxels whose distances are found together, so that dense wrong predictions take no more memory than others.
CELLS_AT_ONCE = 2**16


def voxel_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compare occupancy grids object by object.

    prediction: [B, ...] bool, or floating-point logits: occupied where logit > 0.
    target: same shape, bool or any number: occupied where > 0.
    Returns float32 [B] each: iou, precision, recall, exact (1 where every cell agrees, else 0). A ratio
    without a denominator is 1: two empty grids score 1 throughout, an empty prediction of a non-empty target
    has precision 1 and recall 0, a non-empty prediction of an empty target the reverse.
    Raises ValueError for differing shapes and for predictions that are neither bool nor floating-point.
    """
    predicted, occupied = (grid.flatten(1) for grid in _occupied(prediction, target))
    hits = (predicted & occupied).sum(1)
    predictions, targets = predicted.sum(1), occupied.sum(1)
    union = predictions + targets - hits
    return {
        "iou": _ratio(hits, union),
        "precision": _ratio(hits, predictions),
        "recall": _ratio(hits, targets),
        "exact": (hits == union).float(),
    }


def _occupied(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as bool. Raises ValueError as `voxel_metrics` says."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}")
    if prediction.dtype != torch.bool and not prediction.is_floating_point():
        raise ValueError(f"prediction must be bool or floating-point logits, not {prediction.dtype}")
    return prediction > 0, target > 0


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole as float32 [B], 1 where whole is 0. In float64: counts above 2^24 stay exact."""
    return torch.where(whole == 0, 1.0, part.double() / whole.clamp(min=1)).float()


def distance_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How far apart the occupied voxels of two grids are, object by object. Distances are Euclidean, between
    centres of voxels, in voxels.

    prediction: [B, 1, X, Y, Z] bool, or floating-point logits: occupied where logit > 0.
    target: same shape, bool or any number: occupied where > 0.
    Returns float64 [B] each:
        chamfer: the mean over predicted voxels of the distance to the nearest voxel of the target, plus the mean
            over the target's voxels of the distance to the nearest predicted one, halved.
        f_score: 2PR / (P + R), with P the share of predicted voxels at most one voxel from the target, and R the
            share of the target's voxels at most one voxel from the prediction (a voxel and the six that share a
            face with it).
    Two empty grids have chamfer 0 and f_score 1. Where only one is empty, there is no nearest voxel: chamfer is
    then the grid's diagonal, the largest distance that there can be, and f_score 0.
    Raises ValueError as `voxel_metrics` does, and for other than five axes.
    """
    predicted, occupied = _occupied(prediction, target)
    if prediction.ndim != 5:
        raise ValueError(f"grids must be [B, 1, X, Y, Z], not {list(prediction.shape)}")
    predicted, occupied = predicted.flatten(0, 1), occupied.flatten(0, 1)
    some = [grid.flatten(1).any(1) for grid in (predicted, occupied)]
    both, neither = some[0] & some[1], ~(some[0] | some[1])

    distances, shares = [], []
    for points, others in ((predicted, occupied), (occupied, predicted)):
        apart = points & ~others & both[:, None, None, None]  # a voxel of both is at distance 0
        squared = _squared_distances(others, apart).flatten(1)
        number = points.flatten(1).sum(1)
        distances.append(squared.float().sqrt().sum(1, dtype=torch.float64) / number)
        shares.append((number - (squared > 1).sum(1)).double() / number)
    f_score = 2 * shares[0] * shares[1] / (shares[0] + shares[1]).clamp(min=torch.finfo(torch.float64).tiny)
    diagonal = math.hypot(*(cells - 1 for cells in predicted.shape[1:]))
    return {
        "chamfer": torch.where(both, (distances[0] + distances[1]) / 2, torch.where(neither, 0.0, diagonal)),
        "f_score": torch.where(both, f_score, neither.double()),
    }


def _squared_distances(sites: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of the wanted cells to the nearest site, and 0 elsewhere. sites, wanted: [B, X, Y, Z] bool.
    Returns integers of the same shape, exact; in a grid without a site, larger than any distance.

    A squared distance is the smallest sum of squared offsets along x, y and z, so it is found axis by axis (as in
    Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012): along x from neighbour to neighbour, along y with
    offsets up to a window, along z for the wanted cells alone. Sites beyond the window are more than that far away,
    so a result up to (window + 1)² is final; the few cells with a larger one are done again with twice the window.
    """
    _, X, Y, Z = sites.shape
    far = int(math.hypot(X - 1, Y - 1, Z - 1)) + 1
    # Half the memory traffic where sums fit, which is up to 64 cells along an axis and somewhat beyond.
    dtype = torch.int16 if far**2 + max(Y, Z) ** 2 < 2**15 else torch.int32
    along_x = (~sites).to(dtype) * far
    for step, places in ((1, range(1, X)), (-1, range(X - 2, -1, -1))):
        for x in places:
            torch.minimum(along_x[:, x], along_x[:, x - step] + 1, out=along_x[:, x])
    along_x = along_x.square()

    result = torch.zeros(sites.shape, dtype=dtype, device=sites.device)
    steps = torch.arange(Z, device=sites.device)
    cells, window = wanted.nonzero(), min(2, Y - 1)  # [N, 4]
    while len(cells):
        grids, grid = cells[:, 0].unique(return_inverse=True)
        near = along_x[grids]
        nearest = near.clone()
        for y in range(1, window + 1):
            for after, before in ((slice(y, None), slice(None, -y)), (slice(None, -y), slice(y, None))):
                torch.minimum(nearest[:, :, after], near[:, :, before] + y**2, out=nearest[:, :, after])
        found = torch.cat(
            [
                (nearest[part[:, 0], part[:, 1], part[:, 2]] + (part[:, 3:] - steps).to(dtype).square()).amin(1)
                for part in torch.cat([grid[:, None], cells[:, 1:]], 1).split(CELLS_AT_ONCE)
            ]
        )
        final = (found <= (window + 1) ** 2) | (window == Y - 1)
        result[cells[final].unbind(1)] = found[final]
        cells, window = cells[~final], min(2 * window, Y - 1)
    return result


def codebook_counts(indices: Tensor, n_embed: int, codes_per_token: int = 1) -> Tensor:
    """Count how often each code is chosen.

    indices: integers in [0, n_embed) of any shape, or [..., Q] with Q = codes_per_token above 1.
    Returns [K] int64, or [Q, K]; the counts of several batches or ranks may be added before the measures below.
    """
    if codes_per_token > 1:
        return object_counts(indices.reshape(1, -1, codes_per_token), n_embed)[0]
    return object_counts(indices.reshape(1, -1, 1), n_embed)[0, 0]


def object_counts(indices: Tensor, n_embed: int, chosen: Tensor | None = None) -> Tensor:
    """Count how often each object's tokens choose each code.

    indices: [B, T, Q], integers in [0, n_embed). chosen: [B, T] bool, the tokens that count; default all.
    Returns [B, Q, K] int64.
    """
    B, T, Q = indices.shape
    places = indices + n_embed * torch.arange(Q, device=indices.device)
    weights = torch.ones_like(places) if chosen is None else chosen.long()[:, :, None].expand(B, T, Q)
    counts = indices.new_zeros(B, Q * n_embed, dtype=torch.int64)
    # torch.bincount would make the host wait for a GPU.
    return counts.scatter_add_(1, places.flatten(1), weights.flatten(1)).view(B, Q, n_embed)


def usage(counts: Tensor) -> float:
    """Return the share of codes chosen at least once, in [0, 1]. counts: [K], or [Q, K]: Q·K codes."""
    return (counts > 0).double().mean().item()


def code_entropy(counts: Tensor) -> Tensor:
    """Return the entropy of chosen codes in bits, in [0, log2 K], 0 without any. counts: [..., K]. float64 [...]."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1) / math.log(2) + 0.0  # + 0.0: no minus zero


def entropy_bits(counts: Tensor) -> float:
    """Return the entropy of the chosen codes, bits per token in [0, Q log2 K], 0 without any. counts: [K] or
    [Q, K]; the entropies of a token's Q codes add up, as if they were independent."""
    return code_entropy(counts).sum().item()


def perplexity(counts: Tensor) -> float:
    """Return 2^entropy: how many equally likely codes would carry as much, in [1, K]. counts: [K], or [Q, K]: the
    geometric mean over the Q codes of a token."""
    return 2.0 ** code_entropy(counts).mean().item()


def gaussian_kl_bits(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1) of each latent cell, in bits (arXiv:1312.6114, appendix B). It is what
    a sample of the posterior costs on average to one who knows the prior.

    mean, logvar: [B, C, X, Y, Z]. Returns [B, X, Y, Z] float64, sums over channels.
    """
    mean, logvar = mean.double(), logvar.double()
    return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).sum(1) / math.log(2)


def occupied_blocks(ss: Tensor, lattice: Sequence[int]) -> Tensor:
    """Whether a voxel is occupied in each of X'·Y'·Z' equal blocks of a grid. ss: [B, 1, R, R, R], occupied where
    > 0; lattice: (X', Y', Z'), divisors of R. Returns [B, X', Y', Z'] bool."""
    block = [cells // blocks for cells, blocks in zip(ss.shape[2:], lattice, strict=True)]
    return F.max_pool3d((ss > 0).float(), block)[:, 0] > 0
