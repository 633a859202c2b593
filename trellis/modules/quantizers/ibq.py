"""Index backpropagation quantization (arXiv:2412.02692): the gradient reaches all codes through a soft choice.

With p the softmax over all codes, the decoder gets (onehot + p - sg[p])·codes: the value of the nearest code, a
gradient for that code, and one for the latent and every code through p.

Departures: the logits are -|z - e|²/τ in place of the paper's z·e, so that the choice is the nearest code and a k-means
codebook is a good start. The losses are the same as in `vq`, without the paper's pull of the soft choice to the
latents. Added is "entropy", the mean entropy of a vector's choice minus the entropy of the mean choice.

Memory: p has N·K elements, 1 GiB for 32,768 vectors and 8,192 codes. It only ever exists for a chunk of the vectors,
and the backward pass computes it again.

Axes: N vectors, D channels of a code, K codes.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...utils.config import Range
from .base import entropy_loss, nearest_ids, straight_through
from .vq import VectorQuantizer

# Elements of p at once, 64 MiB; a backward pass holds a handful of such matrices.
CHUNK_ELEMENTS = 2**24


class IndexBackpropagationQuantizer(VectorQuantizer):
    """A codebook of `n_embed` vectors that all learn from each vector. A vector gets the nearest code."""

    losses = ("vq", "commit", "entropy")

    def __init__(
        self,
        *,
        temperature: Annotated[float, Range(0, open_min=True)] = 1.0,  # τ, in units of a squared distance
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.temperature = temperature

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "vq" and "commit" are means over elements; "entropy" is in nats.

        Without a gradient to compute, the soft choice is skipped and "entropy" is zero.
        """
        table = self.table()
        indices = nearest_ids(vectors, table)
        codes = F.embedding(indices, table)
        losses = {"vq": F.mse_loss(codes, vectors.detach()), "commit": F.mse_loss(vectors, codes.detach())}
        if not codes.requires_grad and not (vectors.requires_grad and torch.is_grad_enabled()):
            return codes, indices, losses | {"entropy": codes.new_zeros(())}
        flat = vectors.flatten(0, -2)
        rows = max(1, CHUNK_ELEMENTS // self.codebook_size)
        parts = [
            checkpoint(_soft_choice, part, table, self.temperature, use_reentrant=False, preserve_rng_state=False)
            for part in flat.split(rows)
        ]
        soft, share, own = zip(*parts, strict=True)
        count = max(1, len(flat))
        losses["entropy"] = entropy_loss(sum(own) / count, sum(share) / count, len(flat), over_ranks=self.training)
        return straight_through(codes, torch.cat(soft).view_as(vectors)), indices, losses


def _soft_choice(vectors: Tensor, table: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return p·codes [N, D], the codes held constant; the sum of p over vectors [K]; the sum of the entropies of p."""
    # |z|² is left out: it is the same for all codes.
    logits = (2 * vectors @ table.T - table.square().sum(1)) / temperature
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return p @ table.detach(), p.sum(0), -(p * log_p).sum()
