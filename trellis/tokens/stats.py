"""What a language model will see: entropies, empty tokens, runs and compressed sizes of ids.

Axes: N objects, X' Y' Z' lattice, L = X'·Y'·Z' tokens, Q codes of a token, T = L·Q ids of an object, K codes.
Everything is counted in ids; with Q > 1 each of a token's Q codes has statistics of its own, since a reader knows which
of them comes next. All entropies are in bits.
"""

import lzma
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..evaluation.metrics import code_entropy, codebook_counts, object_counts, octree_masks, usage
from .sparse import morton_order

FOLDS = 5
OBJECTS_AT_ONCE = 64
VALUES_AT_ONCE = 2**18
# Combinations up to so many are looked up in a table of all of them, of 5 bytes each.
LARGEST_TABLE = 10**8
# Objects that are compressed one by one, at most: each takes about 20 ms.
OBJECTS_TO_COMPRESS = 1000
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


def contexts(tokens: TokenSet) -> Iterator[tuple[str, list[tuple[np.ndarray, int]]]]:
    """Yield what an id may be predicted from: a name, and the parts of the context, from coarse to fine.

    A part is (its values [N, T] in [0, size), size), and a context one of values of all parts.
    The contexts are: nothing; the position; the previous id in raster and in Morton order; the ids one step back along
    x, y and z; and these three together, refined from z to y to x. At the border of the lattice, and before the first
    id, the value is K, as a model knows where an object begins. In raster order all of these come before the id.
    """
    ids, K = tokens.ids.astype(np.int32, copy=False), tokens.n_embed
    yield "nothing", []
    yield "place", [(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape), ids.shape[1])]
    for name in ORDERS:
        order = tokens.order(name)
        before = np.full_like(ids, K)
        before[:, order[1:]] = ids[:, order[:-1]]
        yield f"previous_{name}", [(before, K + 1)]
        del before
    grid = ids.reshape(len(ids), *tokens.lattice, tokens.codes_per_token)
    back = {}
    for axis, name in enumerate("xyz", start=1):
        shifted = np.full_like(grid, K)
        size = grid.shape[axis]
        np.moveaxis(shifted, axis, 0)[1:] = np.moveaxis(grid, axis, 0)[: size - 1]
        back[name] = shifted.reshape(ids.shape)
        yield f"neighbour_{name}", [(back[name], K + 1)]
    yield "neighbours_xyz", [(back[name], K + 1) for name in "zyx"]


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
    # Objects of a fold lie together, so that their pairs are a slice.
    order = np.argsort(folds, kind="stable")
    ids, base = _by_frequency(tokens.ids[order]), 1 / tokens.n_embed
    tokens = replace(tokens, ids=ids, n_embed=int(ids.max()) + 1)
    ends = np.bincount(folds).cumsum().tolist()
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    results = {}
    for name, parts in contexts(tokens):
        pair, levels = _levels(tokens, parts, base)
        held_out = np.empty(len(tokens.ids))
        for fold in slices if different > 1 else ():
            bits = -np.log2(_held_out(levels, np.bincount(pair[fold].ravel(), minlength=len(levels[-1].counts))))
            held_out[order[fold]] = bits[pair[fold]].sum(1) + 0.0
        results[name] = {
            "plug_in": levels[-1].entropy(),
            "held_out": float(held_out.mean() / tokens.ids.shape[1]) if different > 1 else None,
            "bits_per_object": summary(held_out) if different > 1 else None,
            "contexts": len(levels[-1].per_context),
        }
    return results


@dataclass(frozen=True)
class Level:
    """Counts of the U pairs of context and id that occur, with C contexts."""

    counts: np.ndarray  # [U]
    context: np.ndarray  # [U], the context of each pair, in [0, C)
    per_context: np.ndarray  # [C], sums of counts
    different: np.ndarray  # [C], pairs of each context
    coarser: np.ndarray | float  # [U], the pair of the next coarser level that each belongs to; of the coarsest, 1/K

    def entropy(self) -> float:
        """Return the plug-in estimate, bits of an id."""
        bits = np.log2(self.per_context[self.context] / self.counts)
        return float((self.counts * bits).sum() / self.counts.sum())


def _by_frequency(ids: np.ndarray) -> np.ndarray:
    """Return ids renumbered, int32, the most frequent first: then most look-ups in a table are in one part of it."""
    counts = np.bincount(ids.ravel())
    ranks = np.empty(len(counts), np.int32)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    return ranks[ids]


