"""The parts of the U-Net on a GPU, each as one autograd node that saves as little as possible for backward.

A residual block saves its input and its first convolution's result. Backward computes everything between them again,
which costs one pass over memory each and halves the memory of training. The kernels of `kernels` run around the
convolutions. The arithmetic is the same as in the plain modules; tests compare the two.

Axes: B batch, C channels, X Y Z voxels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import conv
from .kernels.launch import kernels_run
from .norm import ChannelLayerNorm32


def usable(x: Tensor) -> bool:
    """Return whether tensors like x, [B, C, X, Y, Z], can use these functions."""
    return kernels_run(x)


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which convolutions of x run: autocast's, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def residual_block(
    x: Tensor, norm1: ChannelLayerNorm32, conv1: nn.Conv3d, norm2: ChannelLayerNorm32, conv2: nn.Conv3d
) -> Tensor:
    """Compute x + conv2(silu(norm2(conv1(silu(norm1(x)))))), shaped like x, in the working dtype.

    x: [B, C, X, Y, Z].
    """
    dtype = working_dtype(x)
    return _ResidualBlock.apply(
        x.to(dtype),
        norm1.weight,
        norm1.bias,
        conv1.weight.to(dtype),
        conv1.bias,
        norm2.weight,
        norm2.bias,
        conv2.weight.to(dtype),
        conv2.bias,
        norm1.eps,
    )


def last_layer(x: Tensor, norm: ChannelLayerNorm32, convolution: nn.Conv3d) -> Tensor:
    """Compute conv(silu(norm(x))) with sums and result in float32. x: [B, C, X, Y, Z] of any float dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return _LastLayer.apply(x, norm.weight, norm.bias, convolution.weight, convolution.bias, norm.eps)


def first_layer(x: Tensor, convolution: nn.Conv3d) -> Tensor:
    """Compute conv(x) in float32 and return it in the working dtype. x: [B, C, X, Y, Z] float32.

    One channel that needs no gradient, an occupancy grid, has a kernel of its own.
    """
    dtype = working_dtype(x)
    if x.shape[1] == 1 and not x.requires_grad:
        return _FromOneChannel.apply(x, convolution.weight, convolution.bias, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return convolution(x).to(dtype)


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2, eps):
        from .kernels.norm_silu import add_, norm_silu

        x = x.contiguous(memory_format=torch.channels_last_3d)
        # The first bias is added inside the norm that follows, the second with the residual.
        inner = conv.forward(norm_silu(x, None, gamma1, beta1, eps), weight1)
        outer = conv.forward(norm_silu(inner, bias1, gamma2, beta2, eps), weight2)
        ctx.save_for_backward(x, inner, gamma1, beta1, weight1, bias1, gamma2, beta2, weight2)
        ctx.eps = eps
        return add_(outer, x, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from .kernels.norm_silu import norm_silu, norm_silu_backward

        x, inner, gamma1, beta1, weight1, bias1, gamma2, beta2, weight2 = ctx.saved_tensors
        eps, trained = ctx.eps, any(ctx.needs_input_grad[1:])
        grad = grad.contiguous(memory_format=torch.channels_last_3d)

        grad_weight1 = grad_weight2 = None
        if ctx.needs_input_grad[7]:
            grad_weight2 = conv.weight_grad(norm_silu(inner, bias1, gamma2, beta2, eps), grad, weight2)
        grad_inner, grad_gamma2, grad_beta2, grad_bias1 = norm_silu_backward(
            inner, bias1, gamma2, beta2, eps, conv.input_grad(grad, weight2), needs_sums=trained
        )
        if ctx.needs_input_grad[3]:
            grad_weight1 = conv.weight_grad(norm_silu(x, None, gamma1, beta1, eps), grad_inner, weight1)
        grad_x, grad_gamma1, grad_beta1, grad_bias2 = norm_silu_backward(
            x, None, gamma1, beta1, eps, conv.input_grad(grad_inner, weight1), residual_grad=grad, needs_sums=trained
        )
        return (
            grad_x,
            grad_gamma1,
            grad_beta1,
            grad_weight1,
            grad_bias1,
            grad_gamma2,
            grad_beta2,
            grad_weight2,
            grad_bias2,
            None,
        )


class _LastLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, eps):
        from .kernels.norm_silu import norm_silu
        from .kernels.one_channel import contract

        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, gamma, beta, weight)
        ctx.eps = eps
        if len(weight) == 1:
            return contract(norm_silu(x, None, gamma, beta, eps), weight.flatten(2)[0], bias)
        return F.conv3d(norm_silu(x, None, gamma, beta, eps, torch.float32), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from .kernels.norm_silu import norm_silu, norm_silu_backward
        from .kernels.one_channel import expand, weight_grad

        x, gamma, beta, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        trained = any(ctx.needs_input_grad[1:])
        grad_weight = None
        if len(weight) == 1:
            taps = weight.flatten(2)[0]  # [C, 27]
            if trained:
                h = norm_silu(x, None, gamma, beta, ctx.eps)
                grad_weight = conv.laid_out_like(weight, weight_grad(grad, h).flip(1).reshape(weight.shape))
            grad_h = expand(grad, taps.flip(1), torch.zeros_like(gamma), x.dtype)
        else:
            if trained:
                h = norm_silu(x, None, gamma, beta, ctx.eps, torch.float32)
                grad_weight = conv.weight_grad(h, grad, weight)
            grad_h = conv.input_grad(grad, weight)
        grad_x, grad_gamma, grad_beta, _ = norm_silu_backward(x, None, gamma, beta, ctx.eps, grad_h, needs_sums=trained)
        grad_bias = grad.sum((0, 2, 3, 4)) if trained else None
        return grad_x, grad_gamma, grad_beta, grad_weight, grad_bias, None


class _FromOneChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        from .kernels.one_channel import expand

        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        return expand(x, weight.flatten(1), bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from .kernels.one_channel import weight_grad

        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_weight = conv.laid_out_like(weight, weight_grad(x, grad).reshape(weight.shape))
        return None, grad_weight, grad.sum((0, 2, 3, 4), dtype=torch.float32), None
