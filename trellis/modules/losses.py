"""Reconstruction and latent losses as pure functions. All compute in fp32 and return a scalar.

`logits` and `target` are [B, 1, R, R, R]; the target is 0 or 1 of any dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, mean over voxels."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def l1(logits: Tensor, target: Tensor) -> Tensor:
    """Mean |sigmoid(logit) - target|.

    Its gradient carries the factor p(1 - p), so a voxel that is confidently wrong learns almost nothing.
    """
    return F.l1_loss(logits.float().sigmoid(), target.float())


def l2(logits: Tensor, target: Tensor) -> Tensor:
    """Mean (sigmoid(logit) - target)²."""
    return F.mse_loss(logits.float().sigmoid(), target.float())


def l1_l2(logits: Tensor, target: Tensor) -> Tensor:
    """The plain sum of `l1` and `l2`."""
    return l1(logits, target) + l2(logits, target)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss (arXiv:1606.04797) over the whole batch, with 1 added above and below the line."""
    probability, target = logits.float().sigmoid(), target.float()
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), mean over elements (arXiv:1312.6114, appendix B)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()


RECONSTRUCTION_LOSSES = {"bce": bce, "l1": l1, "l2": l2, "l1_l2": l1_l2, "dice": dice}
