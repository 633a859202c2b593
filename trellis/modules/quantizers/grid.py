"""The base of quantizers with a fixed grid: learned projections onto the grid's few dimensions and back.

Axes: D channels of a token, d dimensions of the grid, K points of it, N vectors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantizer, straight_through

# Standard deviation of the projected vectors after a fit. If tanh(u) is uniform in [-1, 1], u has about this one,
# π/√12, so that normally distributed vectors use all levels of a grid equally.
SPREAD = 0.9


class GridQuantizer(Quantizer):
    """u = proj_in(z) goes to a point of the grid; the code is proj_out(point).

    An algorithm implements `soft`, `ids_of`, `aim` and `further_losses`, and calls `set_grid` in its constructor. "vq"
    trains both projections to reconstruct the latents, since there may be no decoder's loss to do it. `init` "kmeans"
    lays the grid along the principal directions of the latents; "uniform" keeps random projections.
    """

    nearest_of_table = False
    points: Tensor  # [K, d] float32, the grid

    def set_grid(self, points: Tensor) -> None:
        """Add the grid and the projections onto it and back. Raise ValueError for a grid without dimensions.

        points: [K, d] float32; row k belongs to id k.
        """
        if not points.shape[1]:
            raise ValueError(
                f"n_embed {self.n_embed} leaves a grid of a single code, which has no dimension; use a larger n_embed"
            )
        self.register_buffer("points", points, persistent=False)
        self.proj_in = nn.Linear(self.embed_dim, points.shape[1])
        self.proj_out = nn.Linear(points.shape[1], self.embed_dim)

    # --- for algorithms; u: [..., d] float64 ---

    def soft(self, u: Tensor) -> Tensor:
        """Return the values that are rounded to the points, on their scale, with a gradient for u."""
        raise NotImplementedError

    def ids_of(self, u: Tensor) -> Tensor:
        """Return the ids [...] of the points that u is rounded to."""
        raise NotImplementedError

    def aim(self) -> tuple[Tensor, Tensor]:
        """Return where `fit` places the vectors' mean in the grid, as u [d], and the order [d] of the grid's
        dimensions, finest first."""
        raise NotImplementedError

    def further_losses(self, u: Tensor, points: Tensor) -> dict[str, Tensor]:
        """Return "commit" and others. points: [..., d], the points that u is rounded to."""
        raise NotImplementedError

    # --- shared ---

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        u = self.project(vectors)
        indices = self.ids_of(u.detach())
        codes = F.embedding(indices, self.table())
        back = self.proj_out.weight.detach().double().T

        def with_gradient(u: Tensor) -> Tensor:
            return straight_through(codes, (self.soft(u) @ back).float())

        # "vq" must not move the latents, so it projects detached ones.
        constant = vectors.detach()
        losses = {"vq": F.mse_loss(with_gradient(self.project(constant)), constant)}
        losses |= self.further_losses(u, self.points[indices])
        return with_gradient(u), indices, losses

    def project(self, vectors: Tensor) -> Tensor:
        """Return u [..., d] float64 for vectors [..., D]. In fp64, so that ids depend neither on the device nor on
        the batch."""
        return F.linear(vectors.double(), self.proj_in.weight.double(), self.proj_in.bias.double())

    def table(self) -> Tensor:
        weight, bias = self.proj_out.weight.double(), self.proj_out.bias.double()
        return F.linear(self.points.double(), weight, bias).float()

    @torch.no_grad()
    def fit(self, vectors: Tensor, kmeans: Callable[[Tensor, int], Tensor]) -> None:
        """Lay the grid along the vectors' principal directions, and project back with the least squared error.

        If the grid has more dimensions than the vectors have channels, its axes are the rows of a fixed frame that
        spans all directions equally. vectors: [N, D]; kmeans is not used.
        """
        x = vectors.to(self.points.device).double()
        mean = x.mean(0)
        variance, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        # Largest first. A direction with almost no variance is not stretched to the size of the others.
        deviation = variance.flip(0).clamp(min=max(1e-4 * variance[-1].item(), 1e-12)).sqrt()
        whiten = directions.flip(1).T / deviation[:, None]  # [D, D]
        d, D = self.proj_in.weight.shape
        if d > D:
            noise = torch.randn(d, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            frame = F.normalize(torch.linalg.qr(noise).Q, dim=1)
            whiten = frame.to(x.device) @ whiten
        center, order = self.aim()
        weight = torch.empty_like(whiten[:d])
        weight[order] = SPREAD * whiten[:d]
        self.proj_in.weight.copy_(weight)
        self.proj_in.bias.copy_(center - weight @ mean)

        points = self.points[self.ids_of(self.project(x))].double()
        centered = points - points.mean(0)
        back = torch.linalg.pinv(centered.T @ centered, hermitian=True) @ (centered.T @ (x - mean))  # [d, D]
        self.proj_out.weight.copy_(back.T)
        self.proj_out.bias.copy_(mean - points.mean(0) @ back)
