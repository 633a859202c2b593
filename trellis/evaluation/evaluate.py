"""Reconstruction quality over a dataset, for training's validation and for scripts/evaluate.py.

Axes: B batch, n objects, R voxels along an axis, X Y Z latent cells, X' Y' Z' tokens, Q codes of a token, K codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .metrics import (
    code_entropy,
    distance_metrics,
    entropy_bits,
    object_counts,
    occupied_blocks,
    perplexity,
    usage,
    voxel_metrics,
)

# Latent cells along z that a token of ShapeLLM-Omni stands for: the KL of as many is what its id compares with.
CELLS_PER_GROUP = 4


class Reconstruction(NamedTuple):
    """What models make of a batch of grids. Without a codebook the next three are None, without a sample of the
    posterior the last two."""

    logits: Tensor  # [B, 1, R, R, R]
    indices: Tensor | None = None  # [B, X', Y', Z'] int64 tokens, or [B, X', Y', Z', Q]
    counts: Tensor | None = None  # [K] int64, or [Q, K]: how often each code was chosen
    quantization_error: Tensor | None = None  # [B], mean squared distance of latents from their codes
    sampled: Tensor | None = None  # [B, 1, R, R, R], logits from the sample
    kl_bits: Tensor | None = None  # [B, X, Y, Z], KL of each latent cell from the prior


@dataclass
class Scores:
    """objects: {metric: [n] float64} in the order of the indices given. counts: [K] or [Q, K] int64 over all of
    them, tokens: per object; both None without a codebook. Of a detailed evaluation too, counts_occupied: `counts`
    over the tokens in whose part of the grid a voxel is occupied; groups: groups of latent cells that an object
    has, group_cells: cells of a group, both where there is a KL."""

    objects: dict[str, Tensor]
    counts: Tensor | None = None
    tokens: int | None = None
    counts_occupied: Tensor | None = None
    groups: int | None = None
    group_cells: int | None = None

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
    """Usage, perplexity and bits per object, as tokens·Q·log2 K and as tokens·entropy. counts: [K] or [Q, K]."""
    codes_per_token = counts.numel() // counts.shape[-1]
    return {
        "codebook_usage": usage(counts),
        "codebook_perplexity": perplexity(counts),
        "bits_per_object": tokens * codes_per_token * math.log2(counts.shape[-1]),
        "entropy_bits_per_object": tokens * entropy_bits(counts),
    }


def occupancy_scores(scores: Scores) -> dict[str, float]:
    """What the codebook does in tokens with occupied voxels, and in empty ones. scores: of a detailed evaluation.

    tokens: of a mean object. entropy_bits_per_object_occupied and …_empty: tokens of that kind times their entropy.
    Their sum is what the ids cost one who knows which tokens are empty.
    """
    result = {"tokens": scores.tokens}
    occupied = scores.objects["tokens_occupied"].mean().item()
    for kind, tokens, counts in (
        ("occupied", occupied, scores.counts_occupied),
        ("empty", scores.tokens - occupied, scores.counts - scores.counts_occupied),
    ):
        result |= {
            f"tokens_{kind}": tokens,
            f"codebook_usage_{kind}": usage(counts),
            f"codebook_perplexity_{kind}": perplexity(counts),
            f"entropy_bits_per_object_{kind}": tokens * entropy_bits(counts),
        }
    return result


def kl_scores(scores: Scores) -> dict[str, float | None]:
    """The rate of a posterior in bits, as means over cells, over groups of cells, over the groups with occupied
    voxels and the empty ones (None where there are none), and over objects. scores: of a detailed evaluation."""
    occupied, total, inside = (
        scores.objects[name].mean().item()
        for name in ("groups_occupied", "kl_bits_per_object", "kl_bits_per_object_occupied")
    )
    result = {
        "kl_cells_per_group": scores.group_cells,
        "kl_bits_per_cell": total / (scores.groups * scores.group_cells),
    }
    for suffix, groups, bits in (
        ("", scores.groups, total),
        ("_occupied", occupied, inside),
        ("_empty", scores.groups - occupied, total - inside),
    ):
        result |= {
            f"groups{suffix}": groups,
            f"kl_bits_per_group{suffix}": bits / groups if groups else None,
            f"kl_bits_per_object{suffix}": bits,
        }
    return result


@torch.no_grad()
def evaluate(
    reconstruct: Callable[[Tensor, Sequence[int]], Reconstruction],
    dataset,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
    detailed: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Reconstruct the objects of a dataset at these indices and score each.

    reconstruct: from grids [B, 1, R, R, R] on the device, and their indices. detailed: measure distances between
    voxels, the reconstruction from a sample, the KL, and the codes of occupied and of empty tokens too. progress:
    called with the objects done so far.
    """
    parts: dict[str, list[Tensor]] = {}
    total: dict[str, Tensor] = {}
    fixed: dict[str, int] = {}
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        items = {name: value.to(device) for name, value in dataset.get_batch(np.array(batch)).items()}
        ss = dataset.unpack_batch(items)["ss"]
        result = reconstruct(ss, batch)
        scores = voxel_metrics(result.logits, ss)
        counts = {}
        if result.counts is not None:
            counts["counts"] = result.counts
            fixed["tokens"] = result.indices.shape[1:4].numel()
            scores["quantization_error"] = result.quantization_error
        if detailed:
            scores.update(distance_metrics(result.logits, ss))
            if result.counts is not None:
                details, counts["counts_occupied"] = _token_details(result, ss)
                scores.update(details)
            if result.sampled is not None:
                sampled = voxel_metrics(result.sampled, ss) | distance_metrics(result.sampled, ss)
                scores.update({f"sampled_{name}": value for name, value in sampled.items()})
            if result.kl_bits is not None:
                cells = math.gcd(CELLS_PER_GROUP, result.kl_bits.shape[-1])
                kl = result.kl_bits.unflatten(-1, (-1, cells)).sum(-1)
                fixed |= {"groups": kl[0].numel(), "group_cells": cells}
                scores.update(_kl_details(kl, ss))
        for name, value in scores.items():
            parts.setdefault(name, []).append(value.double())
        for name, value in counts.items():
            total[name] = total[name] + value if name in total else value
        progress(min(start + batch_size, len(indices)))
    return Scores({name: torch.cat(values) for name, values in parts.items()}, **total, **fixed)


