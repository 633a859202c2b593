"""3³ convolutions with stride 1 and padding 1, and their two gradients, by the fastest of several equal variants.

Hardware computes many output channels at a time, and narrow layers leave most of its lanes idle. Merging by m
computes m neighbors along z as the channels of one convolution with m times as many outputs, stride m and a
kernel longer by m - 1, whose weight holds the narrow one at m offsets and zeros elsewhere. It takes (m + 2)/3 times
the arithmetic, but reads each input fewer times and fills the lanes. The result needs no copy: in channels_last_3d,
m voxels of C channels have the memory layout of one voxel of m·C.

Axes: B batch, I and O input and output channels, X Y Z voxels.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The largest number of outputs of a layer worth merging, and the factors tried.
NARROW = {"cpu": 8, "cuda": 64}
MERGES = (2, 4)
TIMED_RUNS = 5

_fastest: dict[tuple, int] = {}
_timed: ContextVar[bool] = ContextVar("timed", default=True)


@contextlib.contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Disable merged convolutions on a GPU: the fastest variant, and so the rounding, can vary between runs."""
    token = _timed.set(False)
    try:
        yield
    finally:
        _timed.reset(token)


class Conv3d(nn.Conv3d):
    """nn.Conv3d with a 3³ kernel and padding 1: [B, I, X, Y, Z] to [B, O, X, Y, Z].

    On a CPU in float32, layers of few channels are merged.
    """

    bias: nn.Parameter  # always there

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv3d(x, self.weight, self.bias)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute F.conv3d(x, weight, bias, padding=1), up to rounding. weight: [O, I, 3, 3, 3], bias: [O]."""
    narrow = min(weight.shape[:2]) <= NARROW["cpu"]
    if x.device.type == "cpu" and narrow and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu"):
        return _MergedConv3d.apply(x, weight, bias)
    return F.conv3d(x, weight, bias, padding=1)


class _MergedConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        return forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = _channels_last(grad)
        grad_x = input_grad(grad, weight) if ctx.needs_input_grad[0] else None
        grads = weight_and_bias_grad(x, grad, weight) if ctx.needs_input_grad[1] else (None, None)
        return grad_x, *grads


def _channels_last(x: Tensor) -> Tensor:
    """Return x in channels_last_3d. One channel fits two layouts, and torch would take the other."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if x.shape[1] > 1:
        return x
    B, _, X, Y, Z = x.shape
    return x.as_strided(x.shape, (X * Y * Z, 1, Y * Z, Z, 1))


# --- the three convolutions; all tensors in channels_last_3d and of one dtype -----------------------------------


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the convolution, [B, O, X, Y, Z]."""
    y = _fastest_of("forward", x, weight, lambda m: _merged(x, weight, bias, m))
    return y.contiguous(memory_format=torch.channels_last_3d)


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of the input, [B, I, X, Y, Z]. grad: the gradient of the result, [B, O, X, Y, Z]."""

    def by(m: int) -> Tensor:
        if m > 1:
            # The gradient is a convolution with the kernel reversed and its channels exchanged.
            # A backward pass inside autocast would run this one, unlike the library's own, in half precision.
            with torch.autocast(grad.device.type, enabled=False):
                return _merged(grad, weight.flip(2, 3, 4).transpose(0, 1), None, m)
        shape = (len(grad), weight.shape[1], *grad.shape[2:])
        unread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last_3d)
        return _backward(grad, unread, weight, 1, (True, False, False))[0]

    return _fastest_of("input_grad", grad, weight, by).contiguous(memory_format=torch.channels_last_3d)


def weight_grad(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of the weight, [O, I, 3, 3, 3]. grad: the gradient of the result, [B, O, X, Y, Z]."""
    return _fastest_of("weight_grad", x, weight, lambda m: _weight_and_bias_grad(x, grad, weight, m, False)[0])


def weight_and_bias_grad(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `weight_grad` and the gradient of the bias, [O]."""
    return _fastest_of("weight_and_bias_grad", x, weight, lambda m: _weight_and_bias_grad(x, grad, weight, m, True))


# --- the variants ----------------------------------------------------------------------------------------------


def _merged(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    if m == 1:
        return F.conv3d(x, weight, bias, padding=1)
    wide = F.conv3d(x, _widened(weight, m), None if bias is None else bias.repeat(m), (1, 1, m), padding=1)
    voxels = wide.permute(0, 2, 3, 4, 1).unflatten(4, (m, len(weight))).flatten(3, 4)
    return voxels.permute(0, 4, 1, 2, 3)


def _weight_and_bias_grad(
    x: Tensor, grad: Tensor, weight: Tensor, m: int, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    mask = (False, True, with_bias)
    if m == 1:
        _, total, bias = _backward(grad, x, weight, 1, mask)
        return laid_out_like(weight, total), bias
    voxels = grad.permute(0, 2, 3, 4, 1).unflatten(3, (-1, m)).flatten(4, 5)
    _, wide, bias = _backward(voxels.permute(0, 4, 1, 2, 3), x, _widened(weight, m), m, mask)
    copies = wide.unflatten(0, (m, len(weight)))
    total = torch.stack([copies[j, ..., j : j + 3] for j in range(m)]).sum(0)  # rounds once in half precision
    return laid_out_like(weight, total), bias.view(m, -1).sum(0) if with_bias else None


def _widened(weight: Tensor, m: int) -> Tensor:
    """Return the merged weight, [m·O, I, 3, 3, m + 2]: output j·O + o is o at the j-th of m neighbors."""
    wide = weight.new_zeros(m, *weight.shape[:4], m + 2)
    for j in range(m):
        wide[j, ..., j : j + 3] = weight
    return wide.flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)


def laid_out_like(weight: Tensor, grad: Tensor) -> Tensor:
    """Return grad in the weight's own strides, which optimizers and reductions over ranks want."""
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, m: int, mask: tuple[bool, bool, bool]) -> tuple:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], (1, 1, m), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1, mask
    )


# --- the choice ------------------------------------------------------------------------------------------------


def _fastest_of(task: str, x: Tensor, weight: Tensor, by: Callable[[int], Any]) -> Any:
    """Return by(m) for the factor m that suits the layer; m = 1 is the library's own convolution.

    On a GPU every factor is timed the first time that a layer of this shape comes. On a CPU the factor follows
    from the shape, so that results are the same in every run.
    """
    outputs, inputs = weight.shape[:2]
    if task == "input_grad":
        outputs, inputs = inputs, outputs
    merges = [m for m in MERGES if x.shape[-1] % m == 0]
    if outputs > NARROW[x.device.type] or not merges:
        return by(1)
    if x.device.type == "cpu":
        # AVX-512 has sixteen lanes. The library's own input gradient from one channel is faster.
        wanted = 1 if task == "input_grad" and inputs == 1 else 16 // outputs
        return by(max([1, *(m for m in merges if m <= wanted)]))
    if not _timed.get():
        return by(1)
    key = (task, weight.shape, x.shape[2:], x.dtype, x.device)
    if key not in _fastest:
        _fastest[key] = min((1, *merges), key=lambda m: _milliseconds(lambda: by(m)))
    return by(_fastest[key])


def _milliseconds(work: Callable[[], Any]) -> float:
    """Return the time of the fastest of a few runs on the current CUDA device."""
    work()  # the library chooses its algorithm
    times = []
    for _ in range(TIMED_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
