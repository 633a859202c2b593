"""Finite scalar quantization (arXiv:2309.15505): each of a few dimensions is rounded to one of its levels.

A dimension with L levels is bounded to f(u) = (L - 1)/2·tanh(u + shift) - offset and rounded. With offset = 1/2 for an
even L and 0 for an odd one, and the shift that makes f(0) = 0, the levels are -⌊L/2⌋ … ⌈L/2⌉ - 1. Divided by ⌊L/2⌋ they
are the grid's coordinates. The id counts the first dimension fastest.

Departures: the value is exactly the rounded one; the paper's straight-through sum rounds once more. The loss "vq" of
`grid` is added, for latents from a frozen encoder.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from ...utils.config import Range
from .grid import GridQuantizer

# Of each dimension, with the default n_embed as their product.
LEVELS = [8, 8, 8, 4, 4]
MAX_DIMENSIONS = 39  # 3^40 is beyond int64


class FiniteScalarQuantizer(GridQuantizer):
    """A grid with a point for each learned code, the product of the levels.

    Raise ValueError if the levels make another number, or are too many.
    """

    reach: Tensor  # this and the others: [d], one per dimension
    offset: Tensor
    shift: Tensor
    middle: Tensor
    strides: Tensor

    def __init__(
        self,
        *,
        levels: list[Annotated[int, Range(min=3)]] = LEVELS,  # of each dimension; two would need an infinite shift
        **kwargs,
    ):
        super().__init__(**kwargs)
        if len(levels) > MAX_DIMENSIONS:
            raise ValueError(f"levels has {len(levels)} dimensions; give at most {MAX_DIMENSIONS}")
        if math.prod(levels) != self.codebook_size:
            beside = ", of which one is the empty code" if self.empty_code else ""
            raise ValueError(
                f"levels {list(levels)} make {math.prod(levels)} codes, but n_embed is {self.n_embed}{beside}; set "
                f"n_embed to {math.prod(levels) + self.first_code} or choose levels with the product "
                f"{self.codebook_size}"
            )
        counts = torch.tensor(levels)
        strides = counts.cumprod(0) // counts
        middle = counts // 2
        self.set_grid((torch.arange(self.codebook_size)[:, None] // strides % counts - middle) / middle)
        reach = (counts - 1) / 2
        offset = 0.5 * (1 - counts % 2)
        constants = {"reach": reach, "offset": offset, "shift": (offset / reach).atanh(), "middle": middle}
        for name, value in (constants | {"strides": strides}).items():
            self.register_buffer(name, value, persistent=False)

    def soft(self, u: Tensor) -> Tensor:
        return ((u + self.shift).tanh() * self.reach - self.offset) / self.middle

    def ids_of(self, u: Tensor) -> Tensor:
        # NaN as a whole number would be an id outside the grid.
        digits = (self.soft(u) * self.middle).round().nan_to_num(0).long() + self.middle
        return (digits * self.strides).sum(-1)

    def aim(self) -> tuple[Tensor, Tensor]:
        """Place the mean in the middle of tanh's range, which for an even number of levels lies between two."""
        return -self.shift.double(), self.middle.argsort(descending=True, stable=True)

    def further_losses(self, u: Tensor, points: Tensor) -> dict[str, Tensor]:
        """Return a "commit" of zero: the paper has no such loss."""
        return {"commit": self.proj_in.weight.new_zeros(())}
