"""What a language model will see: entropies, empty tokens, runs and compressed sizes of ids.

Axes: N objects, X' Y' Z' lattice, P = X'·Y'·Z' places, Q codes of a token, T = P·Q ids of an object, K codes.
Everything is counted in ids; with Q > 1 each of a token's codes has statistics of its own, since a reader knows which
of them comes next. All entropies are in bits.
"""

import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ..evaluation.metrics import code_entropy, object_counts, usage
from .sparse import morton_order

FOLDS = 5
OBJECTS_AT_ONCE = 64
ORDERS = ("raster", "morton")


@dataclass(frozen=True)
class TokenSet:
    """Ids of objects. ids: [N, T] integers in [0, K), in raster order, N >= 1. objects: [N], equal for objects that
    are the same, as their sha256. empty_ids: [T], ids of an empty grid, None where nobody says."""

    ids: np.ndarray
    objects: np.ndarray
    lattice: tuple[int, int, int]
    codes_per_token: int
    n_embed: int
    empty_ids: np.ndarray | None = None

    def order(self, name: str) -> np.ndarray:
        """The permutation [T] that puts ids in one of ORDERS."""
        if name == "morton":
            return morton_order(self.lattice, self.codes_per_token).numpy()
        return np.arange(self.ids.shape[1])


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, median and the 5th and 95th percentile of values [n], n >= 1."""
    p5, median, p95 = np.percentile(values, (5, 50, 95)).tolist()
    return {"mean": float(np.mean(values)), "median": median, "p5": p5, "p95": p95}


# --- entropies --------------------------------------------------------------------------------------------------


def codebook_stats(tokens: TokenSet) -> dict:
    """How the codes are used over all objects and within one: {"usage", "entropy", "perplexity"} and summaries over
    objects "object_entropy", "object_perplexity" (plug-in, bits of an id and 2 to the power of them), and "coverage",
    the share of ids that are among the 1, 2, 4 … most frequent codes, at last among all Q·K."""
    total, entropies = 0, []
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
    """What an id may be guessed from: a name, and contexts [N, T], each finer than the one before it.

    nothing; its place; the id before it in raster and in Morton order; the ids one step back along x, y and z, and all
    three of them, refined from z to y to x. At the border of the lattice, and before the first id, the context is K, as
    a model knows where an object begins. In raster order all of these come before the id.
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
    """{name of a context: {"plug_in", "held_out", "bits_per_object", "contexts"}}.

    plug_in: -Σ n(c,a)/M log2 n(c,a)/n(c), from the counts n(c,a) of id a in context c among all M ids. It is biased low
        where contexts are seen a few times each, down to 0 where each is seen once.
    held_out: cross-entropy of ids under a model that was fitted on other objects; an upper bound of what ids carry.
        Objects are divided into FOLDS parts (same objects into the same part), each coded from the counts of the
        others, by Witten-Bell interpolation (IEEE Trans. Inf. Theory 37(4), 1991; Chen and Goodman, 1999, Sec. 2.5):
            p(a|c) = (n(c,a) + d(c) p(a|c')) / (n(c) + d(c)),
        d(c) the number of different ids seen after c, c' the next coarser context: down to none, and below that 1/K.
        None for fewer than two different objects.
    bits_per_object: summary of the held-out bits of objects, None likewise. contexts: how many different ones occur.
    """
    _, groups = np.unique(tokens.objects, return_inverse=True)
    different = int(groups.max()) + 1
    folds = groups % min(FOLDS, different)  # sha256 are in no order that matters
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
    """Counts of the pairs of context and id that occur. counts: [U]; context: [U], of each pair; per_context: [C]."""

    counts: np.ndarray
    context: np.ndarray
    per_context: np.ndarray

    def entropy(self) -> float:
        """The plug-in estimate, bits of an id."""
        bits = np.log2(self.per_context[self.context] / self.counts)
        return float((self.counts * bits).sum() / self.counts.sum())


def _refine(tokens: TokenSet, level: np.ndarray, folds: np.ndarray, coarser: np.ndarray) -> tuple[np.ndarray, Pairs]:
    """Held-out probabilities [N, T] of ids in the contexts `level` [N, T], given those in the next coarser ones, and
    the counts over all objects. folds: [N]."""
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
        known = np.maximum(total + kinds, 1)  # a context that the others do not have
        probability[inside] = np.where(total > 0, (seen[here] + kinds * coarser[inside]) / known, coarser[inside])
    return probability, Pairs(counts, context, np.bincount(context, weights=counts))


def _dense(values: np.ndarray) -> np.ndarray:
    """values numbered from 0 on in the order of their first occurrence, in the same shape."""
    return pd.factorize(values.ravel())[0].reshape(values.shape)


