"""Reconstruction quality over a dataset, for validation during training and for scripts/evaluate.py.

Axes: B batch, n objects, R voxels along an axis, X Y Z latent cells, X' Y' Z' the lattice, L = X'·Y'·Z' tokens,
Q codes of a token, K codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .metrics import (
    code_entropy,
    distance_metrics,
    entropy_bits,
    narrow_gaps,
    object_counts,
    occupied_blocks,
    octree_masks,
    perplexity,
    usage,
    voxel_metrics,
)

# Latent cells along z that a token of ShapeLLM-Omni covers; its id is compared with the KL of as many cells.
CELLS_PER_GROUP = 4


class GridDataset(Protocol):
    """A dataset of occupancy grids, such as trellis.datasets.SparseStructure."""

    def get_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the stored form of these objects, on the CPU."""
        ...

    def unpack_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"ss": [B, 1, R, R, R]} of a stored form, on its device."""
        ...


class Reconstruction(NamedTuple):
    """The output of the models for a batch of grids.

    `indices`, `counts` and `quantization_error` are None without a codebook, `sampled` and `kl_bits` without a sample
    of the posterior.
    """

    logits: Tensor  # [B, 1, R, R, R], or bool
    indices: Tensor | None = None  # [B, X', Y', Z'] int64 tokens, or [B, X', Y', Z', Q]
    counts: Tensor | None = None  # [K] int64, or [Q, K]: how often each learned code was chosen
    quantization_error: Tensor | None = None  # [B], mean squared distance of latents from their codes
    sampled: Tensor | None = None  # [B, 1, R, R, R], logits from the sample
    kl_bits: Tensor | None = None  # [B, X, Y, Z], KL of each latent cell from the prior
    first_code: int = 0  # id of the first learned code; 1 with an empty code, whose tokens are not written


@dataclass
class Scores:
    """Scores of each object, and counts over all objects. The last three are of a detailed evaluation only."""

    objects: dict[str, Tensor]  # {metric: [n] float64} in the order of the indices given
    counts: Tensor | None = None  # [K] or [Q, K] int64: how often each learned code was chosen; None without a codebook
    masks: Tensor | None = None  # [255] int64: how often each mask of the octree is written; None without an empty code
    # The same counts over tokens whose block of the grid has an occupied voxel; None with an empty code, since no other
    # token has a learned code then.
    counts_occupied: Tensor | None = None
    groups: int | None = None  # groups of latent cells in an object; None without a KL
    group_cells: int | None = None  # latent cells of a group; None without a KL

    def means(self, all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """Return the mean of each metric, and the scores of the codebook over all objects.

        all_sum: adds up a tensor over ranks, each of which has scored a share of the objects.
        """
        sums = torch.stack([value.sum() for value in self.objects.values()])
        number = all_sum(torch.tensor(float(self.number), dtype=torch.float64, device=sums.device))
        means = dict(zip(self.objects, (all_sum(sums) / number).tolist(), strict=True))
        if self.counts is not None:
            masks = None if self.masks is None else all_sum(self.masks)
            means.update(codebook_scores(all_sum(self.counts), round(number.item()), masks))
        return means

    @property
    def number(self) -> int:
        """n, number of objects."""
        return len(self.objects["iou"])


def codebook_scores(counts: Tensor, objects: int, masks: Tensor | None = None) -> dict[str, float]:
    """Return usage and perplexity of the learned codes, and what is written for the mean object.

    codes_per_object: tokens that are written, times Q.
    lm_tokens: what a language model writes: codes and, with an empty code, the masks of an octree that say where the
        tokens are.
    bits_per_object: of all of them at a fixed length each: log2 K for a code, log2 255 for a mask.
    entropy_bits_per_object: the same by the entropy of single codes and of single masks.

    counts: [K] or [Q, K], over all objects.
    objects: their number.
    masks: [255], over all objects, see `metrics.octree_masks`; None without an empty code.
    """
    codes = counts.sum().item() / objects
    tokens = codes / (counts.numel() // counts.shape[-1])
    result = {
        "codebook_usage": usage(counts),
        "codebook_perplexity": perplexity(counts),
        "codes_per_object": codes,
        "lm_tokens": codes,
        "bits_per_object": codes * math.log2(counts.shape[-1]),
        "entropy_bits_per_object": tokens * entropy_bits(counts),
    }
    if masks is not None:
        number = masks.sum().item() / objects
        result["lm_tokens"] += number
        result["bits_per_object"] += number * math.log2(len(masks))
        result["entropy_bits_per_object"] += number * entropy_bits(masks)
    return result


def occupancy_scores(scores: Scores) -> dict[str, float]:
    """Return how the codebook is used by tokens with occupied voxels, and by empty tokens.

    scores: of a detailed evaluation of models with a codebook and no empty code; ValueError for others.
    entropy_bits_per_object_occupied and …_empty: tokens of that kind in the mean object, times their entropy. The sum
    is the expected code length of the ids for a reader who knows which tokens are empty.
    """
    if scores.counts is None or scores.counts_occupied is None:
        raise ValueError("the scores must be of a detailed evaluation of models with a codebook and no empty code")
    result: dict[str, float] = {}
    tokens, occupied = (scores.objects[name].mean().item() for name in ("tokens", "tokens_occupied"))
    for kind, number, counts in (
        ("occupied", occupied, scores.counts_occupied),
        ("empty", tokens - occupied, scores.counts - scores.counts_occupied),
    ):
        result |= {
            f"tokens_{kind}": number,
            f"codebook_usage_{kind}": usage(counts),
            f"codebook_perplexity_{kind}": perplexity(counts),
            f"entropy_bits_per_object_{kind}": number * entropy_bits(counts),
        }
    return result


def kl_scores(scores: Scores) -> dict[str, float | None]:
    """Return the rate of a posterior in bits: means over latent cells, groups of cells and objects.

    Groups with occupied voxels and empty groups have means of their own, None if there is no such group.
    scores: of a detailed evaluation of models with a posterior; ValueError for others.
    """
    if scores.groups is None or scores.group_cells is None:
        raise ValueError("the scores must be of a detailed evaluation of models with a posterior")
    occupied, total, inside = (
        scores.objects[name].mean().item()
        for name in ("groups_occupied", "kl_bits_per_object", "kl_bits_per_object_occupied")
    )
    result: dict[str, float | None] = {
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
    dataset: GridDataset,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
    detailed: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Reconstruct the objects of a dataset at these indices and score each.

    reconstruct: gets grids [B, 1, R, R, R] on the device, and their indices.
    detailed: also measure distances between voxels, the reconstruction from a sample, the KL, and the codes of occupied
        and of empty tokens.
    progress: called with the number of objects done so far.
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
        if result.counts is not None and result.indices is not None and result.quantization_error is not None:
            counts["counts"] = result.counts
            scores["quantization_error"] = result.quantization_error
            ids = result.indices.view(*result.indices.shape[:4], -1)  # [B, X', Y', Z', Q]
            written = ids[..., 0] >= result.first_code
            if result.first_code or detailed:
                scores["tokens"] = written.flatten(1).sum(1)
            if result.first_code:
                masks = octree_masks(written)
                scores["masks"], counts["masks"] = masks.sum(1), masks.sum(0)
            if detailed:
                rows = (ids - result.first_code).clamp(min=0).flatten(1, 3)
                scores.update(_code_details("", rows, result.counts, written)[0])
                if not result.first_code:
                    occupied = occupied_blocks(ss, written.shape[1:])
                    scores["tokens_occupied"] = occupied.flatten(1).sum(1)
                    details, counts["counts_occupied"] = _code_details("_occupied", rows, result.counts, occupied)
                    scores.update(details)
        if detailed:
            scores["narrow_gaps"] = narrow_gaps(ss)
            scores.update(distance_metrics(result.logits, ss))
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
    return Scores(
        {name: torch.cat(values) for name, values in parts.items()},
        counts=total.get("counts"),
        masks=total.get("masks"),
        counts_occupied=total.get("counts_occupied"),
        groups=fixed.get("groups"),
        group_cells=fixed.get("group_cells"),
    )


def _code_details(suffix: str, rows: Tensor, counts: Tensor, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return usage and perplexity of the codebook within each object, over chosen tokens, and the counts over them.

    Usage is a share of the codes in [0, 1], perplexity as `metrics.perplexity` defines it.
    rows: [B, L, Q], codes of tokens; any code for tokens that are not chosen.
    counts: as in `Reconstruction`.
    chosen: [B, X', Y', Z'] bool.
    """
    own = object_counts(rows, counts.shape[-1], chosen.flatten(1))  # [B, Q, K]
    details = {
        f"object_usage{suffix}": (own > 0).double().mean((1, 2)),
        f"object_perplexity{suffix}": 2 ** code_entropy(own).mean(1),
    }
    return details, own.sum(0).view_as(counts)


def _kl_details(kl_bits: Tensor, ss: Tensor) -> dict[str, Tensor]:
    """Return, for each object, the KL in bits over all groups and over groups with occupied voxels, and the number of
    the latter. kl_bits: of each group, [B, X', Y', Z']."""
    occupied = occupied_blocks(ss, kl_bits.shape[1:])
    return {
        "kl_bits_per_object": kl_bits.flatten(1).sum(1),
        "kl_bits_per_object_occupied": torch.where(occupied, kl_bits, 0).flatten(1).sum(1),
        "groups_occupied": occupied.flatten(1).sum(1),
    }
