"""SimVQ: a codebook that moves as a whole (arXiv:2411.02038).

The codes are a fixed base times a learned linear map. Every code moves with each step, also those that no vector
chose, so that the codebook does not collapse onto a few.

Departures: the map starts as the identity, so that the base is the first codebook. The base may be the k-means of
the latents in place of random codes. The gradient of `vq`, e + (z - sg[z]), gives the map the reconstruction loss too.

Axes: D channels of a code, K codes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantizer, nearest_ids, straight_through


class SimVQ(Quantizer):
    """codes = base [K, D] · map [D, D]. A vector gets the nearest code."""

    code_rows = ("base",)
    base: Tensor

    def __init__(
        self,
        *,
        init: Literal["kmeans", "normal"] = "kmeans",  # the base: fitted to latents, or normal with mean square norm 1
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.init = init
        self.register_buffer("base", torch.randn(self.codebook_size, self.embed_dim) / self.embed_dim**0.5)
        self.map = nn.Parameter(torch.eye(self.embed_dim))

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements."""
        table = self.table()
        indices = nearest_ids(vectors, table)
        codes = F.embedding(indices, table)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return straight_through(codes, vectors), indices, losses

    def table(self) -> Tensor:
        # In fp64, so that the codes, and so the nearest one, are the same on every device.
        return (self.base.double() @ self.map.double()).float()

    @torch.no_grad()
    def fill(self, codes: Tensor) -> None:
        self.base.copy_(codes)
        self.map.copy_(torch.eye(self.embed_dim))

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        """Set rows of the base so that the map gives the vectors, or, without full rank, the nearest it can reach."""
        inverse = torch.linalg.pinv(self.map.double())
        self.base[rows] = (vectors.to(inverse) @ inverse).float()
