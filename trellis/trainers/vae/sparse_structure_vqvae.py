"""Training of the vector-quantized VAE of sparse structures, the tokenizer of ShapeLLM-Omni
(arXiv:2506.01853).

Stage 1 freezes encoder and decoder and trains the codebook; stage 2 trains everything.
Axes: B batch, C latent channels, X Y Z latent cells, R voxels along an axis.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from ...evaluation.evaluate import Reconstruction
from ...models.sparse_structure_vae import SparseStructureEncoder
from ...models.vqvae import VqVae
from ...modules.losses import RECONSTRUCTION_LOSSES, ReconstructionLoss
from ...modules.model import Model
from ...modules.quantizers.base import Quantizer
from ...modules.quantizers.kmeans import kmeans
from ...utils import dist_utils
from ...utils.config import Range
from ...utils.errors import ConfigError
from ...utils.random_utils import derive_seed, permutation
from .codebook_watch import CodebookWatch
from .latent_sample import latent_sample
from .latents import TrainingLatents
from .sparse_structure_vae import SparseStructureVaeTrainer


class SparseStructureVqVaeTrainer(SparseStructureVaeTrainer):
    """Trainer of `encoder`, `quantizer` and `decoder` on a reconstruction loss and the quantizer's losses.

    Optional is a `transformer` around the codebook.
    """

    model_keys = ("encoder", "quantizer", "decoder")
    optional_models = ("transformer",)
    dropped_args = ("lambda_kl",)  # without a posterior there is no KL

    def __init__(
        self,
        *args,
        # as for the VAE; "none": the codebook learns from its own losses alone, and training runs no decoder
        loss_type: Literal[ReconstructionLoss, "none"] = "bce",
        lambda_vq: Annotated[float, Range(0)] = 1.0,  # weight of the codebook loss
        lambda_commit: Annotated[float, Range(0)] = 0.25,  # weight of the commitment loss
        lambda_entropy: Annotated[float, Range(0)] = 0.0,  # weight of the entropy loss, for quantizers that have one
        revive_every: Annotated[int, Range(0)] = 100,  # steps after which codes that nobody chose are revived; 0: never
        revive_until: Annotated[float, Range(0, 1)] = 0.8,  # share of max_steps after which none are revived any more
        # keep latents of a frozen encoder on disk: true for the run folder's `latents`, or a folder that runs may share
        latent_cache: bool | str = False,
        **kwargs,
    ):
        super().__init__(*args, loss_type=loss_type, **kwargs)  # type: ignore[arg-type]  # "none" is of this class alone
        self.quantizer = cast(Quantizer, self.models["quantizer"])
        self.vqvae = VqVae.of(self.models)
        if self.reference_batch is not None and self.quantizer.decay is not None:
            self.quantizer.decay **= self.batch_ratio / self.batch_split  # every micro-batch moves the averages
        if revive_every:
            revive_every = max(1, round(revive_every / self.batch_ratio))
        self.weights = {loss_type: 1.0, "vq": lambda_vq, "commit": lambda_commit, "entropy": lambda_entropy}
        # Losses that no trained model can lower are left out: "vq" if the codebook is frozen, and the others too if
        # what comes before it is frozen as well.
        self.quantizer_losses: tuple[str, ...] = ()
        moving_latents = bool({"encoder", "transformer"} & self.trained.keys())
        if "quantizer" in self.trained:
            self.quantizer_losses = self.quantizer.losses
        elif moving_latents:
            self.quantizer_losses = tuple(name for name in self.quantizer.losses if name != "vq")
        cache_root = None
        if latent_cache:
            cache_root = Path(latent_cache) if isinstance(latent_cache, str) else self.output_dir / "latents"
        self.latents = TrainingLatents(
            cast(SparseStructureEncoder, self.models["encoder"]),
            self.config["models"]["encoder"],
            self.dataset,
            precision=self.precision,
            device=self.device,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            cache_root=cache_root,
            grids_needed=loss_type != "none" or self.quantizer.empty_code,
            say=self.say,
        )
        self.parts["latents"] = self.latents
        self.watch: CodebookWatch | None = None
        if moving_latents or "quantizer" in self.trained:  # else no step changes which codes are chosen
            self.watch = CodebookWatch(
                self.quantizer,
                every=revive_every,
                last_step=revive_until * self.max_steps,
                trained="quantizer" in self.trained,
                seed=self.seed,
                forget=lambda keys, rows: self.forget_rows("quantizer", keys, rows),
                say=self.say,
                device=self.device,
            )
            self.parts["codebook_watch"] = self.watch

    @classmethod
    def check_networks(cls, models: Mapping[str, nn.Module], resolution: int) -> None:
        super().check_networks(models, resolution)
        VqVae.of(models).check(resolution)

    @classmethod
    def check_models(cls, models: dict[str, Model], config: dict) -> None:
        super().check_models(models, config)
        quantizer, args = cast(Quantizer, models["quantizer"]), config["trainer"]["args"]
        if args["lambda_entropy"] and "entropy" not in quantizer.losses:
            raise ConfigError(
                f"trainer.args.lambda_entropy is {args['lambda_entropy']}, but {type(quantizer).__name__} has no "
                "entropy loss; set it to 0 or take a quantizer that has one"
            )
        if args["latent_cache"] and "encoder" not in args["freeze"]:
            raise ConfigError(
                "trainer.args.latent_cache keeps what a frozen encoder computes, but the encoder is trained; add "
                "encoder to trainer.args.freeze or set latent_cache to false"
            )
        augmentation = config["dataset"]["args"]["augmentation"]
        if args["latent_cache"] and augmentation != "none":
            raise ConfigError(
                "trainer.args.latent_cache keeps one latent of each object, but dataset.args.augmentation is "
                f'"{augmentation}", which shows it in many forms; set latent_cache to false or augmentation to "none"'
            )
        trained = [name for name in models if name != "quantizer" and name not in args["freeze"]]
        if args["loss_type"] == "none" and trained:
            raise ConfigError(
                f'trainer.args.loss_type is "none", which trains the codebook alone; add {" and ".join(trained)} to '
                'trainer.args.freeze or choose a reconstruction loss such as "l1"'
            )

    def split_batch(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the batch's micro-batches. With an empty code, each gets its `token_share` of `training_losses`."""
        micro_batches = super().split_batch(batch)
        if self.quantizer.empty_code:
            occupied = (cast(Tensor, self.vqvae.occupied(micro_batch["ss"])) for micro_batch in micro_batches)
            tokens = torch.stack([own.sum() for own in occupied]).double()
            mean = dist_utils.all_mean(tokens.mean())
            for micro_batch, share in zip(micro_batches, (tokens / mean.clamp(min=1e-9)).float(), strict=True):
                micro_batch["token_share"] = share
        return micro_batches

    def training_losses(
        self,
        *,
        sample_ids: Tensor,
        ss: Tensor | None = None,
        z: Tensor | None = None,
        token_share: Tensor | None = None,
    ) -> tuple[EasyDict, EasyDict]:
        """Return (losses, status). losses: "loss", which is optimized, and its terms before weighting.

        sample_ids: [B] int64 on the CPU; the vectors that may replace dead codes are drawn by them.
        ss: [B, 1, R, R, R], 0 or 1; beside z, needed by a reconstruction loss and by an empty code alone.
        z: [B, C, X, Y, Z], the encoder's latents, if they are known.
        token_share: scalar, the occupied tokens over their mean number in all micro-batches of a step and all ranks.
            The quantizer's losses, which are means over occupied tokens, are multiplied by it, so that their mean is
            that of the whole batch; None for 1.

        status has usage and perplexity of the learned codes over the batch of all ranks. With several codes per token
        they are the mean usage and the geometric mean of the perplexities.
        """
        if z is None:
            assert ss is not None  # a batch has grids or latents
            with self.no_grad_if_frozen("encoder"):
                # Laid out as a cached z, so that sums over it are taken in the same order.
                z = self.models["encoder"](ss.float()).contiguous()
        occupied = None
        if self.quantizer.empty_code:
            assert ss is not None  # `TrainingLatents` keeps grids for an empty code
            occupied = self.vqvae.occupied(ss)
        z = self.vqvae.before(z, occupied)
        quantized = self.quantizer(z, occupied)
        terms = EasyDict()
        if self.loss_type != "none":
            assert ss is not None  # and for a reconstruction loss
            logits = self.vqvae.decode(quantized.codes, occupied)
            terms[self.loss_type] = RECONSTRUCTION_LOSSES[self.loss_type](logits, ss)
        weight = 1.0 if token_share is None else token_share
        terms.update({name: weight * quantized.losses[name] for name in self.quantizer_losses})
        terms.loss = sum(self.weights[name] * value for name, value in terms.items())

        counts = dist_utils.all_sum(self.vqvae.counts(quantized.indices)).view(self.quantizer.codes_per_token, -1)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(share).sum(1).mean()
        if self.watch is not None:
            # Without a reconstruction loss a cached run may have no grids, and one without the cache must not differ.
            grids = ss if self.latents.grids_needed else None
            self.watch.observe(self.step + 1, counts, z.detach(), quantized, grids, sample_ids)
        return terms, EasyDict(codebook_usage=(counts > 0).float().mean(), codebook_perplexity=entropy.exp())

    @classmethod
    def reconstruct(
        cls, models: Mapping[str, nn.Module], ss: Tensor, sample_ids: Tensor | None = None
    ) -> Reconstruction:
        """Reconstruct grids [B, 1, R, R, R]. sample_ids: unused, since there is no posterior."""
        vqvae = VqVae.of(models)
        occupied = vqvae.occupied(ss)
        z = vqvae.before(vqvae.encoder(ss.float()), occupied)
        quantized = vqvae.quantizer(z, occupied)
        error = (z - quantized.codes).square().flatten(1).mean(1)
        if occupied is not None:  # the others have no error
            error = error / occupied.flatten(1).float().mean(1).clamp(min=1 / occupied[0].numel())
        logits = vqvae.decode(quantized.codes, occupied)
        counts, first = vqvae.counts(quantized.indices), vqvae.quantizer.first_code
        return Reconstruction(logits, quantized.indices, counts, error, first_code=first)

    def facts(self) -> list[str]:
        lines, quantizer = super().facts(), self.quantizer
        if lines and quantizer.decay is not None:
            lines.append(f"codebook: averages keep {quantizer.decay:.6g} at each micro-batch")
        tokens = math.prod(quantizer.lattice(self.latents.shape[2:]))
        each = f" ({quantizer.codes_per_token} a token)" if quantizer.codes_per_token > 1 else ""
        if quantizer.empty_code:
            return [
                *lines,
                f"{tokens} places for tokens of {quantizer.codebook_size} codes{each} per object; codes only where the "
                "block has a voxel",
            ]
        bits = tokens * quantizer.codes_per_token * math.log2(quantizer.n_embed)
        return [*lines, f"{tokens} tokens of {quantizer.n_embed} codes{each} per object: {bits:.0f} bits"]

    def initialize_models(self) -> None:
        """Fill a fresh codebook from latents of the training data, on the main process."""
        if self.plan.files["quantizer"] is not None or self.quantizer.init != "kmeans" or not dist_utils.is_main():
            return
        self.say("codebook: taking latent vectors of the training data")
        with self.status.doing("codebook: latents of the data"):
            vectors = latent_sample(
                self._latents_to_quantize,
                self._objects_for_codebook(),
                self.quantizer,
                batch_size=self.batch_per_rank,
                seed=self.seed,
            )
        generator = torch.Generator().manual_seed(derive_seed("kmeans", self.seed))
        with self.status.doing("codebook: k-means"):
            self.quantizer.fit(vectors, lambda part, count: kmeans(part, count, generator=generator, report=self.say))

    def _objects_for_codebook(self) -> np.ndarray:
        """Return the training objects in the order in which a fresh codebook takes them, [n] int64: those of weighted
        roots in their shares."""
        objects = len(self.dataset)
        if self.dataset.shares is None:
            return permutation(objects, "kmeans", self.seed)
        return self.dataset.order(derive_seed("kmeans", self.seed)).items(0, objects)

    def _latents_to_quantize(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return what the quantizer gets of training objects, [n, C, X, Y, Z], and their grids. indices: [n] int64."""
        z, ss = self.latents.of_objects(indices)
        return self.vqvae.before(z, self.vqvae.occupied(ss)), ss
