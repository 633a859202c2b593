"""How well grids are reconstructed and how well a codebook is used. Axes: B object, K code."""

import torch
from torch import Tensor


def voxel_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compare occupancy grids object by object.

    prediction: [B, ...] bool, or floating-point logits: occupied where logit > 0.
    target: same shape, bool or any number: occupied where > 0.
    Returns float32 [B] each: iou, precision, recall, exact (1 where every cell agrees, else 0). A ratio
    without a denominator is 1: two empty grids score 1 throughout, an empty prediction of a non-empty target
    has precision 1 and recall 0, a non-empty prediction of an empty target the reverse.
    Raises ValueError for differing shapes and for predictions that are neither bool nor floating-point.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}")
    if prediction.dtype != torch.bool and not prediction.is_floating_point():
        raise ValueError(f"prediction must be bool or floating-point logits, not {prediction.dtype}")
    predicted = (prediction > 0).flatten(1)
    occupied = (target > 0).flatten(1)
    hits = (predicted & occupied).sum(1)
    predictions, targets = predicted.sum(1), occupied.sum(1)
    union = predictions + targets - hits
    return {
        "iou": _ratio(hits, union),
        "precision": _ratio(hits, predictions),
        "recall": _ratio(hits, targets),
        "exact": (hits == union).float(),
    }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole as float32 [B], 1 where whole is 0. In float64: counts above 2^24 stay exact."""
    return torch.where(whole == 0, 1.0, part.double() / whole.clamp(min=1)).float()


def codebook_counts(indices: Tensor, n_embed: int) -> Tensor:
    """Count how often each code is chosen.

    indices: any shape, integer in [0, n_embed).
    Returns [K] int64; the counts of several batches or ranks may be added before the measures below.
    """
    chosen = indices.flatten()
    # torch.bincount would make the host wait for a GPU.
    return chosen.new_zeros(n_embed).scatter_add_(0, chosen, torch.ones_like(chosen))


def usage(counts: Tensor) -> float:
    """Return the share of codes chosen at least once, in [0, 1]. counts: [K]."""
    return (counts > 0).double().mean().item()


def entropy_bits(counts: Tensor) -> float:
    """Return the entropy of the chosen codes, bits per token in [0, log2 K], 0 without any. counts: [K]."""
    chosen = counts[counts > 0].double()
    probabilities = chosen / chosen.sum()
    return -(probabilities * probabilities.log2()).sum().item() + 0.0  # + 0.0: no minus zero


def perplexity(counts: Tensor) -> float:
    """Return 2^entropy: how many equally likely codes would carry as much, in [1, K]. counts: [K]."""
    return 2.0 ** entropy_bits(counts)
