"""Latents of the training objects: computed by the encoder, or read from a cache of a frozen encoder's.

Axes: B batch, n objects, C latent channels, X Y Z latent cells, R voxels along an axis.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...datasets.batches import to_device
from ...datasets.sparse_structure import SparseStructure
from ...models.sparse_structure_vae import SparseStructureEncoder
from ...utils import dist_utils
from ...utils.errors import DataError
from ..part import Part
from ..precision import Precision
from .latent_cache import LatentCache, cache_folder, folder_of, latent_key, require_place


class TrainingLatents(Part):
    """Latents of training objects. With a cache, batches get them as `z`.

    spec: the encoder's name and arguments, for the cache's key.
    dataset: the training split.
    micro_batch_size: objects that pass through the encoder at once.
    seed: of the dataset's augmentation.
    cache_root: folder of caches, or None for no cache.
    grids_needed: whether training steps need grids beside `z`.
    say: prints a line.
    """

    def __init__(
        self,
        encoder: SparseStructureEncoder,
        spec: dict,
        dataset: SparseStructure,
        *,
        precision: Precision,
        device: torch.device,
        micro_batch_size: int,
        seed: int,
        cache_root: Path | None,
        grids_needed: bool,
        say: Callable[[str], None],
    ):
        self.encoder, self.spec, self.dataset = encoder, spec, dataset
        self.precision, self.device, self.micro_batch_size, self.seed = precision, device, micro_batch_size, seed
        self.cache_root, self.grids_needed, self.say = cache_root, grids_needed, say
        self.cache: LatentCache | None = None  # opened by `open`, if there is a cache_root
        cells = dataset.resolution // encoder.downsampling
        self.shape = (len(dataset), encoder.latent_channels, cells, cells, cells)

    def of_objects(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return latents [n, C, X, Y, Z] and grids [n, 1, R, R, R] of training objects, each in one of the forms that
        augmentation gives it. indices: [n] int64. Raise DataError naming an object whose latent is not finite."""
        batch = to_device(self.dataset, self.dataset.get_batch(indices), self.device)
        ss = self.dataset.augment({**batch, "sample_ids": torch.from_numpy(indices)}, self.seed)["ss"]
        if self.cache is None:
            z = self.encode(ss, np.arange(len(indices)))
        else:
            z = self.cache.fetch(indices, lambda absent: self.encode(ss, absent))
        bad = (~z.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            index = int(indices[bad[0]])
            raise DataError(
                f"{self.dataset.entries[index].root}: the latent of {self.dataset.sha256(index)} has numbers that are "
                f"not finite ({len(bad)} such objects of {len(indices)}). The encoder's weights are finite, so "
                "compute in more precision (trainer.args.mix_precision_mode null), or leave the object out"
            )
        return z, ss

    @torch.no_grad()
    def encode(self, ss: Tensor, rows: np.ndarray) -> Tensor:
        """Return latents [n, C, X, Y, Z] of the grids at rows [n] of ss [B, 1, R, R, R], without a graph.

        They pass through the encoder in micro-batches, the last filled up with repetitions, since rounding may depend
        on the size of a batch.
        """
        size = self.micro_batch_size
        filled = torch.from_numpy(np.resize(rows, -(-len(rows) // size) * size)).to(ss.device)
        with self.precision.autocast():
            latents = [self.encoder(ss[chunk].float()) for chunk in filled.split(size)]
        return torch.cat(latents)[: len(rows)]

    # --- the cache, as a part of training ---

    def key(self) -> dict:
        """Return the key of this run's cache. Read all weights and ask every object for its version."""
        return latent_key(self.spec, self.encoder, self.dataset.content_key(), self.precision.name, self.device)

    def preview(self) -> None:
        if self.cache_root is None:
            return
        folder = folder_of(self.cache_root, self.key())
        require_place(self.cache_root, folder, self.shape)
        self.say(f"latent cache: {4 * math.prod(self.shape) / 2**30:.2f} GiB in {folder}")

    def open(self) -> None:
        if self.cache_root is None:
            return
        made = cache_folder(self.cache_root, self.key(), self.shape) if dist_utils.is_main() else None
        self.cache = LatentCache(dist_utils.broadcast_object(made), self.shape, self.device, self.say)

    def replaces_items(self) -> bool:
        return self.cache is not None and self.cache.complete and not self.grids_needed

    def prepare(self, batch: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        if self.cache is None:
            return batch
        z = self.cache.fetch(indices.numpy(), lambda absent: self.encode(batch["ss"], absent))
        if not self.grids_needed:
            batch = {name: value for name, value in batch.items() if name != "ss"}
        return {**batch, "z": z}
