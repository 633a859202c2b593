"""Arithmetic precision of training: fp32, bf16 autocast, or fp16 autocast with loss scaling.

Parameters are fp32 in every mode: they are the master weights. TRELLIS's `inflat_all` keeps fp16 copies of
them beside fp32 masters; autocast computes the same products from the masters.
"""

import torch
from torch import Tensor

from ..modules.model import Model
from ..utils.errors import DivergedError
from .skip import SkippableOptimizer


class Precision:
    """One interface to the three modes. On a CPU every mode runs in fp32, and `note` says so.

    mode: None for fp32, "amp" or "inflat_all".
    dtype: "float16" or "bfloat16".
    scale_growth: log2 growth of the fp16 loss scale per good step. A step with an overflow is skipped and halves it.
    """

    def __init__(self, mode: str | None, dtype: str, device: torch.device, scale_growth: float = 1e-3):
        self.device = device
        asked = {"float16": "fp16", "bfloat16": "bf16"}[dtype] if mode else "fp32"
        self.name = asked if device.type == "cuda" else "fp32"
        self.note = f"{asked} was asked for; on a CPU training runs in fp32" if asked != self.name else None
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=2.0**20,
            growth_factor=2.0**scale_growth,
            backoff_factor=0.5,
            growth_interval=1,
            enabled=self.name == "fp16",
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale, before they are clipped."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: SkippableOptimizer, skip: Tensor) -> None:
        """Take the optimizer step unless `skip`, which must be set if a gradient is not finite."""
        optimizer.step(skip)
        self.scaler.update()

    @property
    def hopeless(self) -> bool:
        """Whether fp16 overflowed so often that the loss scale is too small to be of use."""
        return self.skips_overflow and self.scaler.get_scale() < 2.0**-10

    def require_hope(self, step: int) -> None:
        """Raise DivergedError if this precision is `hopeless`."""
        if self.hopeless:
            raise DivergedError(
                f"training has diverged: at step {step}, gradients overflow fp16 however small the loss scale is. "
                'Nothing since the last checkpoint is saved; set trainer.args.mix_precision_dtype to "bfloat16" and '
                "run the same command again, or lower trainer.args.optimizer.args.lr in a new --output_dir"
            )

    @property
    def skips_overflow(self) -> bool:
        """Whether a gradient that is not finite is expected now and then, and its step skipped."""
        return self.scaler.is_enabled()

    def prepare(self, model: Model) -> None:
        """Make the parameters fp32 masters and leave the model's precision to autocast."""
        model.float()
        model.convert_to_fp32()

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
