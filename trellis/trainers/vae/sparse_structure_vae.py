"""Training of the continuous VAE of sparse structures (arXiv:2412.01506).

Axes: B batch, C latent channels, X Y Z latent cells, R voxels along an axis, K codes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from easydict import EasyDict
from torch import Tensor, nn

from ...datasets.sparse_structure import SparseStructure
from ...evaluation.evaluate import Reconstruction, evaluate
from ...evaluation.metrics import gaussian_kl_bits
from ...grids.preview import contact_sheet
from ...models.sparse_structure_vae import SparseStructureEncoder, check_networks
from ...modules.losses import RECONSTRUCTION_LOSSES, ReconstructionLoss, gaussian_kl
from ...modules.model import Model
from ...utils import dist_utils
from ...utils.config import Range
from ...utils.errors import ConfigError
from ...utils.random_utils import sample_noise
from ..basic import BasicTrainer
from ..stopping import StoppedError, StopRequests

# Objects in a snapshot, spread evenly over the split.
SNAPSHOT_OBJECTS = 8
# Seed of the posterior's samples that are scored.
EVALUATION_SEED = 0


class SparseStructureVaeTrainer(BasicTrainer):
    """Trainer of `encoder` and `decoder` on a reconstruction loss and a KL term."""

    model_keys: tuple[str, ...] = ("encoder", "decoder")
    dataset: SparseStructure

    def __init__(
        self,
        *args,
        loss_type: ReconstructionLoss = "bce",  # reconstruction loss, see `modules.losses`
        lambda_kl: Annotated[float, Range(0)] = 1e-6,  # weight of the KL
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.loss_type, self.lambda_kl = loss_type, lambda_kl

    @classmethod
    def check_models(cls, models: dict[str, Model], config: dict) -> None:
        cls.check_networks(models, config["dataset"]["args"]["resolution"])

    @classmethod
    def check_networks(cls, models: Mapping[str, nn.Module], resolution: int) -> None:
        """Raise ConfigError for models that do not fit each other or grids of `resolution` voxels along an axis."""
        encoder = cast(SparseStructureEncoder, models["encoder"])
        check_networks(encoder, models["decoder"])
        if resolution % encoder.downsampling:
            raise ConfigError(
                f"dataset.args.resolution is {resolution}, but a latent cell of the encoder covers "
                f"{encoder.downsampling} voxels along an axis; use a multiple of {encoder.downsampling}"
            )

    def training_losses(self, *, ss: Tensor, sample_ids: Tensor) -> tuple[EasyDict, EasyDict]:
        """Return (losses, status). losses: "loss", which is optimized, and its terms before weighting.

        ss: [B, 1, R, R, R], 0 or 1.
        sample_ids: [B] int64 on the CPU; the posterior's samples are drawn by them.
        """
        with self.no_grad_if_frozen("encoder"):
            _, mean, logvar = self.models["encoder"](ss.float(), return_raw=True)
            noise = sample_noise(sample_ids, mean.shape[1:], self.seed, mean.device)
            z = mean + torch.exp(0.5 * logvar) * noise
        logits = self.models["decoder"](z)
        reconstruction = RECONSTRUCTION_LOSSES[self.loss_type](logits, ss)
        terms = EasyDict({self.loss_type: reconstruction}, kl=gaussian_kl(mean, logvar))
        terms.loss = reconstruction + self.lambda_kl * terms.kl
        return terms, EasyDict()

    @classmethod
    def reconstruct(
        cls, models: Mapping[str, nn.Module], ss: Tensor, sample_ids: Tensor | None = None
    ) -> Reconstruction:
        """Reconstruct grids ss [B, 1, R, R, R] from the mean of the posterior.

        sample_ids: [B] int64 on the CPU. With these, also reconstruct from a sample of the posterior, which depends on
        the object's id alone, and return the KL of each latent cell.
        """
        _, mean, logvar = models["encoder"](ss.float(), return_raw=True)
        logits = models["decoder"](mean)
        if sample_ids is None:
            return Reconstruction(logits)
        noise = sample_noise(sample_ids, mean.shape[1:], EVALUATION_SEED, mean.device)
        sampled = models["decoder"](mean + torch.exp(0.5 * logvar) * noise)
        return Reconstruction(logits, sampled=sampled, kl_bits=gaussian_kl_bits(mean, logvar))

    def averaged_models(self) -> Mapping[str, nn.Module]:
        """Return the models that a later stage would load: averages at the highest rate, and frozen models."""
        if not self.ema_rates:
            return self.models
        rate = max(self.ema_rates)
        return {name: self.ema.module(name, rate) if name in self.trained else m for name, m in self.models.items()}

    def validate(self) -> dict[str, float] | None:
        if self.validation is None:
            return None
        dataset, chosen = self.validation
        models = self.averaged_models()
        # With fewer objects than ranks, every rank scores them all.
        shared = len(chosen) >= dist_utils.world_size()
        first, stride = (dist_utils.rank(), dist_utils.world_size()) if shared else (0, 1)
        own = chosen[first::stride].tolist()
        rounds = math.ceil(math.ceil(len(chosen) / stride) / self.micro_batch_size)  # of the slowest rank
        requests, scores = StopRequests(self.device), None
        with self.precision.autocast(), self.status.doing("validation", len(own), state="validating") as work:

            def progress(done: int) -> None:
                work(done)
                number = math.ceil(done / self.micro_batch_size)
                if number < rounds:
                    requests.require_none(number, self.signum)

            try:
                scores = evaluate(
                    lambda ss, _: self.reconstruct(models, ss),
                    dataset,
                    own,
                    batch_size=self.micro_batch_size,
                    device=self.device,
                    progress=progress,
                )
            except StoppedError as error:
                self.validation_stopped = error.signum
        if scores is None:
            return None
        objects = torch.zeros(len(chosen), dtype=torch.float64, device=self.device)
        objects[first::stride] = scores.objects[self.best_by]
        self.object_scores = dist_utils.all_sum(objects) if shared else objects
        return scores.means(dist_utils.all_sum) if shared else scores.means()

    @torch.no_grad()
    def run_snapshot(self) -> dict[str, Any]:
        split: Literal["val", "train"] = "val" if self.dataset.split_sizes()["val"] else "train"
        dataset = self.dataset.for_split(split)
        count = min(SNAPSHOT_OBJECTS, len(dataset))
        models = self.averaged_models()
        rows = []
        for number in range(count):
            index = number * len(dataset) // count
            ss = dataset[index]["ss"][None].to(self.device)
            with self.precision.autocast():
                logits = self.reconstruct(models, ss).logits
            caption = Path(dataset.name(index)).name
            rows.append((ss[0, 0].bool().cpu().numpy(), (logits[0, 0] > 0).cpu().numpy(), caption))
        return {"reconstruction": contact_sheet(rows)}
