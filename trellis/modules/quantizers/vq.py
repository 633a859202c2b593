"""Vector quantization (arXiv:1711.00937) of sparse-structure latents, in the token layout of ShapeLLM-Omni
(arXiv:2506.01853).

Departure: the decoder gets e + (z - sg[z]) in place of the paper's z + sg[e - z]. Both have the value e and
pass the decoder's gradient on to z. The first also passes it to the chosen codes, so that the reconstruction loss
trains them even if the encoder is frozen.

Axes: N vectors, D channels of a code, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantizer, nearest_ids, straight_through


class VectorQuantizer(Quantizer):
    """A codebook of `n_embed` vectors that learns by gradient. A vector gets the nearest code."""

    code_rows = ("embeddings.weight",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        weight = torch.empty(self.codebook_size, self.embed_dim).uniform_(-1 / self.n_embed, 1 / self.n_embed)
        self.embeddings = nn.Embedding.from_pretrained(weight, freeze=False)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements."""
        indices = nearest_ids(vectors, self.table())
        codes = self.decode(indices)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        return self.estimate(codes, vectors), indices, losses

    def estimate(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """Return the codes with a gradient for the vectors."""
        return straight_through(codes, vectors)

    def table(self) -> Tensor:
        return self.embeddings.weight

    @torch.no_grad()
    def fill(self, codes: Tensor) -> None:
        self.embeddings.weight.copy_(codes)

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        self.embeddings.weight[rows] = vectors.to(self.embeddings.weight)
