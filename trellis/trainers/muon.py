"""Muon: steps of equal size along every direction of a hidden layer's weight (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), with the size of arXiv:2502.16982, Sec. 2.2.

A convolution's weight [C', C, 3, 3, 3] is treated as the matrix [C', 27·C]. The momentum G = U·S·Vᵀ of a matrix becomes
about U·Vᵀ, by five steps of a Newton-Schulz iteration, which needs only matrix products.

Nothing in a matrix's shape tells a hidden layer from a codebook, whose rows are single codes, or from a table of
positions. So matrices are orthogonalized only in groups that say so, which `build_optimizer` makes by the models' own
lists (`Model.hidden_matrices`).

Axes: N weights of one shape, R rows, S columns.
"""

import torch
from torch import Tensor

# Coefficients of X ← a·X + (b·X·Xᵀ + c·(X·Xᵀ)²)·X, which bring singular values in (0, 1] near 1 in few steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
# RMS of an update at lr 1. Adam's is about the same, so its lr and weight decay work here too.
UPDATE_RMS = 0.2
CONVOLUTION = 5  # axes of a 3-D convolution's weight


class Muon(torch.optim.AdamW):
    """Muon for the weights of convolutions and for hidden matrices, AdamW for all else: norms, biases, codes.

    A parameter group with "hidden": True holds matrices to orthogonalize.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,  # of both
        betas: tuple[float, float] = (0.9, 0.999),  # of AdamW
        eps: float = 1e-8,  # of AdamW
        weight_decay: float = 1e-2,  # of both
        momentum: float = 0.95,  # of Muon: the part of the average gradient kept at each step
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must lie in [0, 1)")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["momentum"] = momentum
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden = []
        for group in self.param_groups:
            orthogonalize = group.get("hidden", False)  # older checkpoints have groups without the key
            pairs = [
                (p, p.grad) for p in group["params"] if p.grad is not None and (p.ndim == CONVOLUTION or orthogonalize)
            ]
            self._step_hidden(pairs, group)
            for weight, _ in pairs:
                weight.grad = None  # so that AdamW skips it
            hidden += pairs
        super().step()
        for weight, grad in hidden:
            weight.grad = grad
        return loss

    def _step_hidden(self, pairs: list[tuple[Tensor, Tensor]], group: dict) -> None:
        """Take the step of weights, each paired with its gradient."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for weight, grad in pairs:
            by_shape.setdefault(weight.shape, []).append((weight, grad))
        for alike in by_shape.values():
            averages = []
            for weight, grad in alike:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                    state["step"] = torch.zeros(())  # not counted; Adam expects one in every loaded state
                average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                averages.append(grad.lerp(average, group["momentum"]))  # Nesterov's look ahead
            # Columns in the order of the weights' memory; the result does not depend on it.
            matrices = torch.stack([average.movedim(1, -1).flatten(1) for average in averages])
            updates = orthogonalized(matrices)
            scale = UPDATE_RMS * max(matrices.shape[1:]) ** 0.5
            for (weight, _), update in zip(alike, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.view(weight.movedim(1, -1).shape).movedim(-1, 1).to(weight)
                weight.sub_(update * (group["lr"] * scale))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return about U·Vᵀ of each matrix U·S·Vᵀ in [N, R, S], with singular values between 0.7 and 1.2.

    The result is bf16 on a GPU and fp32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
