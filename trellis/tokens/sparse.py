"""The sparse form, ids without their empty tokens, and the order in which a lattice is read.

Most tokens of an object stand for empty space: their ids are the empty grid's at the same index. The sparse form keeps
the other ids, and one number for each run of empty tokens. It is lossless.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import DataError


def to_sparse(
    ids: Sequence[int] | Tensor, empty_ids: Sequence[int] | Tensor, n_embed: int, order: Tensor | None = None
) -> list[int]:
    """Return the sparse form, values in [0, n_embed + T).

    An id that differs from the empty grid's at the same index stays itself. A run of n ids that are the empty grid's
    becomes n_embed + n - 1.
    ids, empty_ids: [T] in [0, n_embed).
    order: [T], a permutation such as `morton_order`'s; None for the order of ids.
    Raise DataError for ids out of range, and if ids and empty_ids have different lengths.
    """
    codes, empty_codes = _checked(ids, "ids", n_embed), _checked(empty_ids, "empty_ids", n_embed)
    if len(codes) != len(empty_codes):
        raise DataError(
            f"there are {len(codes)} ids, but {len(empty_codes)} of an empty grid; both must come from one tokenizer"
        )
    if order is not None:
        codes, empty_codes = codes[order.cpu().numpy()], empty_codes[order.cpu().numpy()]
    sparse, run = [], 0
    for code, empty in zip(codes.tolist(), (codes == empty_codes).tolist(), strict=True):
        if empty:
            run += 1
            continue
        if run:
            sparse.append(n_embed + run - 1)
            run = 0
        sparse.append(code)
    return sparse + ([n_embed + run - 1] if run else [])


def from_sparse(
    sparse: Sequence[int] | Tensor, empty_ids: Sequence[int] | Tensor, n_embed: int, order: Tensor | None = None
) -> Tensor:
    """Return the ids [T] int64 of a sparse form: the exact inverse of `to_sparse`, with the same arguments.

    A run may also be given in parts, and an empty token as its id.
    Raise DataError for values out of range, and if the number of tokens is not T.
    """
    ids = _checked(empty_ids, "empty_ids", n_embed).copy()
    total = len(ids)
    values = _checked(sparse, "sparse values", n_embed + total)
    lengths = np.where(values < n_embed, 1, values - n_embed + 1)
    if lengths.sum() != total:
        raise DataError(f"the sparse form stands for {lengths.sum()} tokens, not {total}")
    indices = np.arange(total) if order is None else order.cpu().numpy()
    kept = values < n_embed
    ids[indices[(lengths.cumsum() - lengths)[kept]]] = values[kept]
    return torch.from_numpy(ids)


def morton_order(lattice: Sequence[int], codes_per_token: int = 1) -> Tensor:
    """Return the permutation into Morton order, int64 [T]: ids[..., order] is in it, order.argsort() is the inverse.

    Tokens are sorted by the interleaved bits of x, y and z, the lowest bit from z (Morton, A computer oriented geodetic
    data base, IBM 1966). A shorter axis has no high bits: a 16×16×4 lattice is read as a Morton-ordered square of 4³
    cubes. The codes of a token stay together.
    lattice: (X', Y', Z'), of any sizes; T = X'·Y'·Z'·codes_per_token.
    """
    order = morton_keys(lattice).argsort()
    return torch.from_numpy((order[:, None] * codes_per_token + np.arange(codes_per_token)).reshape(-1))


def morton_keys(lattice: Sequence[int]) -> np.ndarray:
    """Return the interleaved bits of each token's x, y and z, int64 [X'·Y'·Z'] in order of the lattice, z fastest."""
    coordinates = np.indices(tuple(lattice)).reshape(3, -1)
    keys = np.zeros(coordinates.shape[1], dtype=np.int64)
    for bit in range(max(size - 1 for size in lattice).bit_length()):
        for axis, values in enumerate(coordinates):
            keys |= ((values >> bit) & 1) << (3 * bit + 2 - axis)
    return keys


def _checked(values: Sequence[int] | Tensor, name: str, limit: int) -> np.ndarray:
    """Return values [n] as int64. Raise DataError for another shape or type, and for values outside [0, limit)."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise DataError(f"{name} must be integers in one row, not {array.dtype} {list(array.shape)}")
    array = array.astype(np.int64)
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        index = int(wrong.argmax())
        raise DataError(f"{name}: number {index} is {array[index]}; it must lie in [0, {limit})")
    return array
