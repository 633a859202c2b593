"""Vector quantization whose codes follow a moving average of their vectors (arXiv:1711.00937, App. A.1).

Each batch, with n_k vectors of sum s_k nearest to code k over all ranks, moves
N_k ← γ·N_k + (1 - γ)·n_k,   m_k ← γ·m_k + (1 - γ)·s_k,   e_k = m_k / Ñ_k,
where Ñ_k = (N_k + ε) / (N + K·ε) · N with N = Σ N_k is Laplace smoothing, without which a code that no vector chooses
would become 0/0.

Departures: sums and counts start as if each code had one vector, itself; the paper leaves the start open. A vector
that is not finite counts nowhere, so that a step with an overflow, which fp16 skips, leaves no NaN here. Where a
batch is worked off in parts, each part moves the codes.

Axes: N vectors, D channels of a code, K codes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils import dist_utils
from ...utils.config import Count, Range
from .base import Quantizer, nearest_ids, straight_through


class EMAVectorQuantizer(Quantizer):
    """A codebook without a gradient, a buffer: in training mode every forward moves it, on all ranks alike.

    The codes of a forward are those from before it moved the codebook. In evaluation mode nothing moves, and no rank
    waits for another.

    n_embed, embed_dim, latent_channels, group, init: as for `VectorQuantizer`. decay: γ, the part of the average that
    stays at each forward. epsilon: ε of the smoothing, in vectors.
    """

    code_rows = ("embeddings.weight", "sums", "counts")

    def __init__(
        self,
        n_embed: Annotated[int, Range(min=2)] = 8192,
        embed_dim: Count = 8,
        latent_channels: Count = 8,
        group: list[Count] | None = None,
        init: Literal["kmeans", "uniform"] = "kmeans",
        decay: Annotated[float, Range(0, 1)] = 0.99,
        epsilon: Annotated[float, Range(0, open_min=True)] = 1e-5,
    ):
        super().__init__(n_embed, embed_dim, latent_channels, group, init)
        self.decay, self.epsilon = decay, epsilon
        self.embeddings = nn.Module()  # the key "embeddings.weight", as in the other quantizers
        weight = torch.empty(n_embed, embed_dim).uniform_(-1 / n_embed, 1 / n_embed)
        self.embeddings.register_buffer("weight", weight)
        self.register_buffer("sums", weight.clone())  # m
        self.register_buffer("counts", torch.ones(n_embed))  # N

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses: "commit" (latents towards codes), a mean over elements; "vq" is zero."""
        indices = nearest_ids(vectors, self.table())
        codes = self.decode(indices)
        losses = {"vq": codes.new_zeros(()), "commit": F.mse_loss(vectors, codes)}
        if self.training:
            self.follow(vectors.detach().flatten(0, -2), indices.flatten())
        return straight_through(codes, vectors), indices, losses

    @torch.no_grad()
    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Move the codebook towards the vectors [N, D] of all ranks, with codes `indices` [N]."""
        finite = vectors.isfinite().all(1, keepdim=True)
        values = torch.cat([torch.where(finite, vectors, 0), finite], 1).double()
        # In fp64, so that neither the order of vectors nor their spread over ranks shows in the fp32 result.
        batch = values.new_zeros(self.n_embed, self.embed_dim + 1).index_add_(0, indices, values)
        batch = dist_utils.all_sum(batch).float()
        self.sums.lerp_(batch[:, :-1], 1 - self.decay)
        self.counts.lerp_(batch[:, -1], 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.n_embed * self.epsilon) * total
        self.embeddings.weight.copy_(self.sums / smoothed[:, None])

    def table(self) -> Tensor:
        return self.embeddings.weight

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict for this quantizer out of a codebook's alone, such as `VectorQuantizer` has, with the
        statistics of a fresh one; any other as it is."""
        if state.keys() != {"embeddings.weight"}:
            return state
        weight = state["embeddings.weight"]
        return {**state, "sums": weight.float(), "counts": torch.ones(len(weight))}

    def fill(self, codes: Tensor) -> None:
        self.replace_codes(torch.arange(self.n_embed, device=self.counts.device), codes)

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        vectors = vectors.to(self.sums)
        self.embeddings.weight[rows] = vectors
        self.sums[rows] = vectors
        self.counts[rows] = 1