def _token_details(result: Reconstruction, ss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Usage and perplexity of the codebook within each object, over all tokens and over the occupied ones: shares
    of its codes in [0, 1], and perplexities as of `metrics.perplexity`. Then the counts over occupied tokens."""
    lattice = result.indices.shape[1:4]
    occupied = occupied_blocks(ss, lattice).flatten(1)  # [B, T]
    tokens = result.indices.reshape(*occupied.shape, -1)  # [B, T, Q]
    details = {"tokens_occupied": occupied.sum(1)}
    n_embed = result.counts.shape[-1]
    for suffix, chosen in (("", None), ("_occupied", occupied)):
        counts = object_counts(tokens, n_embed, chosen)  # [B, Q, K]
        details[f"object_usage{suffix}"] = (counts > 0).double().mean((1, 2))
        details[f"object_perplexity{suffix}"] = 2 ** code_entropy(counts).mean(1)
    return details, counts.sum(0).view_as(result.counts)


def _kl_details(kl_bits: Tensor, ss: Tensor) -> dict[str, Tensor]:
    """Per object: the KL in bits, that of the groups with occupied voxels, and their number. kl_bits: of each group,
    [B, X', Y', Z']."""
    occupied = occupied_blocks(ss, kl_bits.shape[1:])
    return {
        "kl_bits_per_object": kl_bits.flatten(1).sum(1),
        "kl_bits_per_object_occupied": torch.where(occupied, kl_bits, 0).flatten(1).sum(1),
        "groups_occupied": occupied.flatten(1).sum(1),
    }
