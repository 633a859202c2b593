"""What every quantizer returns."""

from typing import NamedTuple

from torch import Tensor


class Quantized(NamedTuple):
    """Axes: B batch, C latent channels, X Y Z latent cells, G cells per token along z."""

    codes: Tensor  # [B, C, X, Y, Z] float32, given to the decoder
    indices: Tensor  # [B, X, Y, Z/G] int64 in [0, n_embed)
    losses: dict[str, Tensor]  # unweighted scalars; the trainer owns the weights
