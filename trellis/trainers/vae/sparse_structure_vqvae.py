"""Training of the vector-quantized VAE of sparse structures, the tokenizer of ShapeLLM-Omni
(arXiv:2506.01853).

Stage 1 freezes encoder and decoder and trains the codebook; stage 2 trains everything.
Axes: B batch, R voxels along an axis, N vectors, K codes.
"""

from typing import Annotated

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
from .sparse_structure_vae import SparseStructureVaeTrainer

# A code of a fresh codebook should stand for this many latent vectors, and these should come from many
# objects, since neighbouring cells of one are alike.
VECTORS_PER_CODE = 64
OBJECTS_AT_LEAST = 256
KMEANS_ITERATIONS = 20


class SparseStructureVqVaeTrainer(SparseStructureVaeTrainer):
    """Trains `encoder`, `quantizer` and `decoder` on the reconstruction loss and the quantizer's losses.

    lambda_vq: weight of the codebook loss. lambda_commit: weight of the commitment loss.
    """

    model_keys = ("encoder", "quantizer", "decoder")
    runtime_args = ("lambda_kl",)  # there is no posterior, and so no KL

    def __init__(
        self,
        *args,
        lambda_vq: Annotated[float, Range(0)] = 1.0,
        lambda_commit: Annotated[float, Range(0)] = 0.25,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.lambda_vq, self.lambda_commit = lambda_vq, lambda_commit

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

    def training_losses(self, ss: Tensor, sample_ids: Tensor) -> tuple[EasyDict, EasyDict]:
        """ss: [B, 1, R, R, R], 0 or 1. sample_ids: unused, nothing is random here.

        Returns (losses, status). losses: "loss", which is optimized, and its terms before weighting.
        status: usage and perplexity of the codebook over the batch of all ranks.
        """
        with self.graph("encoder"):
            z = self.models["encoder"](ss.float())
        quantized = self.models["quantizer"](z)
        terms = EasyDict(self.reconstruction_loss(self.models["decoder"](quantized.codes), ss), **quantized.losses)
        terms.loss = terms[self.loss_type] + self.lambda_vq * terms.vq + self.lambda_commit * terms.commit

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
        share = -(-count // min(OBJECTS_AT_LEAST, len(order)))
        vectors, seen = [], 0
        for number, index in enumerate(order):
            if seen >= count and number >= OBJECTS_AT_LEAST:
                break
            ss = self.dataset[int(index)]["ss"][None].to(self.device).float()
            with self.precision.autocast():
                z = self.models["encoder"](ss)
            tokens = self.models["quantizer"].to_vectors(z.float()).flatten(0, -2)
            if share < len(tokens):
                picked = permutation(len(tokens), "kmeans", self.seed, int(index))[:share]
                tokens = tokens[torch.from_numpy(picked).to(tokens.device)]
            vectors.append(tokens)
            seen += len(tokens)
        return torch.cat(vectors)
