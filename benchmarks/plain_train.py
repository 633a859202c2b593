"""Training in plain PyTorch, as a baseline: `python benchmarks/plain_train.py --help`.

The KL trainer at TRELLIS's settings, and a straightforward vector-quantized trainer in both stages: eager, channels
first, fp16 autocast with a loss scale on a GPU and fp32 on a CPU, AdamW and averages parameter by parameter; each step
checks every gradient for overflow and reads every loss. Prints one JSON object with samples_per_second and
peak_memory_gib.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain
from trellis.models import read_weights
from trellis.utils.command import DEVICES, pick_device, run_command
from trellis.utils.config import load_config

EMA_RATE = 0.9999


class Grids(Dataset):
    """Packed grids, unpacked one by one to float32 [1, R, R, R]."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.resolution = rows, round((rows.shape[1] * 8) ** (1 / 3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        bits = np.unpackbits(self.rows[index]).reshape(1, *(self.resolution,) * 3)
        return torch.from_numpy(bits).float()


def endless(rows: np.ndarray, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Yield shuffled batches of the rows without end."""
    cuda = device.type == "cuda"
    workers = min(8, os.cpu_count() or 1) if cuda else 0
    rows = np.resize(rows, (max(len(rows), batch), rows.shape[1]))
    loader = DataLoader(
        Grids(rows), batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=cuda, persistent_workers=cuda
    )
    while True:
        for grids in loader:
            yield grids.to(device, non_blocking=True)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


RECONSTRUCTION = {
    "bce": F.binary_cross_entropy_with_logits,
    "l1": lambda logits, target: F.l1_loss(logits.sigmoid(), target),
    "l1_l2": lambda logits, target: F.l1_loss(logits.sigmoid(), target) + F.mse_loss(logits.sigmoid(), target),
    "dice": dice,
}


class PlainTrainer:
    """Trainer of plain modules.

    models: {key: plain module} on their device.
    kind: one of `plain.KINDS` except "stage1_cached".
    """

    def __init__(self, models: dict[str, nn.Module], kind: str, args: dict, device: torch.device):
        self.models, self.kind, self.args = models, kind, args
        cuda = device.type == "cuda"
        for name in ("encoder", "decoder"):
            models[name].fp16 = cuda
            models[name].requires_grad_(kind != "stage1")
        self.parameters = [p for model in models.values() for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20, growth_interval=1000, enabled=cuda)

    def losses(self, grid: Tensor) -> dict[str, Tensor]:
        mean, logvar = self.models["encoder"](grid)
        if self.kind == "kl":
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
            losses = {"kl": kl, "loss": self.args["lambda_kl"] * kl}
        else:
            z, _, vq, commit = self.models["quantizer"](mean)
            losses = {"vq": vq, "commit": commit}
            losses["loss"] = self.args["lambda_vq"] * vq + self.args["lambda_commit"] * commit
        name = self.args["loss_type"]
        losses[name] = RECONSTRUCTION[name](self.models["decoder"](z), grid)
        losses["loss"] = losses["loss"] + losses[name]
        return losses

    def step(self, grid: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad()
        losses = self.losses(grid)
        self.scaler.scale(losses["loss"]).backward()
        self.scaler.unscale_(self.optimizer)
        finite = all([bool(p.grad.isfinite().all()) for p in self.parameters])
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for average, p in zip(self.averages, self.parameters, strict=True):
                average.mul_(EMA_RATE).add_(p, alpha=1 - EMA_RATE)
        return {**{name: value.item() for name, value in losses.items()}, "norm": norm.item(), "finite": finite}


def measure(trainer: PlainTrainer, batches: Iterator[Tensor], batch: int, warm: int, steps: int, chunks: int) -> float:
    """Return samples per second: the median over `chunks` chunks of `steps` steps, after `warm` steps.

    Each step ends by reading its losses, so the host's clock shows the device's time.
    """
    for _ in range(warm):
        trainer.step(next(batches))
    rates = []
    for _ in range(chunks):
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(next(batches))
        rates.append(steps * batch / (time.perf_counter() - started))
    return statistics.median(rates)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration with the networks and losses")
    parser.add_argument("--kind", choices=("kl", "stage1", "stage2"), required=True)
    parser.add_argument("--data_dir", required=True, help="a packed .npz file or a folder of them")
    parser.add_argument("--weights", type=json.loads, default={}, help='JSON of {"model": "path without .safetensors"}')
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warm", type=int, default=20, help="steps before the first timed one")
    parser.add_argument("--steps", type=int, default=10, help="steps of a timed chunk")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    config = load_config(args.config)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    models = {}
    for name, spec in config["models"].items():
        models[name] = plain.build(spec)
        if name in args.weights:
            models[name].load_state_dict(read_weights(f"{args.weights[name]}.safetensors"))
        models[name].to(device)
    trainer = PlainTrainer(models, args.kind, config["trainer"]["args"], device)
    batches = endless(common.packed_rows(args.data_dir), args.batch, device)
    rate = measure(trainer, batches, args.batch, args.warm, args.steps, args.chunks)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    print(json.dumps({"samples_per_second": rate, "peak_memory_gib": memory}))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
