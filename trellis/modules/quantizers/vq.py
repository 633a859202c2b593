"""Vector quantization (arXiv:1711.00937) of sparse-structure latents, in the token layout of ShapeLLM-Omni
(arXiv:2506.01853).

Departure: the decoder gets e + (z - sg[z]) in place of the paper's z + sg[e - z]. Both have the value e and
pass the decoder's gradient on to z; the first also gives it to the chosen codes, so the reconstruction loss
trains them, even where the encoder is frozen.

Axes: B batch, C latent channels, X Y Z latent cells, G cells per token along z, T tokens, K codes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Count, Range
from .common import Quantized
from .nearest import nearest_code


class VectorQuantizer(nn.Module):
    """A codebook of `n_embed` vectors, each standing for G = embed_dim / latent_channels cells along z.

    n_embed: codes (K). embed_dim: channels of a code; a token takes the C channels of its first cell, then
    of the next. On a 16³×8 latent, embed_dim 8 gives 4096 tokens on a 16×16×16 lattice and embed_dim 32
    gives 1024 on 16×16×4, where token t covers x = t//64, y = (t//4) % 16, z = 4·(t % 4) … + 3.
    init: how a trainer fills a fresh codebook, "kmeans" over the encoder's latents or "uniform" in ±1/K.
    Raises ValueError when embed_dim is no multiple of latent_channels.
    """

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        init: Literal["kmeans", "uniform"] = "kmeans",
    ):
        super().__init__()
        if embed_dim % latent_channels:
            raise ValueError(
                f"embed_dim {embed_dim} is no multiple of the latent's {latent_channels} channels: a code must "
                f"cover whole cells. Use a multiple, such as {latent_channels} or {4 * latent_channels}"
            )
        self.n_embed, self.embed_dim, self.latent_channels, self.init = n_embed, embed_dim, latent_channels, init
        self.cells_per_token = embed_dim // latent_channels
        weight = torch.empty(n_embed, embed_dim).uniform_(-1 / n_embed, 1 / n_embed)
        self.embeddings = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, z: Tensor) -> Quantized:
        """z: [B, C, X, Y, Z] float. See `Quantized`; losses: "vq" (codes towards latents) and "commit"
        (latents towards codes), each a mean over elements, neither weighted."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            vectors = self.to_vectors(z)  # [B, X, Y, Z/G, embed_dim]
            lattice = vectors.shape[:-1]
            indices = nearest_code(vectors.detach().flatten(0, -2), self.embeddings.weight.detach()).view(lattice)
            codes = self.lookup(indices)
            losses = {"vq": F.mse_loss(codes, z.detach()), "commit": F.mse_loss(z, codes.detach())}
            if z.requires_grad:
                codes = codes + (z - z.detach())
        return Quantized(codes, indices, losses)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of token indices. indices: [B, X, Y, Z/G] int64, or [B, T] in the same order for a cubic latent.
        Returns [B, C, X, Y, Z] float32. Raises ValueError where T tokens make no cube."""
        if indices.ndim == 2:
            B, T = indices.shape
            side = round((T * self.cells_per_token) ** (1 / 3))
            if side**3 != T * self.cells_per_token:
                raise ValueError(
                    f"{T} tokens of {self.cells_per_token} cells make no cubic latent; give [B, X, Y, Z] indices"
                )
            indices = indices.view(B, side, side, side // self.cells_per_token)
        vectors = F.embedding(indices, self.embeddings.weight)  # [B, X, Y, Z/G, embed_dim]
        B, X, Y, tokens, _ = vectors.shape
        cells = vectors.reshape(B, X, Y, tokens * self.cells_per_token, self.latent_channels)
        return cells.permute(0, 4, 1, 2, 3)

    def to_vectors(self, z: Tensor) -> Tensor:
        """The vectors to be quantized: [B, C, X, Y, Z] to [B, X, Y, Z/G, embed_dim].

        Raises ValueError when the channels or the cells along z do not fit.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"the latent must be [B, {self.latent_channels}, X, Y, Z]; it is {list(z.shape)}")
        B, C, X, Y, Z = z.shape
        if Z % self.cells_per_token:
            raise ValueError(
                f"a code of embed_dim {self.embed_dim} covers {self.cells_per_token} cells along z, and the "
                f"latent's {Z} cells do not divide by that. Use an embed_dim of {C} times a divisor of {Z}"
            )
        return z.permute(0, 2, 3, 4, 1).reshape(B, X, Y, Z // self.cells_per_token, self.embed_dim)
