"""Ids without their empty tokens, and the order in which a lattice is read.

Most tokens of an object stand for empty space, and the ids of an empty grid say what they are. The sparse form keeps
the others, and one number for each run of empty ones. Nothing is lost: it turns back into the same ids.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import DataError


def to_sparse(
    ids: Sequence[int] | Tensor, empty_ids: Sequence[int] | Tensor, n_embed: int, order: Tensor | None = None
) -> list[int]:
    """The sparse form: an id that differs from the empty grid's at its place is itself, a run of n that do not is
    n_embed + n - 1; so values lie in [0, n_embed + T).

    ids, empty_ids: [T] in [0, n_embed). order: [T], a permutation such as `morton_order`'s; None for the order of ids.
    Raises DataError for ids out of range or of another number than empty_ids.
    """
    ids, empty_ids = (_checked(values, name, n_embed) for values, name in ((ids, "ids"), (empty_ids, "empty_ids")))
    if len(ids) != len(empty_ids):
        raise DataError(
            f"there are {len(ids)} ids, but {len(empty_ids)} of an empty grid; both must come from one tokenizer"
        )
    if order is not None:
        ids, empty_ids = ids[order.cpu().numpy()], empty_ids[order.cpu().numpy()]
    sparse, run = [], 0
    for code, empty in zip(ids.tolist(), (ids == empty_ids).tolist(), strict=True):
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
    """The ids [T] int64 of a sparse form. Arguments as of `to_sparse`, which it undoes exactly. Runs may also be
    given in parts, and an empty token as its id. Raises DataError for values out of range and for another number of
    tokens than T."""
    empty_ids = _checked(empty_ids, "empty_ids", n_embed)
    total = len(empty_ids)
    sparse = _checked(sparse, "sparse values", n_embed + total)
    lengths = np.where(sparse < n_embed, 1, sparse - n_embed + 1)
    if lengths.sum() != total:
        raise DataError(f"the sparse form stands for {lengths.sum()} tokens, not {total}")
    places = np.arange(total) if order is None else order.cpu().numpy()
    kept = sparse < n_embed
    ids = empty_ids.copy()
    ids[places[(lengths.cumsum() - lengths)[kept]]] = sparse[kept]
    return torch.from_numpy(ids)


def morton_order(lattice: Sequence[int], codes_per_token: int = 1) -> Tensor:
    """The permutation that puts ids in Morton order: ids[..., order] is in it, order.argsort() leads back.

    lattice: (X', Y', Z'), any. A place is sorted by the bits of its x, y and z interleaved, those of z lowest
    (Morton, A computer oriented geodetic data base, IBM 1966); an axis with fewer places drops out of the high bits,
    so 16×16×4 is read by cubes of 4³, and these by squares. A token's codes stay together.
    Returns int64 [T] with T = X'·Y'·Z'·codes_per_token.
    """
    coordinates = np.indices(lattice).reshape(3, -1)  # of the places, z fastest
    key = np.zeros(coordinates.shape[1], dtype=np.int64)
    for bit in range(max(size - 1 for size in lattice).bit_length()):
        for axis, values in enumerate(coordinates):
            key |= ((values >> bit) & 1) << (3 * bit + 2 - axis)
    order = key.argsort()
    return torch.from_numpy((order[:, None] * codes_per_token + np.arange(codes_per_token)).reshape(-1))


def _checked(values: Sequence[int] | Tensor, name: str, limit: int) -> np.ndarray:
    """values [n] as int64. Raises DataError for another shape or type, or outside [0, limit)."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise DataError(f"{name} must be integers in one row, not {array.dtype} {list(array.shape)}")
    array = array.astype(np.int64)
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(f"{name}: number {place} is {array[place]}; it must lie in [0, {limit})")
    return array
