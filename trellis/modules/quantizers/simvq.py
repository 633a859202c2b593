"""SimVQ: a codebook that moves as a whole (arXiv:2411.02038).

The codes are a base, which stays as it is, times a learned linear map. Every code moves with each step, also those
that no vector chose, so that the codebook does not collapse onto a few.

Departures: the map starts as the identity, so that the base is the first codebook, and it may be the k-means of the
latents in place of random codes. The gradient of `vq`, e + (z - sg[z]), gives the map the reconstruction loss too.

Axes: D channels of a code, K codes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Count, Range
from .base import Quantizer, nearest_ids, straight_through


class SimVQ(Quantizer):
    """codes = base [K, D] · map [D, D]. A vector gets the nearest code.

    n_embed, embed_dim, latent_channels, group: see `Quantizer`. init: "kmeans" for a base of k-means codes of the
    encoder's latents, "normal" for one of normal numbers with norm 1 in the mean of squares.
    """

    code_rows = ("base",)

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        group: list[Count] | None = None,
        init: Literal["kmeans", "normal"] = "kmeans",
    ):
        super().__init__(n_embed, embed_dim, latent_channels, group, init)
        self.register_buffer("base", torch.randn(n_embed, embed_dim) / embed_dim**0.5)
        self.map = nn.Parameter(torch.eye(embed_dim))

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses: "vq" (codes towards latents) and "commit" (latents towards codes), means over elements."""
        table = self.table()
        indices = nearest_ids(vectors, table)
        codes = F.embedding(indices, table)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return straight_through(codes, vectors), indices, losses

    def table(self) -> Tensor:
        # In fp64, so that devices agree on the codes, as they do on which one is nearest.
        return (self.base.double() @ self.map.double()).float()

    @torch.no_grad()
    def fill(self, codes: Tensor) -> None:
        self.base.copy_(codes)
        self.map.copy_(torch.eye(self.embed_dim))

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        """The base gets what the map turns into the vectors, as nearly as a map that has lost its rank can."""
        inverse = torch.linalg.pinv(self.map.double())
        self.base[rows] = (vectors.to(inverse) @ inverse).float()
