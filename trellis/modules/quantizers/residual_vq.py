"""Residual quantization: each further code stands for what the codes before it left over (RQ-VAE, arXiv:2203.01941).

Departures: the codebooks learn by gradient and not from moving averages, and each stage has its own, as in the
paper's ablation. The losses are means over stages where the paper sums, so that weights keep their meaning. The
gradient of `vq`, e + (z - sg[z]), gives the codes the reconstruction loss too.

Axes: D channels of a code, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Count, Range
from .base import Quantizer, nearest_ids, straight_through


class ResidualVectorQuantizer(Quantizer):
    """Q codebooks of `n_embed` codes; a token is the sum of one code from each.

    n_embed, embed_dim, latent_channels, group: see `Quantizer`. num_codes: codes of a token (Q), the first the
    coarsest. init: how a trainer fills fresh codebooks, "kmeans" stage by stage or "uniform" in ±1/K.
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
        self.codes_per_token = num_codes
        weights = [torch.empty(n_embed, embed_dim).uniform_(-1 / n_embed, 1 / n_embed) for _ in range(num_codes)]
        self.embeddings = nn.ModuleList(nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses: "vq" (each code towards what was left before it) and "commit" (latents towards the sum of the codes
        so far), means over elements and stages."""
        left = vectors.detach()
        codes, indices, vq, commit = 0, [], 0, 0
        for embeddings in self.embeddings:
            ids = nearest_ids(left, embeddings.weight)
            chosen = embeddings(ids)
            codes = codes + chosen
            vq = vq + F.mse_loss(chosen, left)
            commit = commit + F.mse_loss(vectors, codes.detach())
            left = left - chosen.detach()
            indices.append(ids)
        losses = {"vq": vq / self.codes_per_token, "commit": commit / self.codes_per_token}
        return straight_through(codes, vectors), torch.stack(indices, -1), losses

    def decode(self, indices: Tensor) -> Tensor:
        return sum(embeddings(ids) for embeddings, ids in zip(self.embeddings, indices.unbind(-1), strict=True))

    def tables(self) -> list[Tensor]:
        """The codebook of each stage, [K, D]."""
        return [embeddings.weight for embeddings in self.embeddings]

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        left = vectors
        for table in self.tables():
            table.copy_(kmeans(left, self.n_embed))
            left = left - F.embedding(nearest_ids(left, table), table)
