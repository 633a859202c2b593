"""Vector quantization (arXiv:1711.00937) of sparse-structure latents, in the token layout of ShapeLLM-Omni
(arXiv:2506.01853).

Departure: the decoder gets e + (z - sg[z]) in place of the paper's z + sg[e - z]. Both have the value e and
pass the decoder's gradient on to z; the first also gives it to the chosen codes, so the reconstruction loss
trains them, even where the encoder is frozen.

Axes: N vectors, D channels of a code, K codes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Count, Range
from .base import Quantizer, nearest_ids, straight_through


class VectorQuantizer(Quantizer):
    """A codebook of `n_embed` vectors that learns by gradient. A vector gets the nearest code.

    n_embed, embed_dim, latent_channels, group: see `Quantizer`.
    init: how a trainer fills a fresh codebook, "kmeans" over the encoder's latents or "uniform" in ±1/K.
    """

    code_rows = ("embeddings.weight",)

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        group: list[Count] | None = None,
        init: Literal["kmeans", "uniform"] = "kmeans",
    ):
        super().__init__(n_embed, embed_dim, latent_channels, group, init)
        weight = torch.empty(n_embed, embed_dim).uniform_(-1 / n_embed, 1 / n_embed)
        self.embeddings = nn.Embedding.from_pretrained(weight, freeze=False)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses: "vq" (codes towards latents) and "commit" (latents towards codes), means over elements."""
        indices = nearest_ids(vectors, self.table())
        codes = self.decode(indices)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return self.estimate(codes, vectors), indices, losses

    def estimate(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """The codes with a gradient for the vectors."""
        return straight_through(codes, vectors)

    def table(self) -> Tensor:
        return self.embeddings.weight

    @torch.no_grad()
    def fill(self, codes: Tensor) -> None:
        self.embeddings.weight.copy_(codes)

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        self.embeddings.weight[rows] = vectors.to(self.embeddings.weight)
