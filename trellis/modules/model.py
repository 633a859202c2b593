"""The base of everything that a configuration names under `models`."""

from torch import Tensor, nn


class Model(nn.Module):
    """Base of the encoder, the decoder and the quantizers: what programs ask of any model."""

    def convert_to_fp32(self) -> None:
        """Leave the arithmetic precision to the caller. A model that never chooses one has nothing to change."""

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a full state dict for this model from one that may lack what the model can derive from the rest."""
        return state
