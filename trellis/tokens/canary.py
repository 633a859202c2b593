"""A canary: what a tokenizer made of one grid when it was saved, to be compared when it is loaded.

It tells that the weights are those that were saved, and that this machine and version make the same of them. A grid
of full size would take a laptop seconds, so networks of convolutions see a small cube of it: the encoder makes CELLS³
latent cells, copies of these, each fainter than the one before, fill the latent, transformer and codebook see a whole
object, and the decoder gets CELLS³ cells of their codes.

Axes: B batch, C latent channels, r voxels along an axis of the small cube, X Y Z latent cells, X' Y' Z' the lattice of
tokens, L = X'·Y'·Z' tokens, Q codes of a token, T = L·Q ids.
"""

import base64
import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.vqvae import VqVae
from ..utils.errors import CheckpointError

CELLS = 4  # latent cells along an axis of the small cube, at least
FAINTEST = 0.5  # the last copy of the latent, as a share of the first
# Shares of tokens and of the logits' range that may differ. Rounding on other hardware moves a latent between two
# equally near codes once in thousands of tokens, of a codebook that was never trained more often. What is wrong moves
# most of them.
TOKENS_THAT_FLIP, LOGITS_THAT_MOVE = 0.05, 0.01
LOGITS_THAT_ROUND = 1e-4  # below this share, logits count as equal


