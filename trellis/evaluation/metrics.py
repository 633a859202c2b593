"""How well grids are reconstructed, how well a codebook is used, and what a posterior costs.

Axes: B objects, X Y Z voxels (latent cells in `gaussian_kl_bits`), X' Y' Z' the lattice of tokens, L tokens of an
object, Q codes of a token, K codes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Voxels whose distances are found together; bounds the memory that dense wrong predictions take.
VOXELS_AT_ONCE = 2**16


def voxel_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compare occupancy grids object by object.

    Return float32 [B] each: iou, precision, recall, exact (1 if every voxel agrees, else 0). A ratio whose denominator
    is 0 is 1: two empty grids score 1 throughout; an empty prediction of a non-empty target has precision 1 and
    recall 0, a non-empty prediction of an empty target has precision 0 and recall 1.

    prediction: [B, ...] bool, or floating-point logits: occupied where logit > 0.
    target: same shape, bool or any number: occupied where > 0.
    Raise ValueError for differing shapes and for predictions that are neither bool nor floating-point.
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
    """Return both grids as bool. Raise ValueError as `voxel_metrics` does."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}")
    if prediction.dtype != torch.bool and not prediction.is_floating_point():
        raise ValueError(f"prediction must be bool or floating-point logits, not {prediction.dtype}")
    return prediction > 0, target > 0


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole as float32 [B], 1 where whole is 0. Divide in float64: counts above 2^24 stay exact."""
    return torch.where(whole == 0, 1.0, part.double() / whole.clamp(min=1)).float()


def distance_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Measure distances between the occupied voxels of two grids, object by object.

    Distances are Euclidean, between voxel centers, in voxels. Return float64 [B] each:
        chamfer: half the sum of two means: the distance of a predicted voxel to the nearest target voxel, and of a
            target voxel to the nearest predicted voxel.
        f_score: 2PR / (P + R), with P the share of predicted voxels at most one voxel from the target, and R the share
            of target voxels at most one voxel from the prediction (the same voxel, or one that shares a face).
    Two empty grids have chamfer 0 and f_score 1. If only one is empty, there is no nearest voxel: chamfer is then the
    grid's diagonal, the largest possible distance, and f_score 0.

    prediction: [B, 1, X, Y, Z] bool, or floating-point logits: occupied where logit > 0.
    target: same shape, bool or any number: occupied where > 0.
    Raise ValueError as `voxel_metrics` does, and for any other number of axes.
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
    diagonal = math.hypot(*(size - 1 for size in predicted.shape[1:]))
    return {
        "chamfer": torch.where(both, (distances[0] + distances[1]) / 2, torch.where(neither, 0.0, diagonal)),
        "f_score": torch.where(both, f_score, neither.double()),
    }


def _squared_distances(sites: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared distance of each wanted voxel to the nearest site, and 0 for other voxels.

    The result has integers of the same shape, exact; in a grid without a site, larger than any distance.

    A squared distance is the smallest sum of squared offsets along x, y and z, so it is found axis by axis (as in
    Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012): along x from neighbor to neighbor, along y with
    offsets up to a window, along z for the wanted voxels alone. Sites beyond the window are at least window + 1 away,
    so a result up to (window + 1)² is final; the few voxels with a larger one are done again with twice the window.

    sites, wanted: [B, X, Y, Z] bool.
    """
    _, X, Y, Z = sites.shape
    far = int(math.hypot(X - 1, Y - 1, Z - 1)) + 1
    # Half the memory traffic where sums fit, which is up to 64 voxels along an axis and somewhat beyond.
    dtype = torch.int16 if far**2 + max(Y, Z) ** 2 < 2**15 else torch.int32
    along_x = (~sites).to(dtype) * far
    for step, order in ((1, range(1, X)), (-1, range(X - 2, -1, -1))):
        for x in order:
            torch.minimum(along_x[:, x], along_x[:, x - step] + 1, out=along_x[:, x])
    along_x = along_x.square()

    result = torch.zeros(sites.shape, dtype=dtype, device=sites.device)
    steps = torch.arange(Z, device=sites.device)
    voxels, window = wanted.nonzero(), min(2, Y - 1)  # [N, 4]
    while len(voxels):
        grids, grid = voxels[:, 0].unique(return_inverse=True)
        near = along_x[grids]
        nearest = near.clone()
        for y in range(1, window + 1):
            for after, before in ((slice(y, None), slice(None, -y)), (slice(None, -y), slice(y, None))):
                torch.minimum(nearest[:, :, after], near[:, :, before] + y**2, out=nearest[:, :, after])
        found = torch.cat(
            [
                (nearest[part[:, 0], part[:, 1], part[:, 2]] + (part[:, 3:] - steps).to(dtype).square()).amin(1)
                for part in torch.cat([grid[:, None], voxels[:, 1:]], 1).split(VOXELS_AT_ONCE)
            ]
        )
        final = (found <= (window + 1) ** 2) | (window == Y - 1)
        result[voxels[final].unbind(1)] = found[final]
        voxels, window = voxels[~final], min(2 * window, Y - 1)
    return result


