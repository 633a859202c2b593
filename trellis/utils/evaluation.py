"""Reconstruction quality over a dataset, for training's validation and for scripts/evaluate.py.

Axes: B batch, n objects, R voxels along an axis, K codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import entropy_bits, perplexity, usage, voxel_metrics


class Reconstruction(NamedTuple):
    """What models make of a batch of grids; the last three are None without a codebook."""

    logits: Tensor  # [B, 1, R, R, R]
    indices: Tensor | None = None  # [B, ...] int64 tokens
    counts: Tensor | None = None  # [K] int64, how often each code was chosen
    quantization_error: Tensor | None = None  # [B], mean squared distance of latents from their codes


@dataclass
class Scores:
    """objects: {metric: [n] float64} in the order of the indices given. counts: [K] int64 over all of them,
    tokens: per object; both None without a codebook."""

    objects: dict[str, Tensor]
    counts: Tensor | None = None
    tokens: int | None = None

    def means(self, all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """Mean of each metric, and what the codebook does over all objects.

        all_sum: adds up a tensor over ranks, each of which has scored a share of the objects.
        """
        sums = torch.stack([value.sum() for value in self.objects.values()])
        number = all_sum(torch.tensor(float(self.number), dtype=torch.float64, device=sums.device))
        means = dict(zip(self.objects, (all_sum(sums) / number).tolist(), strict=True))
        if self.counts is not None:
            means.update(codebook_scores(all_sum(self.counts), self.tokens))
        return means

    @property
    def number(self) -> int:
        return len(self.objects["iou"])


def codebook_scores(counts: Tensor, tokens: int) -> dict[str, float]:
    """Usage, perplexity and bits per object, as tokens·log2 K and as tokens·entropy. counts: [K]."""
    return {
        "codebook_usage": usage(counts),
        "codebook_perplexity": perplexity(counts),
        "bits_per_object": tokens * math.log2(len(counts)),
        "entropy_bits_per_object": tokens * entropy_bits(counts),
    }


@torch.no_grad()
def evaluate(
    reconstruct: Callable[[Tensor], Reconstruction],
    dataset,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Reconstruct the objects of a dataset at these indices and score each.

    reconstruct: from grids [B, 1, R, R, R] on the device. progress: called with the objects done so far.
    """
    parts: dict[str, list[Tensor]] = {}
    counts, tokens = None, None
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        ss = torch.stack([dataset[i]["ss"] for i in batch]).to(device)
        result = reconstruct(ss)
        scores = voxel_metrics(result.logits, ss)
        if result.counts is not None:
            counts = result.counts if counts is None else counts + result.counts
            tokens = result.indices[0].numel()
            scores["quantization_error"] = result.quantization_error
        for name, value in scores.items():
            parts.setdefault(name, []).append(value.double())
        progress(min(start + batch_size, len(indices)))
    return Scores({name: torch.cat(values) for name, values in parts.items()}, counts, tokens)
