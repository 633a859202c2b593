"""A transformer block over a set of tokens (arXiv:1706.03762, with the norm first as in arXiv:2002.04745).

Axes: B batch, L tokens, D width, H heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """Self-attention and an MLP of four times the width, each added to its input. Raise ValueError if heads do not
    divide the width."""

    # The matrices, which an optimizer for hidden layers may treat apart.
    matrices = ("qkv", "out", "up", "down")

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads; use a multiple")
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, L, D].

        x: [B, L, D].
        mask: [B, 1, 1, L] bool, the tokens that the others may look at; None for all. At least one of an object.
        """
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, D / H]
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))
