"""Finite scalar quantization (arXiv:2309.15505): each of a few dimensions is rounded to one of its levels.

A dimension with L levels is bounded to f(u) = (L - 1)/2·tanh(u + shift) - offset and rounded. With offset = 1/2 for an
even L and 0 for an odd one, and the shift that makes f(0) = 0, the levels are -⌊L/2⌋ … ⌈L/2⌉ - 1. Divided by ⌊L/2⌋ they
are the grid's coordinates. The id counts the first dimension fastest.

Departures: the value is exactly the rounded one where the paper's straight-through sum rounds once more, and there
is the loss "vq" of `grid`, for latents that come from a frozen encoder.
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...utils.config import Count, Range
from .grid import GridQuantizer


class FiniteScalarQuantizer(GridQuantizer):
    """n_embed, embed_dim, latent_channels, group: see `Quantizer`. levels: of each dimension, three or more, since two
    would need an infinite shift; their product is n_embed. init: "kmeans" to lay the grid along the principal
    directions of the encoder's latents, "uniform" for random projections. Raises ValueError when the levels make
    another number of codes."""

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        group: list[Count] | None = None,
        init: Literal["kmeans", "uniform"] = "kmeans",
        levels: list[Annotated[int, Range(min=3)]] = (8, 8, 8, 4, 4),
    ):
        if math.prod(levels) != n_embed:
            raise ValueError(
                f"levels {list(levels)} make {math.prod(levels)} codes, but n_embed is {n_embed}; set n_embed to "
                f"{math.prod(levels)} or choose levels with the product {n_embed}"
            )
        counts = torch.tensor(levels)
        strides = counts.cumprod(0) // counts
        middle = counts // 2
        points = (torch.arange(n_embed)[:, None] // strides % counts - middle) / middle
        super().__init__(n_embed, embed_dim, latent_channels, group, init, points)
        reach = (counts - 1) / 2
        offset = 0.5 * (1 - counts % 2)
        constants = {"reach": reach, "offset": offset, "shift": (offset / reach).atanh(), "middle": middle}
        for name, value in (constants | {"strides": strides}).items():
            self.register_buffer(name, value, persistent=False)

    def soft(self, u: Tensor) -> Tensor:
        return ((u + self.shift).tanh() * self.reach - self.offset) / self.middle

    def ids_of(self, u: Tensor) -> Tensor:
        digits = (self.soft(u) * self.middle).round().long() + self.middle
        return (digits * self.strides).sum(-1)

    def aim(self) -> tuple[Tensor, Tensor]:
        """The mean goes to the middle of the range of tanh, which an even number of levels has between two."""
        return -self.shift.double(), self.middle.argsort(descending=True, stable=True)

    def further_losses(self, u: Tensor, points: Tensor) -> dict[str, Tensor]:
        """None of the paper's: "commit" is zero."""
        return {"commit": self.proj_in.weight.new_zeros(())}
