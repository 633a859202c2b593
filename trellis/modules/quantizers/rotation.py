"""Vector quantization with the rotation trick as the gradient (arXiv:2410.06424).

The decoder gets R·z·|e|/|z|. R is the rotation that turns z onto the direction of its code e; R and the factor are
constants of the gradient. So the gradient turns with the vector and keeps its angle to e on the way to z. With
ẑ = z/|z|, ê = e/|e| and r = (ẑ + ê)/|ẑ + ê|, R = I - 2·r·rᵀ + 2·ê·ẑᵀ (Sec. 4.2).

Departure: as in `vq`, the value is exactly e, and the decoder's gradient also reaches the chosen codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import straight_through
from .vq import VectorQuantizer

# Smaller norms are raised to this, so that a vector of zeros has a finite gradient.
SMALLEST_NORM = 1e-6


class RotationVectorQuantizer(VectorQuantizer):
    """`VectorQuantizer` with another gradient for the latents. The arguments are the same."""

    def estimate(self, codes: Tensor, vectors: Tensor) -> Tensor:
        return straight_through(codes, rotated_onto(vectors, codes.detach()))


def rotated_onto(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return `vectors` [..., D] rotated and scaled onto `codes` [..., D], with rotation and scale held constant."""
    with torch.no_grad():
        z = F.normalize(vectors, dim=-1, eps=SMALLEST_NORM)
        e = F.normalize(codes, dim=-1, eps=SMALLEST_NORM)
        r = F.normalize(z + e, dim=-1, eps=SMALLEST_NORM)
        scale = codes.norm(dim=-1, keepdim=True) / vectors.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)

    def along(direction: Tensor) -> Tensor:
        return (vectors * direction).sum(-1, keepdim=True)

    return scale * (vectors - 2 * along(r) * r + 2 * along(z) * e)
