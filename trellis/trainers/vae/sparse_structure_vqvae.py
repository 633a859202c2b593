"""Training of the vector-quantized VAE of sparse structures, the tokenizer of ShapeLLM-Omni
(arXiv:2506.01853).

Stage 1 freezes encoder and decoder and trains the codebook; stage 2 trains everything.
Axes: B batch, R voxels along an axis, N vectors, K codes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from ...datasets.batches import to_device
from ...evaluation.evaluate import Reconstruction
from ...evaluation.metrics import codebook_counts
from ...modules.losses import ReconstructionLoss
from ...modules.quantizers.base import Quantized
from ...modules.quantizers.kmeans import kmeans
from ...utils import dist_utils
from ...utils.config import Range
from ...utils.errors import ConfigError
from ...utils.random_utils import derive_seed
from .codebook_watch import CodebookWatch
from .latent_cache import LatentCache, cache_folder, folder_of, latent_key, require_place
from .latent_sample import latent_sample
from .sparse_structure_vae import SparseStructureVaeTrainer


class SparseStructureVqVaeTrainer(SparseStructureVaeTrainer):
    """Trains `encoder`, `quantizer` and `decoder` on the reconstruction loss and the quantizer's losses.

    loss_type: as for the VAE, or "none": the codebook learns from its own loss alone and training runs no
    decoder, which takes a frozen encoder and decoder. lambda_vq: weight of the codebook loss. lambda_commit:
    weight of the commitment loss. lambda_entropy: weight of the entropy loss, of quantizers that have one.
    revive_every: steps after which codes that nobody chose get new places, 0 for never; revive_until: share
    of max_steps after which none do any more (see `codebook_watch`). latent_cache: keep the latents of a
    frozen encoder on disk (see `latent_cache`), true in the run folder's `latents`, a string in that folder,
    which runs may share.
    """

    model_keys = ("encoder", "quantizer", "decoder")
    runtime_args = ("lambda_kl",)  # there is no posterior, and so no KL

    def __init__(
        self,
        *args,
        loss_type: Literal[ReconstructionLoss, "none"] = "bce",
        lambda_vq: Annotated[float, Range(0)] = 1.0,
        lambda_commit: Annotated[float, Range(0)] = 0.25,
        lambda_entropy: Annotated[float, Range(0)] = 0.0,
        revive_every: Annotated[int, Range(0)] = 100,
        revive_until: Annotated[float, Range(0, 1)] = 0.8,
        latent_cache: bool | str = False,
        **kwargs,
    ):
        super().__init__(*args, loss_type=loss_type, **kwargs)
        self.lambdas = {"vq": lambda_vq, "commit": lambda_commit, "entropy": lambda_entropy}
        self.revive_every, self.revive_until = revive_every, revive_until
        self.latent_cache = latent_cache
        self.latents: LatentCache | None = None  # from `open_run` on
        self.watch: CodebookWatch | None = None  # from `build_training_state` on
        try:
            self.models["quantizer"].lattice(self.latent_shape()[1:])
        except ValueError as error:
            raise ConfigError(f"models.quantizer.args: {error}") from error

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
        augmentation = config["dataset"].get("args", {}).get("augmentation", "none")
        if args.get("latent_cache") and augmentation != "none":
            raise ConfigError(
                "trainer.args.latent_cache keeps one latent of each object, but dataset.args.augmentation is "
                f'"{augmentation}", which shows it in many forms; set latent_cache to false or augmentation to "none"'
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
        """sample_ids: [B] int64, on the CPU; what may replace dead codes is drawn by them. ss: [B, 1, R, R, R], 0 or
        1; without a reconstruction loss not needed beside z. z: [B, C, X, Y, Z], the encoder's latents where they
        are known.

        Returns (losses, status). losses: "loss", which is optimized, and its terms before weighting.
        status: usage and perplexity of the codebook over the batch of all ranks; of several codes a token, the
        mean usage and the geometric mean of perplexities.
        """
        if z is None:
            with self.graph("encoder"):
                # Laid out as a cached z, so that sums over it are taken in the same order.
                z = self.models["encoder"](ss.float()).contiguous()
        quantizer = self.models["quantizer"]
        quantized = quantizer(z)
        terms = EasyDict()
        if self.loss_type != "none":
            terms.update(self.reconstruction_loss(self.models["decoder"](quantized.codes), ss))
        terms.update(self.quantizer_losses(quantized))
        terms.loss = sum(self.lambdas.get(name, 1.0) * value for name, value in terms.items())

        counts = codebook_counts(quantized.indices, quantizer.n_embed, quantizer.codes_per_token)
        counts = dist_utils.all_sum(counts).view(quantizer.codes_per_token, -1)
        share = counts / counts.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1).mean()
        if self.watch is not None:
            # Without a reconstruction loss a cached run has no grids, and one without the cache must not differ.
            grids = None if self.loss_type == "none" else ss
            self.watch.observe(self.step + 1, counts, z.detach(), quantized.codes.detach(), grids, sample_ids)
        return terms, EasyDict(codebook_usage=(counts > 0).float().mean(), codebook_perplexity=entropy.exp())

    def quantizer_losses(self, quantized: Quantized) -> dict[str, Tensor]:
        """The quantizer's losses, without those that nothing trained has a part in: the codebook's where it is frozen,
        all where the encoder is frozen too. Raises ConfigError for the weight of one that the quantizer lacks."""
        if self.lambdas["entropy"] and "entropy" not in quantized.losses:
            name = type(self.models["quantizer"]).__name__
            raise ConfigError(
                f"trainer.args.lambda_entropy is {self.lambdas['entropy']}, but {name} has no entropy loss; set it "
                "to 0 or take a quantizer that has one"
            )
        if "quantizer" in self.trained:
            return quantized.losses
        if "encoder" in self.trained:
            return {name: value for name, value in quantized.losses.items() if name != "vq"}
        return {}

    def build_training_state(self) -> None:
        super().build_training_state()
        if {"encoder", "quantizer"} & self.trained.keys():  # else nothing changes what is chosen
            self.watch = CodebookWatch(
                self.models["quantizer"],
                self.optimizer,
                self.ema,
                every=self.revive_every,
                last_step=self.revive_until * self.max_steps,
                trained="quantizer" in self.trained,
                seed=self.seed,
                say=self.say,
                device=self.device,
            )

    def run_step(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, status = super().run_step(batch)
        return losses, status if self.watch is None else {**status, **self.watch.after_step(self.step + 1)}

    def training_state(self) -> dict[str, Any]:
        return {} if self.watch is None else {"codebook_watch": self.watch.state_dict()}

    def load_training_state(self) -> dict[str, Any]:
        misc = super().load_training_state()
        if self.watch is not None and "codebook_watch" in misc:  # not in checkpoints from before there was one
            self.watch.load_state_dict(misc["codebook_watch"])
        return misc

    @classmethod
    def reconstruct(cls, models: dict[str, nn.Module], ss: Tensor, sample_ids: Tensor | None = None) -> Reconstruction:
        """What the models make of grids [B, 1, R, R, R]. sample_ids: unused, there is no posterior."""
        z, quantizer = models["encoder"](ss.float()), models["quantizer"]
        quantized = quantizer(z)
        counts = codebook_counts(quantized.indices, quantizer.n_embed, quantizer.codes_per_token)
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

        They go through the encoder in parts as large as a training step's, the last filled up with repetitions,
        since rounding may depend on the number in a part.
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
        self.say("codebook: taking latent vectors of the training data")
        vectors = latent_sample(
            self.latents_of, len(self.dataset), quantizer, batch_size=self.batch_per_rank, seed=self.seed
        )
        generator = torch.Generator().manual_seed(derive_seed("kmeans", self.seed))
        quantizer.fit(vectors, lambda part, count: kmeans(part, count, generator=generator, report=self.say))

    def latents_of(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents [n, C, X, Y, Z], from the cache where there is one, and grids [n, 1, R, R, R] of training objects,
        [n] int64, in one of the forms that training sees them in."""
        batch = to_device(self.dataset, self.dataset.get_batch(indices), self.device)
        ss = self.dataset.augment({**batch, "sample_ids": torch.from_numpy(indices)}, self.seed)["ss"]
        if self.latents is None:
            return self.encode(ss, np.arange(len(indices))), ss
        return self.latents.fetch(indices, lambda absent: self.encode(ss, absent)), ss
