"""What every quantizer is: a map from vectors of a latent to codes, with ids that stand for them.

Axes: B batch, C latent channels, X Y Z latent cells, X' Y' Z' the lattice of tokens, D = embed_dim channels of a
token, K codes, Q codes of a token, N vectors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils import dist_utils
from .nearest import nearest_code


class Quantized(NamedTuple):
    """losses has "vq" (codes towards latents) and "commit" (latents towards codes), zero where an algorithm has no
    such term, and "entropy" where it has one."""

    codes: Tensor  # [B, C, X, Y, Z] float32, given to the decoder
    indices: Tensor  # [B, X', Y', Z'] int64 in [0, n_embed), or [B, X', Y', Z', Q] where a token has several codes
    losses: dict[str, Tensor]  # unweighted scalars; the trainer owns the weights


class Quantizer(nn.Module):
    """Base of the quantizers: the layout of tokens, and what a trainer may ask for.

    An algorithm has `quantize`, and either `table` or `decode`; all of it runs in fp32, whatever autocast says.

    n_embed: codes (K). embed_dim: channels of a token (D). latent_channels: channels of a cell (C). group: cells of a
    token along x, y and z; null for all along z. A token takes the channels of its first cell, then of the next, the
    cells in order of x, y, z. On a 16³×8 latent, embed_dim 8 gives 4096 tokens on a 16×16×16 lattice, and embed_dim
    32 gives 1024: on 16×16×4 without a group, where token t covers x = t//64, y = (t//4) % 16, z = 4·(t % 4) … + 3,
    and on 8×8×16 with group [2, 2, 1].
    Raises ValueError where embed_dim is not what the cells of a token hold.
    """

    codes_per_token = 1  # Q
    nearest_of_table = True  # whether an id is that of the row of `table()` nearest to the vector
    code_rows: tuple[str, ...] = ()  # state-dict keys whose rows belong to codes, which `replace_codes` can change

    def __init__(
        self, n_embed: int, embed_dim: int, latent_channels: int, group: list[int] | None = None, init: str = "none"
    ):
        super().__init__()
        if embed_dim % latent_channels:
            raise ValueError(
                f"embed_dim {embed_dim} is no multiple of the latent's {latent_channels} channels: a code must "
                f"cover whole cells. Use a multiple, such as {latent_channels} or {4 * latent_channels}"
            )
        cells = embed_dim // latent_channels
        if group is not None and (len(group) != 3 or math.prod(group) != cells):
            raise ValueError(
                f"group is {list(group)}; it must be the cells of a token along x, y and z, {cells} in all, since "
                f"embed_dim {embed_dim} holds {cells} of {latent_channels} channels. Use one such as [1, 1, {cells}]"
            )
        self.n_embed, self.embed_dim, self.latent_channels, self.init = n_embed, embed_dim, latent_channels, init
        self.group = (1, 1, cells) if group is None else tuple(group)
        self.cells_per_token = cells

    # --- the algorithm ---

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """vectors: [B, X', Y', Z', D] float32. Returns codes of this shape, ids and losses as in `Quantized`."""
        raise NotImplementedError

    def table(self) -> Tensor | None:
        """What each id stands for, [K, D] float32, or None where no one table says so."""
        return None

    def decode(self, indices: Tensor) -> Tensor:
        """Vectors [..., D] of ids [...] or, with several codes, [..., Q]."""
        return F.embedding(indices, self.table())

    def forward(self, z: Tensor) -> Quantized:
        """z: [B, C, X, Y, Z] float. Raises ValueError where its channels or cells do not fit."""
        with torch.autocast(z.device.type, enabled=False):
            codes, indices, losses = self.quantize(self.to_vectors(z.float()))
        return Quantized(self.ungroup_cells(codes), indices, losses)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of token indices. indices: [B, X', Y', Z'] int64, or [B, T] in the same order for a cubic latent;
        with Q codes a token [B, X', Y', Z', Q] or [B, T·Q], a token's codes one after the other.
        Returns [B, C, X, Y, Z] float32. Raises ValueError where the tokens make no cube."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.ungroup_cells(self.decode(self._on_lattice(indices)))

    # --- a codebook from data ---

    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        """Start from the data. vectors: [N, D] latent vectors; kmeans(vectors [N, d], K) gives codes [K, d]."""
        self.fill(kmeans(vectors, self.n_embed))

    def fill(self, codes: Tensor) -> None:
        """Put a codebook [K, D] in place, with the statistics of a fresh one."""
        raise NotImplementedError(f"{type(self).__name__} has no codebook to fill; call fit with latent vectors")

    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        """Let codes `rows` [n] int64 stand for `vectors` [n, D], with the statistics of fresh ones."""
        raise NotImplementedError(f"{type(self).__name__} has no codes to replace: its code_rows are empty")

    # --- the layout of tokens ---

    def lattice(self, cells: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along x, y and z of a latent with so many cells. Raises ValueError where the group does not fit."""
        for axis, count, size in zip("xyz", cells, self.group, strict=True):
            if count % size:
                raise ValueError(
                    f"a code of embed_dim {self.embed_dim} covers {size} cells along {axis}, and the latent's {count} "
                    f"cells do not divide by that. Use a group (now {list(self.group)}) or an embed_dim that does"
                )
        return tuple(count // size for count, size in zip(cells, self.group, strict=True))

    def group_cells(self, x: Tensor) -> Tensor:
        """Values of cells as values of tokens: [B, C, X, Y, Z] to [B, X', Y', Z', cells·C], for any number C."""
        tokens = self.lattice(tuple(x.shape[2:]))
        split = [size for pair in zip(tokens, self.group, strict=True) for size in pair]
        cells = x.permute(0, 2, 3, 4, 1).reshape(len(x), *split, x.shape[1])  # [B, X', gx, Y', gy, Z', gz, C]
        return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(x), *tokens, self.cells_per_token * x.shape[1])

    def ungroup_cells(self, x: Tensor) -> Tensor:
        """The inverse of `group_cells`, [B, X', Y', Z', cells·C] to [B, C, X, Y, Z]."""
        B, *tokens, width = x.shape
        cells = x.reshape(B, *tokens, *self.group, width // self.cells_per_token).permute(0, 1, 4, 2, 5, 3, 6, 7)
        shape = [count * size for count, size in zip(tokens, self.group, strict=True)]
        return cells.reshape(B, *shape, cells.shape[-1]).permute(0, 4, 1, 2, 3)

    def to_vectors(self, z: Tensor) -> Tensor:
        """The vectors to be quantized: [B, C, X, Y, Z] to [B, X', Y', Z', D].

        Raises ValueError when the channels or the cells do not fit.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"the latent must be [B, {self.latent_channels}, X, Y, Z]; it is {list(z.shape)}")
        return self.group_cells(z)

    def _on_lattice(self, indices: Tensor) -> Tensor:
        """Flat ids of a cubic latent laid out on its lattice; others as they are."""
        several = (self.codes_per_token,) if self.codes_per_token > 1 else ()
        if indices.ndim != 2:
            wanted = ["B", "X'", "Y'", "Z'", *several]
            if indices.ndim != len(wanted) or (several and indices.shape[-1] != self.codes_per_token):
                raise ValueError(f"indices must be [{', '.join(map(str, wanted))}]; they are {list(indices.shape)}")
            return indices
        B, count = indices.shape
        T = count // self.codes_per_token
        side = round((T * self.cells_per_token) ** (1 / 3))
        whole = T * self.codes_per_token == count and side**3 == T * self.cells_per_token
        if not whole or any(side % size for size in self.group):
            each = f" in {count} codes, {self.codes_per_token} a token," if several else ""
            raise ValueError(
                f"{T} tokens{each} of {self.cells_per_token} cells make no cubic latent; give "
                f"[B, X, Y, Z{', Q' if several else ''}] indices"
            )
        return indices.view(B, *self.lattice((side, side, side)), *several)


def nearest_ids(vectors: Tensor, table: Tensor) -> Tensor:
    """Index [...] of the row of `table` [K, D] nearest to each of `vectors` [..., D]."""
    return nearest_code(vectors.detach().flatten(0, -2), table.detach()).view(vectors.shape[:-1])


def straight_through(codes: Tensor, estimate: Tensor) -> Tensor:
    """codes, exactly, whose gradient goes both to codes and to `estimate`, of the same shape."""
    return codes + (estimate - estimate.detach()) if estimate.requires_grad else codes


def entropy_loss(own: Tensor, share: Tensor, *, over_ranks: bool) -> Tensor:
    """The mean entropy of one vector's soft choice less the entropy of the mean choice, in nats.

    own: that mean, a scalar. share: [K], the mean choice. over_ranks: take the mean choice over all ranks, each of
    which must then come here; the gradient is that of the joint batch once ranks average theirs.
    """
    if over_ranks:
        share = dist_utils.all_mean(share.detach()) + (share - share.detach())
    # The clamp keeps the gradient finite at a share of zero.
    return own + (share * share.clamp(min=1e-30).log()).sum()
