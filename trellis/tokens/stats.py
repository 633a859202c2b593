"""What a language model will see: entropies, empty tokens, runs and compressed sizes of ids.

Axes: N objects, X' Y' Z' lattice, L = X'·Y'·Z' tokens, Q codes of a token, T = L·Q ids of an object, K codes.
Everything is counted in ids; with Q > 1 each of a token's Q codes has statistics of its own, since a reader knows which
of them comes next. All entropies are in bits.
"""

import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..evaluation.metrics import code_entropy, codebook_counts, object_counts, octree_masks, usage
from .sparse import morton_order

FOLDS = 5
OBJECTS_AT_ONCE = 64
ORDERS = ("raster", "morton")


@dataclass(frozen=True)
class TokenSet:
    """Ids of objects, N >= 1."""

    ids: np.ndarray  # [N, T] integers in [0, K), in raster order
    objects: np.ndarray  # [N], equal for equal objects, such as their sha256
    lattice: tuple[int, int, int]  # X' Y' Z'
    codes_per_token: int  # Q
    n_embed: int  # K
    empty_ids: np.ndarray | None = None  # [T], ids of an empty grid; None if unknown
    empty_code: bool = False  # whether id 0 stands for a token whose block has no voxel

    def order(self, name: str) -> np.ndarray:
        """Return the permutation [T] from raster order into one of ORDERS."""
        if name == "morton":
            return morton_order(self.lattice, self.codes_per_token).numpy()
        return np.arange(self.ids.shape[1])


def summary(values: np.ndarray) -> dict[str, float]:
    """Return mean, median, 5th and 95th percentile of values [n], n >= 1."""
    p5, median, p95 = np.percentile(values, (5, 50, 95)).tolist()
    return {"mean": float(np.mean(values)), "median": median, "p5": p5, "p95": p95}


# --- entropies --------------------------------------------------------------------------------------------------


def codebook_stats(tokens: TokenSet) -> dict:
    """Return how the codes are used over all objects and within one.

    "usage", "entropy", "perplexity": over all objects.
    "object_entropy", "object_perplexity": summaries over objects; plug-in entropy in bits of an id, and 2 to its power.
    "coverage": the share of ids among the 1, 2, 4 … most frequent codes, finally among all Q·K.
    """
    total = torch.zeros(tokens.codes_per_token, tokens.n_embed, dtype=torch.int64)
    entropies = []
    shape = -1, tokens.ids.shape[1] // tokens.codes_per_token, tokens.codes_per_token
    for start in range(0, len(tokens.ids), OBJECTS_AT_ONCE):
        part = torch.from_numpy(tokens.ids[start : start + OBJECTS_AT_ONCE].astype(np.int64)).view(shape)
        counts = object_counts(part, tokens.n_embed)  # [B, Q, K]
        entropies.append(code_entropy(counts).mean(1))
        total = total + counts.sum(0)
    entropy, objects = code_entropy(total).mean().item(), torch.cat(entropies).numpy()
    covered = total.flatten().sort(descending=True).values.cumsum(0).double() / total.sum()
    ranks = [2**i for i in range((len(covered) - 1).bit_length())] + [len(covered)]
    return {
        "usage": usage(total),
        "entropy": entropy,
        "perplexity": 2.0**entropy,
        "object_entropy": summary(objects),
        "object_perplexity": summary(2.0**objects),
        "coverage": [{"codes": rank, "share": covered[rank - 1].item()} for rank in ranks],
    }


