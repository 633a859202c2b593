"""Reconstruction and latent losses as pure functions. All compute in fp32 and return a scalar.

`logits` and `target` are [B, 1, R, R, R]; the target is 0 or 1 of any dtype.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

FOCAL_GAMMA = 2


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the binary cross-entropy, mean over voxels."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def l1(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean |sigmoid(logit) - target|.

    Its gradient has the factor p(1 - p), so a voxel that is confidently wrong learns almost nothing.
    """
    return F.l1_loss(logits.float().sigmoid(), target.float())


def l2(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean (sigmoid(logit) - target)²."""
    return F.mse_loss(logits.float().sigmoid(), target.float())


def l1_l2(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the unweighted sum of `l1` and `l2`."""
    return l1(logits, target) + l2(logits, target)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the soft Dice loss (arXiv:1606.04797) of the whole batch, with 1 added to numerator and denominator."""
    probability, target = logits.float().sigmoid(), target.float()
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)


def bce_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the unweighted sum of `bce` and `dice`.

    The first gives every wrong voxel a gradient; the second gives the few occupied voxels the weight of the many
    empty ones.
    """
    return bce(logits, target) + dice(logits, target)


def bce_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the unweighted sum of `bce` and a soft 1 - IoU (Rahman and Wang, ISVC 2016), mean over objects.

    Each object has equal weight, as in validation. Unlike `dice`, the result does not depend on how a batch is split
    over ranks or micro-batches. 1 is added to numerator and denominator.
    """
    probability, occupied = logits.float().sigmoid().flatten(1), target.float().flatten(1)  # [B, N]
    overlap = (probability * occupied).sum(1)
    union = probability.sum(1) + occupied.sum(1) - overlap
    return bce(logits, target) + (1 - (overlap + 1) / (union + 1)).mean()


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the focal loss (arXiv:1708.02002, Eq. 4) with gamma 2.

    It is each voxel's `bce` times (sigmoid(logit) - target)², so that the many voxels that are already right do not
    outweigh the few that are wrong. The weight alpha of Eq. 5 is left out, because it would move the decision away
    from logit 0: with the paper's 0.25 for occupied voxels, a logit is positive only if the voxel is occupied in more
    than 3 of 4 cases.
    """
    logits, target = logits.float(), target.float()
    wrong = (logits.sigmoid() - target).abs()
    return (wrong**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute the KL of N(mean, exp(logvar)) from N(0, 1), mean over elements (arXiv:1312.6114, appendix B)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()


ReconstructionLoss = Literal["bce", "l1", "l2", "l1_l2", "dice", "bce_dice", "bce_iou", "focal"]
RECONSTRUCTION_LOSSES: dict[ReconstructionLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "l1": l1,
    "l2": l2,
    "l1_l2": l1_l2,
    "dice": dice,
    "bce_dice": bce_dice,
    "bce_iou": bce_iou,
    "focal": focal,
}
