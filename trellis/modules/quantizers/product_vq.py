"""Product quantization: each part of a vector has a codebook of its own (Jégou, Douze and Schmid, Product quantization
for nearest neighbor search, 2011).

Departure: the codebooks start from k-means as in the paper, and then learn by gradient as in `vq` or, with a `decay`,
follow moving averages as in `ema_vq`.

Axes: D channels of a token, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import nearest_ids, straight_through
from .several import SeveralCodebooks


class ProductVectorQuantizer(SeveralCodebooks):
    """Q codebooks of `n_embed` codes of D/Q channels; a token is one code from each, side by side.

    k-means fits the codebooks part by part. Raise ValueError if embed_dim is not a multiple of num_codes.
    """

    def code_channels(self) -> int:
        if self.embed_dim % self.codes_per_token:
            raise ValueError(
                f"num_codes {self.codes_per_token} does not divide embed_dim {self.embed_dim} into equal parts; "
                "use a divisor of it"
            )
        return self.embed_dim // self.codes_per_token

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements.

        "vq" is zero if codes follow averages.
        """
        parts = vectors.chunk(self.codes_per_token, -1)
        indices = torch.stack([nearest_ids(part, table) for part, table in zip(parts, self.tables(), strict=True)], -1)
        codes = self.decode(indices)
        vq = F.mse_loss(codes, vectors.detach()) if self.decay is None else codes.new_zeros(())
        losses = {"vq": vq, "commit": F.mse_loss(vectors, codes.detach())}
        for place, (part, ids) in enumerate(zip(parts, indices.unbind(-1), strict=True)):
            self.follow(place, part.detach(), ids)
        return straight_through(codes, vectors), indices, losses

    def decode(self, indices: Tensor) -> Tensor:
        parts = zip(indices.unbind(-1), self.tables(), strict=True)
        return torch.cat([F.embedding(ids, table) for ids, table in parts], -1)

    def parts(self, vectors: Tensor, codes: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        chunks = (whole.chunk(self.codes_per_token, -1) for whole in (vectors, codes))
        return list(zip(*chunks, strict=True))

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        for place, part in enumerate(vectors.chunk(self.codes_per_token, -1)):
            self.fill_codebook(place, kmeans(part.contiguous(), self.codebook_size))