def _levels(tokens: TokenSet, parts: list[tuple[np.ndarray, int]], base: float) -> tuple[np.ndarray, list[Level]]:
    """Return the pair of each id, [N, T], in the finest of the contexts, and the levels from nothing to it.

    Levels are counted by pairs, of which there are far fewer than ids.

    base: probability of an id of which nothing is known.
    """
    K, Q = tokens.n_embed, tokens.codes_per_token
    which = np.arange(tokens.ids.shape[1], dtype=np.int32) % Q
    # Digits of each pair, the coarsest first: the parts of its context, which of a token's codes it is, the id.
    digits = [*parts, (np.broadcast_to(which, tokens.ids.shape), Q), (tokens.ids, K)]
    pair, found = _numbered(digits)
    sizes, counts = [size for _, size in digits], np.bincount(pair.ravel(), minlength=len(found[0]))
    levels: list[Level] = []
    while True:
        context = _runs(found[:-1])  # pairs are in the order of their digits
        per_context, different = np.bincount(context, weights=counts), np.bincount(context)
        if len(found) == 2:
            levels.append(Level(counts, context, per_context, different, base))
            return pair, levels[::-1]
        # Without the last part of the context.
        found, sizes = [*found[:-3], *found[-2:]], [*sizes[:-3], *sizes[-2:]]
        coarser, found = _numbered([*zip(found, sizes, strict=True)])
        levels.append(Level(counts, context, per_context, different, coarser))
        counts = np.bincount(coarser, weights=counts)


def _runs(columns: list[np.ndarray]) -> np.ndarray:
    """Return the number of each run of rows [n] that are equal in all columns, int32."""
    begins = np.zeros(len(columns[0]), bool)
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return begins.cumsum(dtype=np.int32)


def _held_out(levels: list[Level], inside: np.ndarray) -> np.ndarray:
    """Return the probability [U] of each pair's id in its context, fitted on what is not inside.

    inside: [U], the part of the finest level's counts that is coded. Pairs of which it has none get any number > 0.
    """
    coded = []  # of each level, from fine to coarse: the pairs that are inside, and how often
    for level in levels[::-1]:
        pairs = np.flatnonzero(inside)
        coded.append((pairs, inside[pairs]))
        if isinstance(level.coarser, np.ndarray):
            inside = np.bincount(level.coarser[pairs], weights=inside[pairs])
    probability = np.empty(0)
    for level, (pairs, counts) in zip(levels, coded[::-1], strict=True):
        coarser = level.coarser if isinstance(level.coarser, float) else probability[level.coarser[pairs]]
        context, all_counts = level.context[pairs], level.counts[pairs]
        seen = all_counts - counts
        total = level.per_context[context] - np.bincount(context, weights=counts)[context]
        # Different ids that are seen outside: all, but for those that are seen inside alone.
        kinds = level.different[context] - np.bincount(context, weights=seen == 0)[context]
        divisor = np.maximum(total + kinds, 1)  # 0 for a context that the other parts do not have
        probability = np.ones(len(level.counts))
        probability[pairs] = np.where(total > 0, (seen + kinds * coarser) / divisor, coarser)
    return probability


