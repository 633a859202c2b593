"""The base of everything that a configuration names under `models`."""

from torch import Tensor, nn


class Model(nn.Module):
    """Base of encoder, decoder, quantizers and transformer, with the methods that programs call on any model."""

    def convert_to_fp32(self) -> None:
        """Leave the arithmetic precision to the caller. By default a model chooses none, and nothing changes."""

    def hidden_matrices(self) -> set[str]:
        """Return the names of matrices inside the model that act between hidden layers; by default none.

        `trainers.muon` orthogonalizes their steps. Codes, embeddings and projections at the ends are none of them.
        """
        return set()

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with the tensors added that this model can derive from the others; by default none."""
        return state
