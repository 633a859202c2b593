"""The way from grids to ids and back: encoder, transformer if there is one, quantizer, decoder.

Training, evaluation and the tokenizer all go this way, so that ids mean the same everywhere.

Axes: B batch, C latent channels, X Y Z latent cells, X' Y' Z' the lattice of tokens, R voxels along an axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..evaluation.metrics import codebook_counts, occupied_blocks
from ..modules.quantizers.base import Quantizer
from ..utils.errors import ConfigError
from .codebook_transformer import CodebookTransformer
from .sparse_structure_vae import SparseStructureDecoder, SparseStructureEncoder, check_networks

# Logit of a voxel in a block that is known to be empty: a probability of 3e-7, and finite in every loss.
EMPTY_LOGIT = -15.0


@dataclass(frozen=True)
class VqVae:
    """The models of a tokenizer, in the order in which a grid passes through them.

    occupied, wherever it stands: [B, X', Y', Z'] bool, the tokens whose block has a voxel; None without an empty code.
    """

    encoder: SparseStructureEncoder
    quantizer: Quantizer
    decoder: SparseStructureDecoder
    transformer: CodebookTransformer | None = None

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "VqVae":
        """Take {"encoder", "quantizer", "decoder"} and, if there, "transformer"."""
        return cls(
            cast(SparseStructureEncoder, models["encoder"]),
            cast(Quantizer, models["quantizer"]),
            cast(SparseStructureDecoder, models["decoder"]),
            cast(CodebookTransformer | None, models.get("transformer")),
        )

    def check(self, resolution: int) -> tuple[int, int, int]:
        """Return the lattice of grids of `resolution` voxels. Raise ConfigError if the models do not fit."""
        encoder, quantizer, transformer = self.encoder, self.quantizer, self.transformer
        check_networks(encoder, self.decoder)
        if not isinstance(quantizer, Quantizer):
            raise ConfigError(
                f"models.quantizer.name is {type(quantizer).__name__!r}, which is not a quantizer; use "
                "VectorQuantizer or another one"
            )
        if not isinstance(transformer, CodebookTransformer | None):
            raise ConfigError(
                f"models.transformer.name is {type(transformer).__name__!r}, which is not one around a codebook; use "
                "CodebookTransformer"
            )
        if quantizer.latent_channels != encoder.latent_channels:
            raise ConfigError(
                f"models.quantizer.args.latent_channels is {quantizer.latent_channels}, but the encoder's latent has "
                f"{encoder.latent_channels} channels; set it to {encoder.latent_channels}"
            )
        cells = resolution // encoder.downsampling
        try:
            lattice = quantizer.lattice((cells, cells, cells))
        except ValueError as error:
            raise ConfigError(f"models.quantizer.args: {error}") from error
        if transformer is not None:
            for key, own, wanted in (
                ("channels", transformer.channels, quantizer.embed_dim),
                ("lattice", list(transformer.lattice), list(lattice)),
            ):
                if own != wanted:
                    raise ConfigError(
                        f"models.transformer.args.{key} is {own}, but the quantizer's tokens have {wanted}; set it to "
                        f"{wanted}"
                    )
        return lattice

    def occupied(self, ss: Tensor) -> Tensor | None:
        """Return `occupied` of grids ss [B, 1, R, R, R]."""
        if not self.quantizer.empty_code:
            return None
        cells = ss.shape[-1] // self.encoder.downsampling
        return occupied_blocks(ss, self.quantizer.lattice((cells, cells, cells)))

    def occupied_of_ids(self, indices: Tensor) -> Tensor | None:
        """Return `occupied` of ids [B, X', Y', Z'] or [B, X', Y', Z', Q]."""
        return self.quantizer.occupied(indices) if self.quantizer.empty_code else None

    def before(self, z: Tensor, occupied: Tensor | None) -> Tensor:
        """Return what the quantizer gets of the encoder's z, [B, C, X, Y, Z]: zero in empty tokens."""
        if self.transformer is None and occupied is None:
            return z
        tokens = self.quantizer.to_vectors(z.float())
        if self.transformer is not None:
            tokens = self.transformer.before(tokens, occupied)
        return self.quantizer.ungroup_cells(_kept(tokens, occupied))

    def after(self, codes: Tensor, occupied: Tensor | None) -> Tensor:
        """Return what the decoder gets of codes, [B, C, X, Y, Z]: zero in empty tokens."""
        if self.transformer is None:
            return codes
        tokens = self.transformer.after(self.quantizer.to_vectors(codes), occupied)
        return self.quantizer.ungroup_cells(_kept(tokens, occupied))

    def decode(self, codes: Tensor, occupied: Tensor | None) -> Tensor:
        """Return logits [B, 1, R, R, R] of codes [B, C, X, Y, Z]; blocks of empty tokens are empty for certain."""
        logits = self.decoder(self.after(codes, occupied))
        if occupied is None:
            return logits
        voxels = occupied[:, None]
        for axis in (2, 3, 4):
            voxels = voxels.repeat_interleave(logits.shape[axis] // voxels.shape[axis], axis)
        return torch.where(voxels, logits, EMPTY_LOGIT)

    def decode_ids(self, indices: Tensor) -> Tensor:
        """Return logits [B, 1, R, R, R] of ids [B, X', Y', Z'] or [B, X', Y', Z', Q]."""
        return self.decode(self.quantizer.lookup(indices), self.occupied_of_ids(indices))

    def counts(self, indices: Tensor) -> Tensor:
        """Count how often each learned code is chosen: [codebook_size] or [Q, codebook_size] int64."""
        quantizer = self.quantizer
        return codebook_counts(indices, quantizer.n_embed, quantizer.codes_per_token)[..., quantizer.first_code :]


def _kept(tokens: Tensor, occupied: Tensor | None) -> Tensor:
    """Return tokens [B, X', Y', Z', D], zero where they are empty."""
    return tokens if occupied is None else torch.where(occupied[..., None], tokens, 0.0)