def _numbered(digits: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a number in [0, U) for each combination of digits that occurs, int32, and the digits [U] of each number.

    Numbers are in the order of the digits.

    digits: (values in [0, size), size) each; all values have one shape, and the numbers have it too.
    """
    sizes = [size for _, size in digits]
    for place in range(1, len(digits)):
        if math.prod(sizes[: place + 1]) >= 2**63:  # combinations so far are fewer than their digits allow
            begin, before = _numbered(digits[:place])
            numbers, rest = _numbered([(begin, len(before[0])), *digits[place:]])
            return numbers, [*(values[rest[0]] for values in before), *rest[1:]]
    shape, room = digits[0][0].shape, math.prod(sizes)
    total = math.prod(shape)
    rows = max(1, VALUES_AT_ONCE * shape[0] // total)
    parts = [slice(start, start + rows) for start in range(0, shape[0], rows)]
    numbers = np.empty(shape, np.int32)
    if room <= min(LARGEST_TABLE, 16 * total):
        occurs, table = np.zeros(room, bool), np.empty(room, np.int32)
        for part in parts:
            occurs[_keys(digits, part)] = True
        found = np.flatnonzero(occurs)
        table[found] = np.arange(len(found), dtype=np.int32)
        for part in parts:
            numbers[part] = table[_keys(digits, part)]
        return numbers, _digits(found, sizes)
    keys = np.empty(shape, np.int64)
    for part in parts:
        keys[part] = _keys(digits, part)
    ordered = np.sort(keys, axis=None)
    found = ordered[np.flatnonzero(np.diff(ordered, prepend=-1))]
    del ordered
    if len(found) <= total // 8:
        index = pd.Index(found)  # a hash table that fits in a cache
        for part in parts:
            numbers[part] = index.get_indexer(keys[part].ravel()).reshape(keys[part].shape)
    else:
        in_order, where = (each.numpy() for each in torch.sort(torch.from_numpy(keys.ravel())))
        numbers.ravel()[where] = _runs([in_order])
    return numbers, _digits(found, sizes)


def _keys(digits: list[tuple[np.ndarray, int]], part: slice) -> np.ndarray:
    """Return the number that digits write, int64. part: of the first axis."""
    keys = digits[0][0][part].astype(np.int64)
    for values, size in digits[1:]:
        keys *= size
        keys += values[part]
    return keys


def _digits(numbers: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Return the digits of numbers [U], the highest first, each below its size."""
    found = []
    for size in reversed(sizes):
        numbers, digit = np.divmod(numbers, size)
        found.append(digit.astype(np.int32))
    return found[::-1]


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
    objects, longest = tokens.ids.shape
    for name in ORDERS:
        order = tokens.order(name)
        equal, empty = np.zeros(longest + 1, np.int64), np.zeros(longest + 1, np.int64)  # how many have each length
        for start in range(0, objects, OBJECTS_AT_ONCE):
            ids = tokens.ids[start : start + OBJECTS_AT_ONCE, order]
            equal += np.bincount(run_lengths(_whole_tokens(ids, tokens))[0], minlength=longest + 1)
            if tokens.empty_ids is not None:
                lengths, gone = run_lengths(ids == tokens.empty_ids[order])
                empty += np.bincount(lengths[gone], minlength=longest + 1)
        results[name] = {
            "equal": _describe_runs(equal, objects),
            "empty": None if tokens.empty_ids is None else _describe_runs(empty, objects),
        }
    return results


def _whole_tokens(ids: np.ndarray, tokens: TokenSet) -> np.ndarray:
    """Return a number for each token of ids [B, T], [B, L]; tokens whose codes are all equal have equal ones."""
    if tokens.codes_per_token == 1:
        return ids
    codes = ids.reshape(len(ids), -1, tokens.codes_per_token)
    return _numbered([(codes[..., place], tokens.n_embed) for place in range(tokens.codes_per_token)])[0]


def _describe_runs(counts: np.ndarray, objects: int) -> dict:
    """Return what `run_stats` says of runs. counts: how many have each length."""
    number = int(counts.sum())
    if not number:
        return {"per_object": 0.0, "longest": 0, "doubling": []}
    lengths = np.flatnonzero(counts)
    doubling = np.bincount(np.log2(lengths).astype(int), weights=counts[lengths]).astype(int)
    return {
        "per_object": number / objects,
        "mean": float((lengths * counts[lengths]).sum() / number),
        **{name: _percentile(counts, percent) for name, percent in (("median", 50), ("p5", 5), ("p95", 95))},
        "longest": int(lengths[-1]),
        "doubling": doubling.tolist(),
    }


def _percentile(counts: np.ndarray, percent: float) -> float:
    """Return what np.percentile says of whole numbers, of which counts [n] tells how many there are of each."""
    up_to = counts.cumsum()
    at = percent / 100 * (int(up_to[-1]) - 1)
    below, above = np.searchsorted(up_to, [math.floor(at), math.ceil(at)], side="right").tolist()
    return below + (above - below) * (at - math.floor(at))


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


def spread(total: int, wanted: int) -> np.ndarray:
    """Return the indices of at most `wanted` of `total` objects, evenly spaced, [n] ascending."""
    return np.arange(total) if total <= wanted else np.arange(wanted) * total // wanted


def id_sizes(tokens: TokenSet) -> dict[str, dict]:
    """Return the bytes of an object's ids: {"packed" | "whole": {"raw": int, "deflate" | "lzma": {order: summary}}}.

    Each object is compressed by itself, of more than OBJECTS_TO_COMPRESS so many, evenly spaced.
    """
    ids = tokens.ids[spread(len(tokens.ids), OBJECTS_TO_COMPRESS)]
    results: dict[str, dict] = {}
    with ThreadPoolExecutor() as pool:  # compressors let other threads run
        for layout, write in LAYOUTS.items():
            results[layout] = {"raw": len(write(ids[0], tokens.n_embed)), **{name: {} for name in COMPRESSORS}}
            for order in ORDERS:
                rows = [write(row, tokens.n_embed) for row in ids[:, tokens.order(order)]]
                for name, size in COMPRESSORS.items():
                    results[layout][name][order] = summary(np.array([*pool.map(size, rows)]))
    return results


def grid_sizes(grids: np.ndarray) -> np.ndarray:
    """Return the bytes of packed grids after each of COMPRESSORS, [N, 2]. grids: [N, R³ / 8] uint8, a bit per voxel."""
    rows = [row.tobytes() for row in grids]
    with ThreadPoolExecutor() as pool:
        return np.array([[*pool.map(size, rows)] for size in COMPRESSORS.values()], np.int64).T