def codebook_counts(indices: Tensor, n_embed: int, codes_per_token: int = 1) -> Tensor:
    """Count how often each code is chosen. Return [K] int64, or [Q, K] with several codes per token.

    Counts of several batches or ranks may be added before the measures below.
    indices: integers in [0, n_embed) of any shape, or [..., Q] with Q = codes_per_token above 1.
    """
    if codes_per_token > 1:
        return object_counts(indices.reshape(1, -1, codes_per_token), n_embed)[0]
    return object_counts(indices.reshape(1, -1, 1), n_embed)[0, 0]


def object_counts(indices: Tensor, n_embed: int, chosen: Tensor | None = None) -> Tensor:
    """Count how often each object's tokens choose each code. Return [B, Q, K] int64.

    indices: [B, L, Q], integers in [0, n_embed).
    chosen: [B, L] bool, the tokens that count; None for all.
    """
    B, L, Q = indices.shape
    columns = indices + n_embed * torch.arange(Q, device=indices.device)
    weights = torch.ones_like(columns) if chosen is None else chosen.long()[:, :, None].expand(B, L, Q)
    counts = indices.new_zeros(B, Q * n_embed, dtype=torch.int64)
    # torch.bincount would make the host wait for a GPU.
    return counts.scatter_add_(1, columns.flatten(1), weights.flatten(1)).view(B, Q, n_embed)


def usage(counts: Tensor) -> float:
    """Return the share of codes chosen at least once, in [0, 1]. counts: [K], or [Q, K] for Q·K codes."""
    return (counts > 0).double().mean().item()


def code_entropy(counts: Tensor) -> Tensor:
    """Return the entropy of chosen codes in bits, float64 [...] in [0, log2 K]; 0 if all counts are 0.

    counts: [..., K].
    """
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1) / math.log(2) + 0.0  # + 0.0: no minus zero


def entropy_bits(counts: Tensor) -> float:
    """Return the entropy of chosen codes in bits per token, in [0, Q log2 K]; 0 if all counts are 0.

    counts: [K] or [Q, K]. The entropies of a token's Q codes are added, as if the codes were independent.
    """
    return code_entropy(counts).sum().item()


def perplexity(counts: Tensor) -> float:
    """Return 2^entropy: the number of equally likely codes with the same entropy, in [1, K].

    counts: [K], or [Q, K] for the geometric mean over the Q codes of a token.
    """
    return 2.0 ** code_entropy(counts).mean().item()


def gaussian_kl_bits(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL of N(mean, exp(logvar)) from N(0, 1) for each latent cell, in bits (arXiv:1312.6114, appendix B).

    It is the expected code length of a posterior sample under the prior. The result is [B, X, Y, Z] float64, summed
    over channels.
    mean, logvar: [B, C, X, Y, Z].
    """
    mean, logvar = mean.double(), logvar.double()
    return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).sum(1) / math.log(2)


def occupied_blocks(ss: Tensor, lattice: Sequence[int]) -> Tensor:
    """Return whether each of X'·Y'·Z' equal blocks of a grid has an occupied voxel, [B, X', Y', Z'] bool.

    ss: [B, 1, R, R, R], occupied where > 0.
    lattice: (X', Y', Z'), divisors of R.
    """
    block = [size // blocks for size, blocks in zip(ss.shape[2:], lattice, strict=True)]
    return F.max_pool3d((ss > 0).float(), block)[:, 0] > 0


def octree_masks(occupied: Tensor) -> Tensor:
    """Count the masks of an octree over each object's tokens, [B, 255] int64: column m - 1 for mask m.

    The root is the smallest cube of 2^n tokens along an axis that holds the lattice. Each node above the tokens that
    has an occupied one is written as a mask, which says which of its eight children have one. An object without
    occupied tokens has no mask.

    occupied: [B, X', Y', Z'] bool.
    """
    side = 1 << (max(occupied.shape[1:]) - 1).bit_length()
    nodes = F.pad(occupied, [n for size in reversed(occupied.shape[1:]) for n in (0, side - size)])
    counts = torch.zeros(len(nodes), 256, dtype=torch.int64, device=nodes.device)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=nodes.device)
    while nodes.shape[1] > 1:
        half = nodes.shape[1] // 2
        children = nodes.view(-1, half, 2, half, 2, half, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        masks = (children * bits).sum(-1).flatten(1)
        counts.scatter_add_(1, masks, torch.ones_like(masks))
        nodes = children.any(-1)
    return counts[:, 1:]


def narrow_gaps(ss: Tensor) -> Tensor:
    """Return the number of narrow gaps per occupied voxel, float64 [B]; 0 without one.

    A narrow gap is an empty voxel between two occupied ones along x, y or z. Thin structure in the grid of a surface
    has many: the walls of a thin plate or tube are one voxel apart.

    ss: [B, 1, R, R, R], occupied where > 0.
    """
    occupied = ss[:, 0] > 0
    gaps = torch.zeros_like(occupied)
    for axis in (1, 2, 3):
        inner = gaps.narrow(axis, 1, gaps.shape[axis] - 2)
        inner |= occupied.narrow(axis, 0, inner.shape[axis]) & occupied.narrow(axis, 2, inner.shape[axis])
    gaps &= ~occupied
    return gaps.flatten(1).sum(1).double() / occupied.flatten(1).sum(1).clamp(min=1)
