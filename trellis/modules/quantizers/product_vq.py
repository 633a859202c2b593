"""Product quantization: each part of a vector has a codebook of its own (Jégou, Douze and Schmid, Product quantization
for nearest neighbor search, 2011).

Departure: the codebooks learn by gradient, as in `vq`, from k-means as in the paper.

Axes: D channels of a token, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Count, Range
from .base import Quantizer, nearest_ids, straight_through


class ProductVectorQuantizer(Quantizer):
    """Q codebooks of `n_embed` codes of D/Q channels; a token is one code from each, side by side.

    n_embed, embed_dim, latent_channels, group: see `Quantizer`. num_codes: codes of a token (Q). init: how a trainer
    fills fresh codebooks, "kmeans" part by part or "uniform" in ±1/K.
    Raises ValueError when embed_dim is no multiple of num_codes.
    """

    nearest_of_table = False

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        group: list[Count] | None = None,
        init: Literal["kmeans", "uniform"] = "kmeans",
        num_codes: Annotated[int, Range(min=2)] = 2,
    ):
        super().__init__(n_embed, embed_dim, latent_channels, group, init)
        if embed_dim % num_codes:
            raise ValueError(
                f"num_codes {num_codes} does not divide embed_dim {embed_dim} into equal parts; use a divisor of it"
            )
        self.codes_per_token = num_codes
        shape = (n_embed, embed_dim // num_codes)
        weights = [torch.empty(shape).uniform_(-1 / n_embed, 1 / n_embed) for _ in range(num_codes)]
        self.embeddings = nn.ModuleList(nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses: "vq" (codes towards latents) and "commit" (latents towards codes), means over elements."""
        parts = zip(vectors.chunk(self.codes_per_token, -1), self.tables(), strict=True)
        indices = torch.stack([nearest_ids(part, table) for part, table in parts], -1)
        codes = self.decode(indices)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return straight_through(codes, vectors), indices, losses

    def decode(self, indices: Tensor) -> Tensor:
        parts = zip(self.embeddings, indices.unbind(-1), strict=True)
        return torch.cat([embeddings(ids) for embeddings, ids in parts], -1)

    def tables(self) -> list[Tensor]:
        """The codebook of each part, [K, D/Q]."""
        return [embeddings.weight for embeddings in self.embeddings]

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        for part, table in zip(vectors.chunk(self.codes_per_token, -1), self.tables(), strict=True):
            table.copy_(kmeans(part.contiguous(), self.n_embed))
