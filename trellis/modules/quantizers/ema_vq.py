"""Vector quantization whose codes follow a moving average of their vectors (arXiv:1711.00937, App. A.1).

Each batch, with n_k vectors of sum s_k nearest to code k over all ranks, moves
N_k ← γ·N_k + (1 - γ)·n_k,   m_k ← γ·m_k + (1 - γ)·s_k,   e_k = m_k / Ñ_k,
where Ñ_k = (N_k + ε) / (N + K·ε) · N with N = Σ N_k is Laplace smoothing. Without it, a code that no vector chooses
would become 0/0.

Departures: sums and counts start as if each code had one vector, itself; the paper leaves the start open. A vector
whose square is not finite in fp32 is left out, so that nothing here becomes infinite or NaN; and codes stay where they
are if, without any vector, all counts have faded to zero. With gradient accumulation, each micro-batch moves the codes.

Axes: N vectors, D channels of a code, K codes.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils import dist_utils
from ...utils.config import Range
from .base import Quantizer, nearest_ids, straight_through


class EMAVectorQuantizer(Quantizer):
    """A codebook without a gradient. In training mode every forward moves it, equally on all ranks.

    A forward returns the codes from before it moved the codebook. In evaluation mode nothing moves, and no rank
    waits for another.
    """

    code_rows = ("embeddings.weight", "sums", "counts")
    decay: float
    sums: Tensor  # m, [K, D]
    counts: Tensor  # N, [K]

    def __init__(
        self,
        *,
        decay: Annotated[float, Range(0, 1)] = 0.99,  # γ, the part of the average kept at each forward
        epsilon: Annotated[float, Range(0, open_min=True)] = 1e-5,  # ε of the smoothing, in vectors
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.decay, self.epsilon = decay, epsilon
        weight = torch.empty(self.codebook_size, self.embed_dim).uniform_(-1 / self.n_embed, 1 / self.n_embed)
        self.embeddings = _Codebook(weight)
        self.register_buffer("sums", weight.clone())
        self.register_buffer("counts", torch.ones(self.codebook_size))

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize as in `Quantizer`. "commit" is a mean over elements, "vq" is zero."""
        indices = nearest_ids(vectors, self.table())
        codes = self.decode(indices)
        losses = {"vq": codes.new_zeros(()), "commit": F.mse_loss(vectors, codes)}
        if self.training:
            tensors = (self.embeddings.weight, self.sums, self.counts)
            follow_average(*tensors, vectors, indices, decay=self.decay, epsilon=self.epsilon)
        return straight_through(codes, vectors), indices, losses

    def table(self) -> Tensor:
        return self.embeddings.weight

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the statistics of a fresh codebook to a state dict that has the codes alone, as `VectorQuantizer`'s.

        Return any other state dict unchanged.
        """
        if state.keys() != {"embeddings.weight"}:
            return state
        weight = state["embeddings.weight"]
        return {**state, "sums": weight.float(), "counts": torch.ones(len(weight))}

    def fill(self, codes: Tensor) -> None:
        self.replace_codes(torch.arange(self.codebook_size, device=self.counts.device), codes)

    @torch.no_grad()
    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        vectors = vectors.to(self.sums)
        self.embeddings.weight[rows] = vectors
        self.sums[rows] = vectors
        self.counts[rows] = 1


@torch.no_grad()
def follow_average(
    codes: Tensor, sums: Tensor, counts: Tensor, vectors: Tensor, rows: Tensor, *, decay: float, epsilon: float
) -> None:
    """Move a codebook towards the vectors of all ranks, each of which must call this.

    codes, sums: [K, D]; counts: [K]. All three are changed.
    vectors: [..., D], of which each chose the code of `rows` [...].
    """
    vectors = vectors.detach().flatten(0, -2)
    finite = vectors.float().square().sum(1, keepdim=True).isfinite()
    values = torch.cat([torch.where(finite, vectors, 0), finite], 1).double()
    # In fp64, so that neither the order of vectors nor their split over ranks changes the fp32 result.
    batch = values.new_zeros(len(codes), values.shape[1]).index_add_(0, rows.flatten(), values)
    batch = dist_utils.all_sum(batch).float()
    sums.lerp_(batch[:, :-1], 1 - decay)
    counts.lerp_(batch[:, -1], 1 - decay)
    total = counts.sum()
    smoothed = (counts + epsilon) / (total + len(codes) * epsilon) * total
    codes.copy_(torch.where(smoothed[:, None] > 0, sums / smoothed[:, None], codes))


class _Codebook(nn.Module):
    """The codes as a buffer, under the state-dict key that they have in the other quantizers."""

    weight: Tensor  # [K, D]

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
