"""Lookup-free quantization (MAGVIT-v2, arXiv:2310.05737): a code is the signs of log2 K numbers.

The first sign is the id's lowest bit. A softmax over codes of -|u - code|²/τ makes the bits independent, each set
with probability σ(4·u/τ). "entropy" is the mean entropy of a vector's choice minus the entropy of the mean choice, so
that each vector is decided and all codes are used. The mean choice over all K codes is exact: with the bits in two
halves it is a product of two small matrices.

Departure: learned projections onto the signs and back, with the loss "vq" of `grid`, since the encoder decides the
number of latent channels. "commit" acts on the projected numbers.

Axes: N vectors, d = log2 K bits.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils.config import Range
from .base import entropy_loss
from .grid import GridQuantizer


class LookupFreeQuantizer(GridQuantizer):
    """The signs of log2 K numbers, for K learned codes. Raise ValueError if K is not a power of two."""

    strides: Tensor  # [d], of each bit in the id

    losses = ("vq", "commit", "entropy")

    def __init__(
        self,
        *,
        temperature: Annotated[float, Range(0, open_min=True)] = 1.0,  # τ, in units of the squared numbers
        **kwargs,
    ):
        super().__init__(**kwargs)
        bits = self.codebook_size.bit_length() - 1
        if 2**bits != self.codebook_size:
            beside = " plus one for the empty code" if self.empty_code else ""
            lower, higher = 2**bits + self.first_code, 2 ** (bits + 1) + self.first_code
            raise ValueError(f"n_embed {self.n_embed} is not a power of two{beside}; use {lower} or {higher}")
        strides = 2 ** torch.arange(bits)
        self.set_grid((torch.arange(self.codebook_size)[:, None] // strides % 2 * 2 - 1).float())
        self.temperature = temperature
        self.register_buffer("strides", strides, persistent=False)

    def soft(self, u: Tensor) -> Tensor:
        return u

    def ids_of(self, u: Tensor) -> Tensor:
        return ((u > 0) * self.strides).sum(-1)

    def aim(self) -> tuple[Tensor, Tensor]:
        return self.points.new_zeros(len(self.strides), dtype=torch.float64), torch.arange(len(self.strides))

    def further_losses(self, u: Tensor, points: Tensor) -> dict[str, Tensor]:
        """Return "commit", a mean over numbers, and "entropy" in nats."""
        u = u.float()
        logits = (4 / self.temperature) * u.flatten(0, -2)
        one = logits.sigmoid()  # [N, d]
        # In this form the gradient stays finite when a probability rounds to 0 or 1.
        own = (one * F.softplus(-logits) + (1 - one) * F.softplus(logits)).sum(1).mean()
        low, high = (_joint(part) for part in (one[:, : one.shape[1] // 2], one[:, one.shape[1] // 2 :]))
        share = (high.T @ low).flatten() / max(1, len(one))  # [K], the id's low bits fastest
        entropy = entropy_loss(own, share, len(one), over_ranks=self.training)
        return {"commit": F.mse_loss(u, points), "entropy": entropy}


def _joint(one: Tensor) -> Tensor:
    """Return the probabilities [N, 2^b] of all values of b independent bits, the first the lowest.

    one: [N, b], the probability that a bit is set.
    """
    joint = one.new_ones(len(one), 1)
    for bit in one.T:
        joint = torch.cat([joint * (1 - bit)[:, None], joint * bit[:, None]], 1)
    return joint
