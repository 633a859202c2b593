"""The base of everything that a configuration names under `models`."""

from torch import Tensor, nn


class Model(nn.Module):
    """Base of the encoder, the decoder and the quantizers, with the methods that programs call on any model."""

    def convert_to_fp32(self) -> None:
        """Leave the arithmetic precision to the caller. By default a model chooses none, and nothing changes."""

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with the tensors added that this model can derive from the others; by default none."""
        return state
