"""The base of quantizers with several codebooks, which learn by gradient as in `vq` or follow averages as in `ema_vq`.

Axes: N vectors, K codes of a codebook, d channels of a code, Q codes of a token.
"""

from typing import Annotated, cast

import torch
from torch import Tensor, nn

from ...utils.config import Range
from .base import Quantizer
from .ema_vq import follow_average


class SeveralCodebooks(Quantizer):
    """Q codebooks of K codes of `code_channels`, with ids up to `n_embed`; a token has one code from each.

    With a `decay`, codebooks have no gradient. In training mode every forward moves them, equally on all ranks, and
    returns the codes from before. An algorithm implements `quantize`, `decode`, `parts` and `fit`, and `code_channels`
    if a code does not cover the token's channels.
    """

    nearest_of_table = False

    def __init__(
        self,
        *,
        num_codes: Annotated[int, Range(min=2)] = 2,  # codes of a token (Q)
        # null: codes learn by gradient; a number: they follow moving averages, of which it is the part kept (γ)
        decay: Annotated[float, Range(0, 1)] | None = None,
        epsilon: Annotated[float, Range(0, open_min=True)] = 1e-5,  # ε of the averages' smoothing, in vectors
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.codes_per_token = num_codes
        self.decay, self.epsilon = decay, epsilon
        shape, reach = (self.codebook_size, self.code_channels()), 1 / self.n_embed
        weights = [torch.empty(shape).uniform_(-reach, reach) for _ in range(num_codes)]
        self.embeddings = nn.ModuleList(
            nn.Embedding.from_pretrained(weight, freeze=False) if decay is None else AveragedCodebook(weight)
            for weight in weights
        )
        kept = ("weight",) if decay is None else ("weight", "sums", "counts")
        self.code_rows = tuple(f"embeddings.{place}.{name}" for place in range(num_codes) for name in kept)

    def tables(self) -> list[Tensor]:
        """Return the codebooks, each [K, d]."""
        return [cast(Tensor, codebook.weight) for codebook in self.embeddings]

    def follow(self, place: int, vectors: Tensor, rows: Tensor) -> None:
        """Move a codebook towards the vectors [..., d] of all ranks, which chose its `rows` [...].

        Do nothing if codes learn by gradient, or in evaluation mode.
        """
        if self.decay is not None and self.training:
            codebook = cast(AveragedCodebook, self.embeddings[place])
            tensors = (codebook.weight, codebook.sums, codebook.counts)
            follow_average(*tensors, vectors, rows, decay=self.decay, epsilon=self.epsilon)

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the averages of fresh codebooks to a state dict that has the codes alone, as after learning by gradient.

        Return any other state dict unchanged.
        """
        codes = [f"embeddings.{place}" for place in range(self.codes_per_token)]
        if self.decay is None or state.keys() != {f"{name}.weight" for name in codes}:
            return state
        sums = {f"{name}.sums": state[f"{name}.weight"].float() for name in codes}
        counts = {f"{name}.counts": torch.ones(len(state[f"{name}.weight"])) for name in codes}
        return {**state, **sums, **counts}

    def fill_codebook(self, place: int, codes: Tensor) -> None:
        """Set a codebook to `codes` [K, d], with the averages of a fresh one."""
        self._set(place, torch.arange(self.codebook_size, device=codes.device), codes)

    def replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        for place in range(self.codes_per_token):
            own = rows // self.codebook_size == place
            self._set(place, rows[own] % self.codebook_size, vectors[own])

    @torch.no_grad()
    def _set(self, place: int, rows: Tensor, vectors: Tensor) -> None:
        codebook = self.embeddings[place]
        weight = cast(Tensor, codebook.weight)
        rows, vectors = rows.to(weight.device), vectors.to(weight)
        weight[rows] = vectors
        if isinstance(codebook, AveragedCodebook):
            codebook.sums[rows] = vectors
            codebook.counts[rows] = 1


class AveragedCodebook(nn.Module):
    """Codes as a buffer, under the state-dict key that they have if they learn by gradient, and their averages."""

    weight: Tensor  # [K, d]
    sums: Tensor  # [K, d], the averages of `ema_vq`
    counts: Tensor  # [K]

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("sums", weight.clone())
        self.register_buffer("counts", torch.ones(len(weight)))
