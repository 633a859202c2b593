"""Residual quantization: each further code encodes the previous ones' residual (RQ-VAE, arXiv:2203.01941).

Departures: the codebooks learn by gradient and not from moving averages, and each stage has its own, as in the
paper's ablation. The losses are means over stages in place of the paper's sums, so that weights keep their meaning.
The gradient of `vq`, e + (z - sg[z]), gives the codes the reconstruction loss too.

Axes: D channels of a code, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.config import Range
from .base import Quantizer, nearest_ids, straight_through


class ResidualVectorQuantizer(Quantizer):
    """Q codebooks of `n_embed` codes; a token is the sum of one code from each.

    The first code is the coarsest. k-means fits the codebooks stage by stage.
    """

    nearest_of_table = False

    def __init__(
        self,
        *,
        num_codes: Annotated[int, Range(min=2)] = 2,  # codes of a token (Q)
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.codes_per_token = num_codes
        shape, reach = (self.codebook_size, self.embed_dim), 1 / self.n_embed
        weights = [torch.empty(shape).uniform_(-reach, reach) for _ in range(num_codes)]
        self.embeddings = nn.ModuleList(nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements and stages.

        "vq" moves each code towards the residual before it, "commit" the latents towards the sum of the codes so far.
        """
        residual = vectors.detach()
        codes, vq, commit = torch.zeros_like(residual), residual.new_zeros(()), residual.new_zeros(())
        indices = []
        for table in self.tables():
            ids = nearest_ids(residual, table)
            chosen = F.embedding(ids, table)
            codes = codes + chosen
            vq = vq + F.mse_loss(chosen, residual)
            commit = commit + F.mse_loss(vectors, codes.detach())
            residual = residual - chosen.detach()
            indices.append(ids)
        losses = {"vq": vq / self.codes_per_token, "commit": commit / self.codes_per_token}
        return straight_through(codes, vectors), torch.stack(indices, -1), losses

    def decode(self, indices: Tensor) -> Tensor:
        stages = zip(indices.unbind(-1), self.tables(), strict=True)
        # In the order of `quantize`, so that the sums agree bit for bit.
        return sum((F.embedding(ids, table) for ids, table in stages), torch.zeros((), device=indices.device))

    def tables(self) -> list[Tensor]:
        """Return the codebook of each stage, [K, D]."""
        return [self.get_parameter(f"embeddings.{stage}.weight") for stage in range(self.codes_per_token)]

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        residual = vectors
        for table in self.tables():
            table.copy_(kmeans(residual, self.codebook_size))
            residual = residual - F.embedding(nearest_ids(residual, table), table)
