"""Transformers before and after the codebook, so that a code can depend on the whole object and not on its block alone.

A convolutional latent describes a cell's surroundings. With few tokens it pays to share the description out among
them: attention before the codebook decides who says what, attention after it puts it together again.

Axes: B batch, D channels of a token, X' Y' Z' the lattice of tokens, L = X'·Y'·Z' tokens.
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ..modules.attention import TransformerBlock
from ..modules.model import Model
from ..utils.config import Count, Range

POSITION_STD = 0.02  # of fresh position vectors


class CodebookTransformer(Model):
    """Two stacks of attention over the tokens of an object, each of which changes its input by an addition.

    The last projection of each starts at zero, so that fresh stacks change nothing: a codebook that was fitted without
    them fits. Every place of the lattice has a learned vector. Raise ValueError if heads do not divide the width,
    or the lattice has not three sides.
    """

    def __init__(
        self,
        channels: Count,  # of a token (D), the quantizer's embed_dim
        lattice: list[Count],  # tokens along x, y and z
        width: Count = 512,  # of the attention
        heads: Count = 8,  # of each block
        layers_before: Annotated[int, Range(min=0)] = 4,  # blocks between encoder and codebook
        layers_after: Annotated[int, Range(min=0)] = 6,  # blocks between codebook and decoder
    ):
        super().__init__()
        if len(lattice) != 3:
            raise ValueError(f"lattice is {list(lattice)}; it must be the tokens along x, y and z")
        self.channels, self.lattice = channels, tuple(lattice)
        self.layers = layers_before, layers_after
        places = math.prod(lattice)
        self.stacks = nn.ModuleDict(
            {
                "before": _Stack(channels, places, width, heads, layers_before),
                "after": _Stack(channels, places, width, heads, layers_after),
            }
        )

    def before(self, tokens: Tensor, occupied: Tensor | None) -> Tensor:
        """Return what the quantizer gets, of the same shape.

        tokens: [B, X', Y', Z', D] float32, the encoder's.
        occupied: [B, X', Y', Z'] bool, the tokens that take part; None for all.
        """
        return self._run("before", tokens, occupied)

    def after(self, tokens: Tensor, occupied: Tensor | None) -> Tensor:
        """Return what the decoder gets. tokens: the quantizer's codes; both as for `before`."""
        return self._run("after", tokens, occupied)

    def hidden_matrices(self) -> set[str]:
        return {
            f"{name}.{matrix}.weight"
            for name, module in self.named_modules()
            if isinstance(module, TransformerBlock)
            for matrix in module.matrices
        }

    def _run(self, stack: str, tokens: Tensor, occupied: Tensor | None) -> Tensor:
        flat = tokens.flatten(1, 3)
        mask = None
        if occupied is not None:
            mask = occupied.flatten(1)
            # Without a key, attention is 0/0. What an object without tokens gets is not used.
            mask = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        return tokens + self.stacks[stack](flat, mask).view(tokens.shape).float()


class _Stack(nn.Module):
    """Projection in, position vectors, blocks, norm, projection back."""

    def __init__(self, channels: int, places: int, width: int, heads: int, layers: int):
        super().__init__()
        self.project_in = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.randn(places, width) * POSITION_STD)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return what is added to tokens [B, L, D]. mask: [B, 1, 1, L] bool or None."""
        h = self.project_in(tokens) + self.positions
        for block in self.blocks:
            h = block(h, mask)
        return self.project_out(self.norm(h))
