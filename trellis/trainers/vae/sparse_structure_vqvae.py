"""Training of the vector-quantized VAE of sparse structures, the tokenizer of ShapeLLM-Omni
(arXiv:2506.01853).

Stage 1 freezes encoder and decoder and trains the codebook; stage 2 trains everything.
Axes: B batch, R voxels along an axis, N vectors, K codes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from ...modules.quantizers.kmeans import kmeans
from ...utils import dist_utils
from ...utils.config import Range
from ...utils.errors import ConfigError
from ...utils.evaluation import Reconstruction
from ...utils.metrics import codebook_counts
from ...utils.random_utils import derive_seed, permutation
from ..batches import to_device
from ..latent_cache import LatentCache, cache_folder, folder_of, latent_key, require_place
from .sparse_structure_vae import SparseStructureVaeTrainer

# A code of a fresh codebook should stand for this many latent vectors, and these should come from many
# objects, since neighbouring cells of one are alike.
VECTORS_PER_CODE = 64
OBJECTS_AT_LEAST = 256
KMEANS_ITERATIONS = 20


class SparseStructureVqVaeTrainer(SparseStructureVaeTrainer):
    """Trains `encoder`, `quantizer` and `decoder` on the reconstruction loss and the quantizer's losses.

    loss_type: as for the VAE, or "none": the codebook learns from its own loss alone and training runs no
    decoder, which takes a frozen encoder and decoder. lambda_vq: weight of the codebook loss. lambda_commit:
    weight of the commitment loss. latent_cache: keep the latents of a frozen encoder on disk (see
    `latent_cache`), true in the run folder's `latents`, a string in that folder, which runs may share.
    """

    model_keys = ("encoder", "quantizer", "decoder")
    runtime_args = ("lambda_kl",)  # there is no posterior, and so no KL

    def __init__(
        self,
        *args,
        loss_type: Literal["bce", "l1", "l2", "l1_l2", "dice", "none"] = "bce",
        lambda_vq: Annotated[float, Range(0)] = 1.0,
        lambda_commit: Annotated[float, Range(0)] = 0.25,
        latent_cache: bool | str = False,
        **kwargs,
    ):
        super().__init__(*args, loss_type=loss_type, **kwargs)
        self.lambda_vq, self.lambda_commit = lambda_vq, lambda_commit
        self.latent_cache = latent_cache
        self.latents: LatentCache | None = None  # from `open_run` on

    @classmethod
    def check_config(cls, config: dict, world_size: int) -> None:
        super().check_config(config, world_size)
        latent = config["models"]["encoder"]["args"]["latent_channels"]
        quantizer = config["models"]["quantizer"].get("args", {})
        if quantizer.get("latent_channels", 8) != latent:
            raise ConfigError(
                f"models.quantizer.args.latent_channels is {quantizer.get('latent_channels', 8)}, but the "
                f"encoder's latent has {latent} channels; set it to {latent}"
            )
        args = config["trainer"]["args"]
        freeze = args.get("freeze", ())
        if args.get("latent_cache") and "encoder" not in freeze:
            raise ConfigError(
                "trainer.args.latent_cache keeps what a frozen encoder computes, but the encoder is trained; add "
                "encoder to trainer.args.freeze or set latent_cache to false"
            )
        trained = [name for name in ("encoder", "decoder") if name not in freeze]
        if args.get("loss_type") == "none" and trained:
            raise ConfigError(
                f'trainer.args.loss_type is "none", which trains the codebook alone; add {" and ".join(trained)} to '
                'trainer.args.freeze or choose a reconstruction loss such as "l1"'
            )

    def training_losses(
        self, sample_ids: Tensor, ss: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[EasyDict, EasyDict]:
        """sample_ids: unused, nothing is random here. ss: [B, 1, R, R, R], 0 or 1; without a reconstruction
        loss not needed beside z. z: [B, C, X, Y, Z], the encoder's latents where they are known.

        Returns (losses, status). losses: "loss", which is optimized, and its terms before weighting.
        status: usage and perplexity of the codebook over the batch of all ranks.
        """
        if z is None:
            with self.graph("encoder"):
                # Laid out as a cached z, so that sums over it are taken in the same order.
                z = self.models["encoder"](ss.float()).contiguous()
        quantized = self.models["quantizer"](z)
        if self.loss_type == "none":
            terms = EasyDict(quantized.losses)
            loss = self.lambda_vq * terms.vq
        else:
            terms = EasyDict(self.reconstruction_loss(self.models["decoder"](quantized.codes), ss), **quantized.losses)
            loss = terms[self.loss_type] + self.lambda_vq * terms.vq
        terms.loss = loss + self.lambda_commit * terms.commit

        counts = dist_utils.all_sum(codebook_counts(quantized.indices, self.models["quantizer"].n_embed))
        share = counts / counts.sum()
        entropy = torch.special.entr(share).sum()
        status = EasyDict(codebook_usage=(counts > 0).float().mean(), codebook_perplexity=entropy.exp())
        return terms, status

    @classmethod
    def reconstruct(cls, models: dict[str, nn.Module], ss: Tensor) -> Reconstruction:
        z = models["encoder"](ss.float())
        quantized = models["quantizer"](z)
        counts = codebook_counts(quantized.indices, models["quantizer"].n_embed)
        error = (z - quantized.codes).square().flatten(1).mean(1)
        return Reconstruction(models["decoder"](quantized.codes), quantized.indices, counts, error)

    # --- latents of a frozen encoder ---

    def open_run(self) -> None:
        """Open the latent cache too, and first: k-means uses it."""
        if self.latent_cache:
            shape = (len(self.dataset), *self.latent_shape())
            folder = dist_utils.broadcast_object(
                cache_folder(*self.cache_place(), shape) if dist_utils.is_main() else None
            )
            self.latents = LatentCache(folder, shape, self.device, self.say)
        super().open_run()

    def cache_place(self) -> tuple[Path, dict]:
        """The folder that caches lie in, and the key of this run's."""
        root = self.output_dir / "latents" if self.latent_cache is True else Path(self.latent_cache)
        spec, content = self.config["models"]["encoder"], self.dataset.content_key()
        return root, latent_key(spec, self.models["encoder"], content, self.precision.name, self.device)

    def tryrun(self) -> dict[str, float]:
        if self.latent_cache and dist_utils.is_main():
            shape = (len(self.dataset), *self.latent_shape())
            root, key = self.cache_place()
            folder = folder_of(root, key)
            require_place(root, folder, shape)
            self.say(f"latent cache: {4 * math.prod(shape) / 2**30:.2f} GiB in {folder}")
        return super().tryrun()

    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, X, Y, Z] of an object."""
        encoder = self.models["encoder"]
        cells = self.dataset.resolution // encoder.downsampling
        return (encoder.latent_channels, cells, cells, cells)

    def batches(self, **options) -> Iterator[dict[str, Tensor]]:
        """Batches with `z` from the cache, where there is one, and with grids only where `z` does not do."""
        if self.latents is None:
            return super().batches(**options)
        return super().batches(needs_items=self.needs_grids, prepare=self.with_latents, **options)

    def needs_grids(self) -> bool:
        return self.loss_type != "none" or not self.latents.complete

    def with_latents(self, batch: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        z = self.latents.fetch(indices.numpy(), lambda absent: self.encode(batch["ss"], absent))
        if self.loss_type == "none":
            batch.pop("ss", None)  # already gone once the cache is complete
        return {**batch, "z": z}

    @torch.no_grad()
    def encode(self, ss: Tensor, rows: np.ndarray) -> Tensor:
        """Latents [n, C, X, Y, Z] of the grids at rows [n] of ss [B, 1, R, R, R], without a graph.

        They go through the encoder in parts as large as a training step's, the last filled up with repetitions:
        rounding may depend on the number in a part, and cuDNN tunes itself anew for each.
        """
        size = self.batch_per_rank // self.batch_split
        filled = torch.from_numpy(np.resize(rows, -(-len(rows) // size) * size)).to(ss.device)
        with self.precision.autocast():
            parts = [self.models["encoder"](ss[part].float()) for part in filled.split(size)]
        return torch.cat(parts)[: len(rows)]

    # --- a fresh codebook ---

    def initialize_models(self) -> None:
        """Fill a fresh codebook from the latents of the training data, on rank 0."""
        quantizer = self.models["quantizer"]
        if self.plan.files["quantizer"] is not None or quantizer.init != "kmeans" or not dist_utils.is_main():
            return
        vectors = self.latent_vectors(VECTORS_PER_CODE * quantizer.n_embed)
        self.say(f"codebook: k-means of {quantizer.n_embed} codes over {len(vectors)} latent vectors")
        generator = torch.Generator().manual_seed(derive_seed("kmeans", self.seed))
        codes = kmeans(vectors, quantizer.n_embed, iterations=KMEANS_ITERATIONS, generator=generator)
        quantizer.embeddings.weight.data.copy_(codes)

    @torch.no_grad()
    def latent_vectors(self, count: int) -> Tensor:
        """About `count` latent vectors [N, embed_dim] of training objects, an equal share from each."""
        order = permutation(len(self.dataset), "kmeans", self.seed)
        _, *cells = self.latent_shape()
        tokens = math.prod(cells) // self.models["quantizer"].cells_per_token
        share = min(tokens, -(-count // min(OBJECTS_AT_LEAST, len(order))))
        order = order[: max(OBJECTS_AT_LEAST, -(-count // share))]
        vectors = []
        for part in np.split(order, range(self.batch_per_rank, len(order), self.batch_per_rank)):
            for index, z in zip(part.tolist(), self.latents_of(part), strict=True):
                own = self.models["quantizer"].to_vectors(z[None]).flatten(0, -2)
                if share < tokens:
                    picked = permutation(tokens, "kmeans", self.seed, index)[:share]
                    own = own[torch.from_numpy(picked).to(own.device)]
                vectors.append(own)
        return torch.cat(vectors)

    def latents_of(self, indices: np.ndarray) -> Tensor:
        """Latents [n, C, X, Y, Z] of training objects, [n] int64, from the cache where there is one."""

        def encode(absent: np.ndarray) -> Tensor:
            batch = to_device(self.dataset, self.dataset.get_batch(indices[absent]), self.device)
            return self.encode(batch["ss"], np.arange(len(absent)))

        if self.latents is None:
            return encode(np.arange(len(indices)))
        return self.latents.fetch(indices, encode)
