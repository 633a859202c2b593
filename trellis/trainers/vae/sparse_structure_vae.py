"""Training of the continuous VAE of sparse structures (arXiv:2412.01506).

Axes: B batch, C latent channels, X Y Z latent cells, R voxels along an axis, K codes.
"""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from ...evaluation.evaluate import Reconstruction, evaluate
from ...evaluation.metrics import gaussian_kl_bits
from ...grids.preview import contact_sheet
from ...modules.losses import RECONSTRUCTION_LOSSES, ReconstructionLoss, gaussian_kl
from ...utils import dist_utils
from ...utils.config import Range
from ...utils.random_utils import sample_noise
from ..basic import BasicTrainer

# Objects in a snapshot, spread evenly over the split.
SNAPSHOT_OBJECTS = 8
# Of the posterior's samples that are scored.
EVALUATION_SEED = 0


class SparseStructureVaeTrainer(BasicTrainer):
    """Trains `encoder` and `decoder` on a reconstruction loss and a KL term.

    loss_type: one of `modules.losses`. lambda_kl: weight of the KL.
    """

    model_keys = ("encoder", "decoder")

    def __init__(
        self,
        *args,
        loss_type: ReconstructionLoss = "bce",
        lambda_kl: Annotated[float, Range(0)] = 1e-6,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.loss_type, self.lambda_kl = loss_type, lambda_kl

    def training_losses(self, ss: Tensor, sample_ids: Tensor) -> tuple[EasyDict, EasyDict]:
        """ss: [B, 1, R, R, R], 0 or 1. sample_ids: [B] int64, on the CPU.

        Returns (losses, status). losses: "loss", which is optimized, and its terms before weighting.
        """
        with self.graph("encoder"):
            _, mean, logvar = self.models["encoder"](ss.float(), return_raw=True)
            noise = sample_noise(sample_ids, mean.shape[1:], self.seed, mean.device)
            z = mean + torch.exp(0.5 * logvar) * noise
        terms = EasyDict(self.reconstruction_loss(self.models["decoder"](z), ss), kl=gaussian_kl(mean, logvar))
        terms.loss = terms[self.loss_type] + self.lambda_kl * terms.kl
        return terms, EasyDict()

    def reconstruction_loss(self, logits: Tensor, ss: Tensor) -> dict[str, Tensor]:
        """{loss_type: its value}."""
        return {self.loss_type: RECONSTRUCTION_LOSSES[self.loss_type](logits, ss)}

    def graph(self, name: str) -> contextlib.AbstractContextManager:
        """Around a model that nothing trained comes before: it needs no graph where it is frozen itself."""
        return torch.no_grad() if name in self.frozen else contextlib.nullcontext()

    @classmethod
    def reconstruct(cls, models: dict[str, nn.Module], ss: Tensor, sample_ids: Tensor | None = None) -> Reconstruction:
        """What the models make of grids, from the mean of the posterior. ss: [B, 1, R, R, R].

        sample_ids: [B] int64, on the CPU. With these, also from a sample of the posterior, which depends on the
        object's number alone, and the KL of each latent cell.
        """
        _, mean, logvar = models["encoder"](ss.float(), return_raw=True)
        logits = models["decoder"](mean)
        if sample_ids is None:
            return Reconstruction(logits)
        noise = sample_noise(sample_ids, mean.shape[1:], EVALUATION_SEED, mean.device)
        sampled = models["decoder"](mean + torch.exp(0.5 * logvar) * noise)
        return Reconstruction(logits, sampled=sampled, kl_bits=gaussian_kl_bits(mean, logvar))

    def averaged_models(self) -> dict[str, nn.Module]:
        """What a later stage would load: the average at the highest rate, or the live model where frozen."""
        if not self.ema_rates:
            return self.models
        rate = max(self.ema_rates)
        return {name: self.ema.module(name, rate) if name in self.trained else m for name, m in self.models.items()}

    def validate(self) -> dict[str, float] | None:
        if not self.dataset.split_sizes()["val"]:
            return None
        dataset = self.dataset.for_split("val")
        models = self.averaged_models()
        # With fewer objects than ranks, every rank scores them all.
        shared = len(dataset) >= dist_utils.world_size()
        first, stride = (dist_utils.rank(), dist_utils.world_size()) if shared else (0, 1)
        with self.precision.autocast():
            scores = evaluate(
                lambda ss, _: self.reconstruct(models, ss),
                dataset,
                range(first, len(dataset), stride),
                batch_size=max(1, self.batch_per_rank // self.batch_split),
                device=self.device,
            )
        return scores.means(dist_utils.all_sum) if shared else scores.means()

    @torch.no_grad()
    def run_snapshot(self) -> dict[str, Any]:
        split = "val" if self.dataset.split_sizes()["val"] else "train"
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
