"""Residual quantization: each further code encodes the previous ones' residual (RQ-VAE, arXiv:2203.01941).

With a `decay`, the codebooks follow moving averages as in the paper, by the rule of `ema_vq`.

Departures: by default they learn by gradient instead, and each stage has its own, as in the paper's ablation. The
losses are means over stages in place of the paper's sums, so that weights keep their meaning. The gradient of `vq`,
e + (z - sg[z]), gives codes that learn by gradient the reconstruction loss too.

Axes: D channels of a code, K codes of a codebook, Q codes of a token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import nearest_ids, straight_through
from .several import SeveralCodebooks


class ResidualVectorQuantizer(SeveralCodebooks):
    """Q codebooks of `n_embed` codes; a token is the sum of one code from each.

    The first code is the coarsest. k-means fits the codebooks stage by stage.
    """

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements and stages.

        "vq" moves each code towards the residual before it, and is zero if codes follow averages; "commit" moves the
        latents towards the sum of the codes so far.
        """
        residual = vectors.detach()
        codes, vq, commit = torch.zeros_like(residual), residual.new_zeros(()), residual.new_zeros(())
        indices = []
        for stage, table in enumerate(self.tables()):
            ids = nearest_ids(residual, table)
            chosen = F.embedding(ids, table)
            codes = codes + chosen
            if self.decay is None:
                vq = vq + F.mse_loss(chosen, residual)
            commit = commit + F.mse_loss(vectors, codes.detach())
            self.follow(stage, residual, ids)
            residual = residual - chosen.detach()
            indices.append(ids)
        losses = {"vq": vq / self.codes_per_token, "commit": commit / self.codes_per_token}
        return straight_through(codes, vectors), torch.stack(indices, -1), losses

    def decode(self, indices: Tensor) -> Tensor:
        stages = zip(indices.unbind(-1), self.tables(), strict=True)
        # In the order of `quantize`, so that the sums agree bit for bit.
        return sum((F.embedding(ids, table) for ids, table in stages), torch.zeros((), device=indices.device))

    def parts(self, vectors: Tensor, codes: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return residuals and codes of each stage as in `Quantizer`, by the codebooks as they are now."""
        residual, stages = vectors, []
        for ids, table in zip(rows.unbind(-1), self.tables(), strict=True):
            chosen = F.embedding(ids, table)
            stages.append((residual, chosen))
            residual = residual - chosen
        return stages

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        residual = vectors
        for stage, table in enumerate(self.tables()):
            self.fill_codebook(stage, kmeans(residual, self.codebook_size))
            residual = residual - F.embedding(nearest_ids(residual, table), table)