@dataclass(frozen=True)
class Canary:
    """What a tokenizer made of a grid."""

    resolution: int  # of a whole grid
    grid: str  # [r, r, r] in bits, base64
    ids: list[int]  # [T]
    logits: tuple[float, float]  # lowest and highest of the ids' small cube
    weights: int  # checksum

    @classmethod
    def of(cls, models: VqVae, resolution: int, state: Mapping[str, Tensor]) -> "Canary":
        """Return the canary of these models. resolution: voxels of a whole grid along an axis. state: all weights."""
        grid = _shell(_cells(models, resolution) * models.encoder.downsampling)
        ids = _encode(models, resolution, grid)
        bits = base64.b64encode(np.packbits(grid).tobytes()).decode()
        return cls(resolution, bits, ids.flatten().tolist(), _logits(models, resolution, ids), checksum(state))

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str | Path) -> "Canary":
        """Invert `dataclasses.asdict`. path: the file that has it. Raise CheckpointError if it is damaged."""
        try:
            base64.b64decode(values["grid"], validate=True)
            canary = cls(**{**values, "logits": tuple(values["logits"])})
            for name, limit in (("resolution", 2**16), ("weights", 2**32)):
                if type(values[name]) is not int or not 0 <= values[name] < limit:
                    raise ValueError(f"{name} is {values[name]!r}")
            if not isinstance(canary.ids, list) or not all(type(each) is int for each in canary.ids):
                raise ValueError("ids are not whole numbers")
            if len(canary.logits) != 2 or not all(isinstance(each, float) for each in canary.logits):
                raise ValueError("logits are not two numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its canary cannot be read ({error}). Copy or download it again") from error
        return canary

    def check(self, models: VqVae, state: Mapping[str, Tensor], path: str | Path) -> None:
        """Compare with what the models make of the grid now.

        state: all weights.
        path: their file, for messages.
        Raise CheckpointError if the weights are not those that were saved, or if other ids or logits come of them than
        rounding explains. Warn if rounding explains them.
        """
        if checksum(state) != self.weights:
            raise CheckpointError(
                f"{path}: its weights are not those that were saved (the checksum differs). The file is damaged: copy "
                "or download it again"
            )
        side = _cells(models, self.resolution) * models.encoder.downsampling
        bits = np.frombuffer(base64.b64decode(self.grid), dtype=np.uint8)
        wrong = f"{path}: the weights are whole, but its config.json or this version or machine computes otherwise: "
        shape = (1, *models.check(self.resolution), models.quantizer.codes_per_token)
        if len(bits) != -(-(side**3) // 8) or len(self.ids) != math.prod(shape):
            raise CheckpointError(f"{wrong}the grid that was saved along with {len(self.ids)} ids has other sizes now")
        if outside := [each for each in self.ids if not 0 <= each < models.quantizer.n_embed]:
            raise CheckpointError(f"{wrong}an id that was saved is {outside[0]}, of {models.quantizer.n_embed} now")
        saved = torch.tensor(self.ids).view(shape)
        ids = _encode(models, self.resolution, np.unpackbits(bits, count=side**3).reshape(side, side, side))
        tokens = ids.numel() // shape[-1]
        flipped = int((ids.view(shape) != saved).any(-1).sum())
        logits = _logits(models, self.resolution, saved.view_as(ids))
        span = max(self.logits[1] - self.logits[0], 1e-6)
        moved = float(np.abs(np.subtract(logits, self.logits)).max()) / span
        if flipped > max(1, TOKENS_THAT_FLIP * tokens) or not moved <= LOGITS_THAT_MOVE:  # NaN is not
            raise CheckpointError(
                f"{wrong}of a known grid {flipped} of {tokens} tokens differ, and logits by {moved:.1%} of their "
                "range. Take the files as save_pretrained wrote them, and another version of torch or of this package"
            )
        if flipped or moved > LOGITS_THAT_ROUND:
            warnings.warn(
                f"{path}: this machine rounds otherwise than the one that saved it: of a known grid {flipped} of "
                f"{tokens} tokens differ, and logits by {moved:.1e} of their range. Rare ids of objects may differ too",
                stacklevel=2,
            )


def checksum(state: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of all weights, in order of their names."""
    result = 0
    for key, value in sorted(state.items()):
        result = zlib.crc32(f"{key} {value.dtype} {list(value.shape)}".encode(), result)
        result = zlib.crc32(value.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data, result)
    return result


def _cells(models: VqVae, resolution: int) -> int:
    """Return the latent cells along an axis of the small cube: the fewest from CELLS on that fit tokens and latent."""
    whole = resolution // models.encoder.downsampling
    token = math.lcm(*models.quantizer.group)
    return next((n for n in range(min(CELLS, whole), whole) if not whole % n and not n % token), whole)


def _shell(side: int) -> np.ndarray:
    """Return a hollow ball a little off the center, [side, side, side] bool."""
    x, y, z = np.ogrid[:side, :side, :side]
    distance = np.sqrt((x - 0.42 * side) ** 2 + (y - 0.47 * side) ** 2 + (z - 0.52 * side) ** 2)
    return np.abs(distance - 0.35 * side) < 0.75


@torch.no_grad()
def _encode(models: VqVae, resolution: int, grid: np.ndarray) -> Tensor:
    """Return the ids of a small cube's copies, [1, X', Y', Z'] or [1, X', Y', Z', Q] int64 on the CPU.

    grid: [r, r, r].
    """
    ss = torch.from_numpy(grid.astype(np.float32))[None, None].to(next(models.encoder.parameters()).device)
    times = resolution // len(grid)
    z = models.encoder(ss).float().repeat(1, 1, *3 * [times])
    fainter = torch.linspace(1, FAINTEST, times**3, device=z.device).view(3 * [times])
    for axis in range(3):
        fainter = fainter.repeat_interleave(z.shape[2 + axis] // times, axis)
    occupied = models.occupied(ss)
    if occupied is not None:
        occupied = occupied.repeat(1, *3 * [times])
    return models.quantizer(models.before(z * fainter, occupied), occupied).indices.cpu()


@torch.no_grad()
def _logits(models: VqVae, resolution: int, ids: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest logit of the small cube in the corner of ids."""
    ids = ids.to(next(models.decoder.parameters()).device)
    cells = _cells(models, resolution)
    codes = models.after(models.quantizer.lookup(ids), models.occupied_of_ids(ids))
    low, high = models.decoder(codes[..., :cells, :cells, :cells]).float().aminmax()
    return low.item(), high.item()