# --- empty tokens, runs, and the sparse form ------------------------------------------------------------------------


def empty_stats(tokens: TokenSet, occupied: np.ndarray | None = None) -> dict:
    """The ids of empty space. tokens: with empty_ids. occupied: [N, P] bool, whether a place's part of the grid has a
    voxel; None without grids.

    "share": summary over objects of the share of ids that are the empty grid's at their place; "different": how many
    ids an empty grid has. With grids, over all objects: "places_without_voxels", a share; of these and of the others
    the share of tokens that are the empty grid's ("empty_ids"), and number and entropy of their ids, as
    "without_voxels" and "with_voxels" (None where there is no such place).
    """
    equal = tokens.ids == tokens.empty_ids
    result = {"share": summary(equal.mean(1)), "different": len(np.unique(tokens.empty_ids))}
    if occupied is None:
        return result
    result["places_without_voxels"] = float((~occupied).mean())
    places = *occupied.shape, tokens.codes_per_token
    for name, chosen in (("without_voxels", ~occupied), ("with_voxels", occupied)):
        if not chosen.any():
            result[name] = None
            continue
        ids = torch.from_numpy(tokens.ids.reshape(places)[chosen].astype(np.int64))
        counts = object_counts(ids[None], tokens.n_embed)[0]  # [Q, K]
        result[name] = {
            "empty_ids": float(equal.reshape(places).all(2)[chosen].mean()),
            "different": int((counts > 0).sum()),
            "entropy": code_entropy(counts).mean().item(),
        }
    return result


def run_lengths(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of each run of equal values within a row, and its value. values: [N, L]; rows one after the other."""
    first = np.ones(values.shape, dtype=bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = np.flatnonzero(first)
    return np.diff(starts, append=values.size), values.ravel()[starts]


def run_stats(tokens: TokenSet) -> dict[str, dict]:
    """{order: {"equal": runs of tokens with equal ids, "empty": runs of ids that are the empty grid's at their place,
    None without empty_ids}}. Of each: number in an object, "mean", "median", "p5", "p95", "longest", and "doubling":
    how many have a length in [2^i, 2^(i+1))."""
    results = {}
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
    """A number for each row [n, Q], equal where all of its values are."""
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
    """Length [N] of each object's sparse form (tokens/sparse.py) in one of ORDERS."""
    order = tokens.order(order)
    kept = tokens.ids[:, order] != tokens.empty_ids[order]
    first_of_run = ~kept
    first_of_run[:, 1:] &= kept[:, :-1]
    return kept.sum(1) + first_of_run.sum(1)


# --- bytes --------------------------------------------------------------------------------------------------------


def deflate_size(data: bytes) -> int:
    """Bytes after DEFLATE (RFC 1951) at its highest level, without a header."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return len(compressor.compress(data)) + len(compressor.flush())


def lzma_size(data: bytes) -> int:
    """Bytes after LZMA2 at its highest preset, without a header. The window holds all of an object."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(data))}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


COMPRESSORS = {"deflate": deflate_size, "lzma": lzma_size}


def pack_ids(ids: np.ndarray, n_embed: int) -> bytes:
    """ids [T] one after the other in as few whole bits as hold K codes (13 for 8192), the highest bit first."""
    bits = max(1, (n_embed - 1).bit_length())
    return np.packbits((ids[:, None] >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def whole_ids(ids: np.ndarray, n_embed: int) -> bytes:
    """ids [T] as unsigned integers of 16 bits, of 32 for more than 65536 codes; lowest byte first."""
    return ids.astype("<u2" if n_embed <= 2**16 else "<u4").tobytes()


LAYOUTS = {"packed": pack_ids, "whole": whole_ids}


def id_sizes(tokens: TokenSet) -> dict[str, dict]:
    """Bytes of an object's ids: {"packed" | "whole": {"raw": int, "deflate" | "lzma": {order: summary}}}. Each object
    is compressed by itself."""
    results = {}
    for layout, write in LAYOUTS.items():
        results[layout] = {"raw": len(write(tokens.ids[0], tokens.n_embed)), **{name: {} for name in COMPRESSORS}}
        for order in ORDERS:
            rows = [write(row, tokens.n_embed) for row in tokens.ids[:, tokens.order(order)]]
            for name, size in COMPRESSORS.items():
                results[layout][name][order] = summary(np.array([size(row) for row in rows]))
    return results


def grid_sizes(grids: np.ndarray) -> np.ndarray:
    """Bytes [N, 2] of packed grids by each of COMPRESSORS. grids: [N, R³ / 8] uint8, a bit for each voxel."""
    return np.array([[size(row.tobytes()) for size in COMPRESSORS.values()] for row in grids])