def contexts(tokens: TokenSet) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield what an id may be predicted from: a name, and contexts [N, T], each finer than the one before it.

    The contexts are: nothing; the position; the previous id in raster and in Morton order; the ids one step back along
    x, y and z; and these three together, refined from z to y to x. At the border of the lattice, and before the first
    id, the context is K, as a model knows where an object begins. In raster order all of these come before the id.
    """
    ids, K = tokens.ids.astype(np.int64), tokens.n_embed
    yield "nothing", []
    yield "place", [np.broadcast_to(np.arange(ids.shape[1]), ids.shape)]
    for name in ORDERS:
        order = tokens.order(name)
        before = np.full_like(ids, K)
        before[:, order[1:]] = ids[:, order[:-1]]
        yield f"previous_{name}", [before]
    grid = ids.reshape(len(ids), *tokens.lattice, tokens.codes_per_token)
    back = {}
    for axis, name in enumerate("xyz", start=1):
        shifted = np.full_like(grid, K)
        size = grid.shape[axis]
        np.moveaxis(shifted, axis, 0)[1:] = np.moveaxis(grid, axis, 0)[: size - 1]
        back[name] = shifted.reshape(ids.shape)
        yield f"neighbour_{name}", [back[name]]
    pairs = _dense(back["z"] * (K + 1) + back["y"])
    yield "neighbours_xyz", [back["z"], pairs, _dense(pairs * (K + 1) + back["x"])]


def conditional_entropies(tokens: TokenSet) -> dict[str, dict]:
    """Return {name of a context: {"plug_in", "held_out", "bits_per_object", "contexts"}}.

    plug_in: -Σ n(c,a)/M log2 n(c,a)/n(c), from the counts n(c,a) of id a in context c among all M ids. It is biased low
        if contexts are seen a few times each, down to 0 if each is seen once.
    held_out: cross-entropy of ids under a model fitted on other objects; an upper bound of the entropy rate.
        Objects are divided into FOLDS parts (equal objects into the same part). Each part is coded from the counts of
        the others, by Witten-Bell interpolation (IEEE Trans. Inf. Theory 37(4), 1991; Chen and Goodman, 1999):
            p(a|c) = (n(c,a) + d(c) p(a|c')) / (n(c) + d(c)),
        with d(c) the number of different ids seen in context c, and c' the next coarser context. The coarsest context
        is nothing, and below it p is 1/K. None for fewer than two different objects.
    bits_per_object: summary of the held-out bits of objects; None in the same case.
    contexts: how many different contexts occur.
    """
    _, groups = np.unique(tokens.objects, return_inverse=True)
    different = int(groups.max()) + 1
    folds = groups % min(FOLDS, different)  # the order of sha256 is arbitrary
    which = np.broadcast_to(np.arange(tokens.ids.shape[1]) % tokens.codes_per_token, tokens.ids.shape)
    probability = np.full(tokens.ids.shape, 1 / tokens.n_embed)
    unigram, unigram_pairs = _refine(tokens, which, folds, probability)
    results = {}
    for name, levels in contexts(tokens):
        probability, pairs = unigram, unigram_pairs
        for level in levels:
            probability, pairs = _refine(tokens, level * tokens.codes_per_token + which, folds, probability)
        held_out = -np.log2(probability).sum(1) + 0.0 if different > 1 else None  # [N]
        results[name] = {
            "plug_in": pairs.entropy(),
            "held_out": None if held_out is None else float(held_out.mean() / tokens.ids.shape[1]),
            "bits_per_object": None if held_out is None else summary(held_out),
            "contexts": int((pairs.per_context > 0).sum()),
        }
    return results


@dataclass(frozen=True)
class Pairs:
    """Counts of the U pairs of context and id that occur, with C contexts."""

    counts: np.ndarray  # [U]
    context: np.ndarray  # [U], the context of each pair, in [0, C)
    per_context: np.ndarray  # [C], sums of counts

    def entropy(self) -> float:
        """Return the plug-in estimate, bits of an id."""
        bits = np.log2(self.per_context[self.context] / self.counts)
        return float((self.counts * bits).sum() / self.counts.sum())


def _refine(tokens: TokenSet, level: np.ndarray, folds: np.ndarray, coarser: np.ndarray) -> tuple[np.ndarray, Pairs]:
    """Return held-out probabilities of ids, [N, T], and the counts over all objects.

    level: [N, T], the context of each id.
    folds: [N], the part of each object.
    coarser: [N, T], held-out probabilities in the next coarser contexts.
    """
    pair, values = pd.factorize((level * tokens.n_embed + tokens.ids).ravel())
    pair, context = pair.reshape(level.shape), values // tokens.n_embed
    counts = np.bincount(pair.ravel())
    probability = np.empty_like(coarser)
    for fold in np.unique(folds):
        inside = folds == fold
        here = pair[inside]
        seen = counts - np.bincount(here.ravel(), minlength=len(counts))
        total = np.bincount(context, weights=seen)[context[here]]
        kinds = np.bincount(context, weights=seen > 0)[context[here]]
        divisor = np.maximum(total + kinds, 1)  # 0 for a context that the other parts do not have
        probability[inside] = np.where(total > 0, (seen[here] + kinds * coarser[inside]) / divisor, coarser[inside])
    return probability, Pairs(counts, context, np.bincount(context, weights=counts))


def _dense(values: np.ndarray) -> np.ndarray:
    """Return values renumbered from 0 in order of first occurrence, in the same shape."""
    return pd.factorize(values.ravel())[0].reshape(values.shape)


# --- empty tokens, runs, and the sparse form ------------------------------------------------------------------------


def empty_stats(tokens: TokenSet, occupied: np.ndarray | None = None) -> dict:
    """Return statistics of empty space.

    "share": summary over objects of the share of ids that are the empty grid's at the same position.
    "different": number of different ids in an empty grid.
    With grids also, over all objects:
    "places_without_voxels": share of the positions without an occupied voxel.
    "without_voxels", "with_voxels": of those positions and of the others, "empty_ids", the share of tokens that are the
        empty grid's; "different" and "entropy", number and entropy of the ids. None if there is no such position.

    tokens: with empty_ids.
    occupied: [N, L] bool, whether a position's block of the grid has an occupied voxel; None without grids.
    """
    empty_ids = _empty_ids(tokens)
    equal = tokens.ids == empty_ids
    result: dict[str, Any] = {"share": summary(equal.mean(1)), "different": len(np.unique(empty_ids))}
    if occupied is None:
        return result
    result["places_without_voxels"] = float((~occupied).mean())
    shape = *occupied.shape, tokens.codes_per_token
    for name, chosen in (("without_voxels", ~occupied), ("with_voxels", occupied)):
        if not chosen.any():
            result[name] = None
            continue
        ids = torch.from_numpy(tokens.ids.reshape(shape)[chosen].astype(np.int64))
        counts = object_counts(ids[None], tokens.n_embed)[0]  # [Q, K]
        result[name] = {
            "empty_ids": float(equal.reshape(shape).all(2)[chosen].mean()),
            "different": int((counts > 0).sum()),
            "entropy": code_entropy(counts).mean().item(),
        }
    return result


def _empty_ids(tokens: TokenSet) -> np.ndarray:
    if tokens.empty_ids is None:
        raise ValueError("the ids of an empty grid must be known")
    return tokens.empty_ids


def run_lengths(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of each run of equal values within a row, and its value, row by row. values: [N, L]."""
    first = np.ones(values.shape, dtype=bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = np.flatnonzero(first)
    return np.diff(starts, append=values.size), values.ravel()[starts]


def run_stats(tokens: TokenSet) -> dict[str, dict]:
    """Return {order: {"equal", "empty"}}: runs of tokens with equal ids, and runs of ids that are the empty grid's at
    the same position (None without empty_ids).

    Each has "per_object", the number of runs in the mean object; "mean", "median", "p5", "p95" and "longest" of their
    lengths; and "doubling", how many have a length in [2^i, 2^(i+1)).
    """
    results: dict[str, dict] = {}
    for name in ORDERS:
        order = tokens.order(name)
        ids = tokens.ids[:, order]
        # A token of several codes is one value.
        whole = _dense_rows(ids.reshape(-1, tokens.codes_per_token)).reshape(len(ids), -1)
        results[name] = {"equal": _describe_runs(run_lengths(whole)[0], len(ids)), "empty": None}
        if tokens.empty_ids is not None:
            lengths, empty = run_lengths(ids == tokens.empty_ids[order])
            results[name]["empty"] = _describe_runs(lengths[empty], len(ids))
    return results


def _dense_rows(rows: np.ndarray) -> np.ndarray:
    """Return a number for each row [n, Q]; equal rows have equal numbers."""
    number = rows[:, 0].astype(np.int64)
    for column in rows.T[1:]:
        number = _dense(number * (int(rows.max()) + 1) + column)
    return number


def _describe_runs(lengths: np.ndarray, objects: int) -> dict:
    if not len(lengths):
        return {"per_object": 0.0, "longest": 0, "doubling": []}
    doubling = np.bincount(np.log2(lengths).astype(int))
    return {
        "per_object": len(lengths) / objects,
        **summary(lengths),
        "longest": int(lengths.max()),
        "doubling": doubling.tolist(),
    }


def sparse_lengths(tokens: TokenSet, order: str) -> np.ndarray:
    """Return the length [N] of each object's sparse form (tokens/sparse.py) in one of ORDERS."""
    permutation = tokens.order(order)
    kept = tokens.ids[:, permutation] != _empty_ids(tokens)[permutation]
    first_of_run = ~kept
    first_of_run[:, 1:] &= kept[:, :-1]
    return kept.sum(1) + first_of_run.sum(1)


def octree_stats(tokens: TokenSet) -> dict:
    """Return statistics of the octree form (tokens/octree.py) of ids with an empty code.

    "masks", "codes", "values": summaries over objects of its masks, codes, and both together.
    "mask_entropy", "code_entropy": bits of a mask, and of a code that is not the empty one, over all objects; without
        any, 0.
    "bits_per_object": what they come to in the mean object.
    """
    ids = torch.from_numpy(tokens.ids).view(len(tokens.ids), *tokens.lattice, -1)  # [n, X', Y', Z', Q]
    masks = octree_masks(ids[..., 0] > 0)  # [n, 255]
    chosen = codebook_counts(ids, tokens.n_embed, tokens.codes_per_token).view(-1, tokens.n_embed)[:, 1:]
    mask_bits, code_bits = code_entropy(masks.sum(0)).item(), code_entropy(chosen).mean().item()
    masks_per_object, codes_per_object = masks.sum(1).numpy(), (ids > 0).flatten(1).sum(1).numpy()
    return {
        "masks": summary(masks_per_object),
        "codes": summary(codes_per_object),
        "values": summary(masks_per_object + codes_per_object),
        "mask_entropy": mask_bits,
        "code_entropy": code_bits,
        "bits_per_object": float(masks_per_object.mean() * mask_bits + codes_per_object.mean() * code_bits),
    }


# --- bytes --------------------------------------------------------------------------------------------------------


def deflate_size(data: bytes) -> int:
    """Return the number of bytes after DEFLATE (RFC 1951) at its highest level, without a header."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return len(compressor.compress(data)) + len(compressor.flush())


def lzma_size(data: bytes) -> int:
    """Return the number of bytes after LZMA2 at its highest preset, without a header. The window holds all of data."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(data))}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


COMPRESSORS = {"deflate": deflate_size, "lzma": lzma_size}


def pack_ids(ids: np.ndarray, n_embed: int) -> bytes:
    """Return ids [T] in as few whole bits each as hold K codes (13 for 8192), the highest bit first."""
    bits = max(1, (n_embed - 1).bit_length())
    return np.packbits((ids[:, None] >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def whole_ids(ids: np.ndarray, n_embed: int) -> bytes:
    """Return ids [T] as unsigned integers of 16 bits, or of 32 for more than 65536 codes, little-endian."""
    return ids.astype("<u2" if n_embed <= 2**16 else "<u4").tobytes()


LAYOUTS = {"packed": pack_ids, "whole": whole_ids}


def id_sizes(tokens: TokenSet) -> dict[str, dict]:
    """Return the bytes of an object's ids: {"packed" | "whole": {"raw": int, "deflate" | "lzma": {order: summary}}}.

    Each object is compressed by itself.
    """
    results: dict[str, dict] = {}
    for layout, write in LAYOUTS.items():
        results[layout] = {"raw": len(write(tokens.ids[0], tokens.n_embed)), **{name: {} for name in COMPRESSORS}}
        for order in ORDERS:
            rows = [write(row, tokens.n_embed) for row in tokens.ids[:, tokens.order(order)]]
            for name, size in COMPRESSORS.items():
                results[layout][name][order] = summary(np.array([size(row) for row in rows]))
    return results


def grid_sizes(grids: np.ndarray) -> np.ndarray:
    """Return the bytes of packed grids after each of COMPRESSORS, [N, 2]. grids: [N, R³ / 8] uint8, a bit per voxel."""
    return np.array([[size(row.tobytes()) for size in COMPRESSORS.values()] for row in grids])
