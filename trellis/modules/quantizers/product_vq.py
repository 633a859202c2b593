"""Product quantization: each part of a vector has a codebook of its own (Jégou, Douze and Schmid, Product quantization
for nearest neighbor search, 2011).

Departure: the codebooks start from k-means as in the paper, and then learn by gradient as in `vq`.

Axes: D channels of a token, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Range
from .base import Quantizer, nearest_ids, straight_through


class ProductVectorQuantizer(Quantizer):
    """Q codebooks of `n_embed` codes of D/Q channels; a token is one code from each, side by side.

    k-means fits the codebooks part by part. Raise ValueError if embed_dim is not a multiple of num_codes.
    """

    nearest_of_table = False

    def __init__(
        self,
        *,
        num_codes: Annotated[int, Range(min=2)] = 2,  # codes of a token (Q)
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.embed_dim % num_codes:
            raise ValueError(
                f"num_codes {num_codes} does not divide embed_dim {self.embed_dim} into equal parts; "
                "use a divisor of it"
            )
        self.codes_per_token = num_codes
        shape, reach = (self.codebook_size, self.embed_dim // num_codes), 1 / self.n_embed
        weights = [torch.empty(shape).uniform_(-reach, reach) for _ in range(num_codes)]
        self.embeddings = nn.ModuleList(nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements."""
        parts = zip(vectors.chunk(self.codes_per_token, -1), self.tables(), strict=True)
        indices = torch.stack([nearest_ids(part, table) for part, table in parts], -1)
        codes = self.decode(indices)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return straight_through(codes, vectors), indices, losses

    def decode(self, indices: Tensor) -> Tensor:
        parts = zip(indices.unbind(-1), self.tables(), strict=True)
        return torch.cat([F.embedding(ids, table) for ids, table in parts], -1)

    def tables(self) -> list[Tensor]:
        """Return the codebook of each part, [K, D/Q]."""
        return [self.get_parameter(f"embeddings.{part}.weight") for part in range(self.codes_per_token)]

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        for part, table in zip(vectors.chunk(self.codes_per_token, -1), self.tables(), strict=True):
            table.copy_(kmeans(part.contiguous(), self.codebook_size))
