"""The base of all quantizers: a map from latent vectors to codes, with ids that stand for the codes.

Axes: B batch, C latent channels, X Y Z latent cells, X' Y' Z' the lattice of tokens, D = embed_dim channels of a
token, L tokens of an object, K codes, Q codes per token, N vectors.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils import dist_utils
from ...utils.config import Count, Range
from ..model import Model
from .nearest import nearest_code


class Quantized(NamedTuple):
    """The result of a quantizer.

    losses: "vq" (moves codes towards latents) and "commit" (moves latents towards codes), each zero if the algorithm
    has no such term; "entropy" if it has one.
    """

    codes: Tensor  # [B, C, X, Y, Z] float32, given to the decoder; zero for empty tokens
    indices: Tensor  # [B, X', Y', Z'] int64 in [0, n_embed), or [B, X', Y', Z', Q] if a token has several codes
    losses: dict[str, Tensor]  # unweighted scalars; the trainer owns the weights


class Quantizer(Model):
    """Base of the quantizers: the shared arguments, the layout of tokens, and the methods that trainers call.

    An algorithm implements `quantize`, either `table` or `decode`, and `fill` or `fit`, which `init` "kmeans" needs.
    If unused codes can be revived, it has `code_rows` and `replace_codes`. All of it runs in fp32, even under
    autocast. It names its own arguments and passes the shared ones on as `**kwargs`.

    Token layout. A token holds the channels of its first cell, then those of the next, with the cells in order of x,
    y, z. On a 16³×8 latent, embed_dim 8 gives 4096 tokens on a 16×16×16 lattice, and embed_dim 32 gives 1024: on
    16×16×4 without a group, where token t covers x = t//64, y = (t//4) % 16, z = 4·(t % 4) … + 3, and on 8×8×16 with
    group [2, 2, 1].

    Empty code. With `empty_code`, id 0 says that a token's block of the grid has no voxel, and learned codes have the
    ids 1 and up. `forward` is told which tokens are occupied. The others are no vectors for the algorithm: they take
    part in no loss, average, fit or count, and their code is the zero vector.

    Raise ValueError if embed_dim does not hold whole cells, or not the number of cells in the group.
    """

    codes_per_token = 1  # Q
    losses: tuple[str, ...] = ("vq", "commit")  # names in `Quantized.losses` that the trainer weights
    decay: float | None = None  # part of the codes' moving averages kept at each forward; None if they have none
    nearest_of_table = True  # whether a vector's id is the row of `table()` nearest to it
    # State-dict keys whose rows belong to codes, which `replace_codes` can change; those of several codebooks one after
    # the other, equally many of each.
    code_rows: tuple[str, ...] = ()

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,  # ids of a codebook (K)
        embed_dim: Count = 8,  # channels of a token (D), a multiple of latent_channels
        latent_channels: Count = 8,  # channels of a latent cell (C)
        group: list[Count] | None = None,  # cells of a token along x, y and z; null for all along z
        init: Literal["kmeans", "uniform"] = "kmeans",  # a fresh codebook: fitted to latents, or random within ±1/K
        empty_code: bool = False,  # id 0 is for tokens whose block has no voxel; n_embed counts it
    ):
        super().__init__()
        if embed_dim % latent_channels:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of the latent's {latent_channels} channels: a code must "
                f"cover whole cells. Use a multiple, such as {latent_channels} or {4 * latent_channels}"
            )
        cells = embed_dim // latent_channels
        if group is not None and (len(group) != 3 or math.prod(group) != cells):
            raise ValueError(
                f"group is {list(group)}; it must be the cells of a token along x, y and z, {cells} in all, since "
                f"embed_dim {embed_dim} holds {cells} of {latent_channels} channels. Use one such as [1, 1, {cells}]"
            )
        self.n_embed, self.embed_dim, self.latent_channels = n_embed, embed_dim, latent_channels
        self.empty_code, self.first_code = empty_code, int(empty_code)
        self.codebook_size = n_embed - self.first_code  # learned codes: id - first_code is a code's row
        self.init: str = init
        self.group = (1, 1, cells) if group is None else tuple(group)
        self.cells_per_token = cells

    # --- the algorithm, which knows learned codes alone: rows [0, codebook_size) ---

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the codes, rows and losses of vectors, as in `Quantized`.

        vectors: [..., D] float32. The codes have the same shape; rows are [...], or [..., Q].
        """
        raise NotImplementedError

    def table(self) -> Tensor | None:
        """Return the learned codes, [codebook_size, D] float32, or None if no single table lists them."""
        return None

    def decode(self, indices: Tensor) -> Tensor:
        """Return the vectors [..., D] of rows [...] or, with several codes per token, of rows [..., Q]."""
        table = self.table()
        if table is None:
            raise NotImplementedError(f"{type(self).__name__} has neither `table` nor `decode`")
        return F.embedding(indices, table)

    def forward(self, z: Tensor, occupied: Tensor | None = None) -> Quantized:
        """Quantize z, [B, C, X, Y, Z] float.

        occupied: [B, X', Y', Z'] bool, the tokens whose block has a voxel; needed with an empty code, else unused.
        Raise ValueError if channels, cells or `occupied` do not fit.
        """
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.to_vectors(z.float())
            if self.empty_code:
                codes, indices, losses = self._quantize_occupied(vectors, occupied)
            else:
                codes, indices, losses = self.quantize(vectors)
        return Quantized(self.ungroup_cells(codes), indices, losses)

    def _quantize_occupied(self, vectors: Tensor, occupied: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize the occupied ones of vectors [B, X', Y', Z', D]. Return codes and ids of all, and the losses."""
        if occupied is None or occupied.shape != vectors.shape[:-1]:
            given = "missing" if occupied is None else f"{list(occupied.shape)}"
            raise ValueError(f"with an empty code, occupied must be {list(vectors.shape[:-1])}; it is {given}")
        flat = vectors.flatten(0, -2)
        chosen = occupied.flatten().nonzero()[:, 0]
        several = (self.codes_per_token,) if self.codes_per_token > 1 else ()
        # Also if there is no vector: other ranks may wait for this one's sums.
        found, rows, losses = self.quantize(flat[chosen])
        if not len(chosen):  # means over nothing
            losses = dict.fromkeys(losses, found.sum())
        codes = torch.zeros_like(flat).index_copy(0, chosen, found)
        ids = chosen.new_zeros(len(flat), *several).index_copy(0, chosen, rows + self.first_code)
        return codes.view_as(vectors), ids.view(*occupied.shape, *several), losses

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes of token indices, [B, C, X, Y, Z] float32.

        indices: [B, X', Y', Z'] int64, or [B, L] in the same order for a cubic latent. With Q codes per token,
        [B, X', Y', Z', Q] or [B, L·Q], a token's codes one after the other.
        Raise ValueError if the tokens do not make a cube.
        """
        indices = self._on_lattice(indices)
        with torch.autocast(indices.device.type, enabled=False):
            if not self.empty_code:
                return self.ungroup_cells(self.decode(indices))
            # Id 0 has no row: it takes any, which is then hidden. Other wrong ids fail as without an empty code.
            codes = self.decode(torch.where(indices == 0, 0, indices - 1))
            return self.ungroup_cells(torch.where(self.occupied(indices)[..., None], codes, 0.0))

    def occupied(self, indices: Tensor) -> Tensor:
        """Return which tokens are not empty, [B, X', Y', Z'] bool: all of them without an empty code.

        indices: [B, X', Y', Z'] or [B, X', Y', Z', Q]. The codes of a token are all 0, or none is.
        """
        first = indices[..., 0] if self.codes_per_token > 1 else indices
        return first >= self.first_code

    def code_channels(self) -> int:
        """Return the channels of a code (d): those of the token, unless it is one of several side by side."""
        return self.embed_dim

    def parts(self, vectors: Tensor, codes: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what each codebook quantizes and the codes that it gives for it, both [..., d].

        vectors, codes: [..., D]; rows: [...] or [..., Q]. By default there is one codebook, for whole vectors.
        """
        return [(vectors, codes)]

    # --- a codebook from data ---

    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        """Fit a fresh codebook to the data. vectors: [N, D] latents; kmeans(vectors [N, d], n) gives codes [n, d]."""
        self.fill(kmeans(vectors, self.codebook_size))

    def fill(self, codes: Tensor) -> None:
        """Set the codebook to `codes` [codebook_size, D], with the statistics of a fresh one."""
        raise NotImplementedError(
            f"{type(self).__name__} has no codebook to fill: implement fill or fit, or "
            'set init to another value than "kmeans"'
        )

    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        """Set the codes `rows` [n] int64 to `vectors` [n, D], with the statistics of fresh codes.

        With several codebooks, row k of codebook q is q·codebook_size + k, and vectors are as in `parts`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codes to replace: its code_rows are empty")

    # --- the layout of tokens ---

    def lattice(self, cells: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the tokens along x, y and z of a latent of `cells`. Raise ValueError if the group does not fit."""
        for axis, count, size in zip("xyz", cells, self.group, strict=True):
            if count % size:
                raise ValueError(
                    f"a code of embed_dim {self.embed_dim} covers {size} cells along {axis}, and the latent's {count} "
                    f"cells do not divide by that. Use a group (now {list(self.group)}) or an embed_dim that does"
                )
        x, y, z = (count // size for count, size in zip(cells, self.group, strict=True))
        return x, y, z

    def group_cells(self, x: Tensor) -> Tensor:
        """Gather the values of each token's cells: [B, C, X, Y, Z] to [B, X', Y', Z', cells·C], for any C."""
        X, Y, Z = x.shape[2:]
        tokens = self.lattice((X, Y, Z))
        split = [size for pair in zip(tokens, self.group, strict=True) for size in pair]
        cells = x.permute(0, 2, 3, 4, 1).reshape(len(x), *split, x.shape[1])  # [B, X', gx, Y', gy, Z', gz, C]
        return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(x), *tokens, self.cells_per_token * x.shape[1])

    def ungroup_cells(self, x: Tensor) -> Tensor:
        """Invert `group_cells`: [B, X', Y', Z', cells·C] to [B, C, X, Y, Z]."""
        B, *tokens, width = x.shape
        cells = x.reshape(B, *tokens, *self.group, width // self.cells_per_token).permute(0, 1, 4, 2, 5, 3, 6, 7)
        shape = [count * size for count, size in zip(tokens, self.group, strict=True)]
        return cells.reshape(B, *shape, cells.shape[-1]).permute(0, 4, 1, 2, 3)

    def to_vectors(self, z: Tensor) -> Tensor:
        """Return the vectors to quantize: [B, C, X, Y, Z] to [B, X', Y', Z', D].

        Raise ValueError if the channels or the cells do not fit.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"the latent must be [B, {self.latent_channels}, X, Y, Z]; it is {list(z.shape)}")
        return self.group_cells(z)

    def _on_lattice(self, indices: Tensor) -> Tensor:
        """Lay out flat ids of a cubic latent on its lattice. Return other ids unchanged."""
        several = (self.codes_per_token,) if self.codes_per_token > 1 else ()
        if indices.ndim != 2:
            wanted = ["B", "X'", "Y'", "Z'", *several]
            if indices.ndim != len(wanted) or (several and indices.shape[-1] != self.codes_per_token):
                raise ValueError(f"indices must be [{', '.join(map(str, wanted))}]; they are {list(indices.shape)}")
            return indices
        B, count = indices.shape
        L = count // self.codes_per_token
        side = round((L * self.cells_per_token) ** (1 / 3))
        whole = L * self.codes_per_token == count and side**3 == L * self.cells_per_token
        if not whole or any(side % size for size in self.group):
            each = f" in {count} codes, {self.codes_per_token} per token," if several else ""
            raise ValueError(
                f"{L} tokens{each} of {self.cells_per_token} cells do not make a cubic latent; give "
                f"[B, X, Y, Z{', Q' if several else ''}] indices"
            )
        return indices.view(B, *self.lattice((side, side, side)), *several)


def nearest_ids(vectors: Tensor, table: Tensor) -> Tensor:
    """Return the indices [...] of the rows of `table` [K, D] nearest to `vectors` [..., D]."""
    return nearest_code(vectors.detach().flatten(0, -2), table.detach()).view(vectors.shape[:-1])


def straight_through(codes: Tensor, estimate: Tensor) -> Tensor:
    """Return the exact values of `codes`, with gradients for both `codes` and `estimate`, which has the same shape."""
    return codes + (estimate - estimate.detach()) if estimate.requires_grad else codes


def entropy_loss(own: Tensor, share: Tensor, vectors: int, *, over_ranks: bool) -> Tensor:
    """Return the mean entropy of each vector's soft choice minus the entropy of the mean choice, in nats.

    own: the mean entropy of a vector's choice, a scalar.
    share: [K], the mean choice over this rank's vectors.
    vectors: their number, by which a rank counts in the mean over ranks.
    over_ranks: average the mean choice over all ranks, each of which must then call this. The gradient is the joint
        batch's once ranks average their gradients, each times its number of vectors over the mean number.
    """
    if over_ranks:
        count = share.new_tensor(float(vectors))
        joint = dist_utils.all_sum(share.detach() * count) / dist_utils.all_sum(count).clamp(min=1)
        share = joint + (share - share.detach())
    # The clamp keeps the gradient finite at a share of zero.
    return own + (share * share.clamp(min=1e-30).log()).sum()
