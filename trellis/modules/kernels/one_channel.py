"""3³ convolutions, padded by 1, between one channel and C: the first layer of an encoder and the last of a decoder.

Matrix units need many channels on both sides, so these kernels compute plain sums over 27 shifted copies. Their time
is that of reading or writing the C-channel tensor once. Sums are fp32.

Axes: B batch, X Y Z voxels, V = B·X·Y·Z, C channels, T = 27 taps of a kernel in C order of its three axes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, on_device_of

TAPS = 27
BLOCK_V = 128
NUM_WARPS = 4
# Programs of `weight_grad` per multiprocessor; each leaves one partial sum.
PROGRAMS_PER_SM = 4
# Samples that `contract` processes at a time, so that the products per tap stay in a GPU's second-level cache.
SAMPLES_AT_ONCE = 2


@triton.jit
def _split(voxel, X, Y, Z):
    """Return (x, y, z) of flat voxel indices."""
    return (voxel // (Z * Y)) % X, (voxel // Z) % Y, voxel % Z


@triton.jit
def _expand_kernel(
    a_ptr, weight_ptr, bias_ptr, out_ptr, V, X, Y, Z,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    x, y, z = _split(voxel, X, Y, Z)
    total = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    total += tl.load(bias_ptr + columns, mask=in_row, other=0.0)[None, :]
    for tap in tl.static_range(27):
        dx = tap // 9 - 1
        dy = tap // 3 % 3 - 1
        dz = tap % 3 - 1
        there = (x + dx >= 0) & (x + dx < X) & (y + dy >= 0) & (y + dy < Y) & (z + dz >= 0) & (z + dz < Z)
        a = tl.load(a_ptr + voxel + (dx * Y + dy) * Z + dz, mask=there & (voxel < V), other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + tap * C + columns, mask=in_row, other=0.0)
        total += a[:, None] * weight[None, :]
    offsets = voxel.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=(voxel < V)[:, None] & in_row[None, :])


@triton.jit
def _per_tap_kernel(
    h_ptr, weight_ptr, planes_ptr, V,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute planes[t, v] = h[v, :] · weight[t, :]."""
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_C)
    taps = tl.arange(0, 32)
    in_row = columns < C
    inside = (voxel < V)[:, None] & in_row[None, :]
    h = tl.load(h_ptr + voxel.to(tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    known = (taps < 27)[None, :] & in_row[:, None]
    weight = tl.load(weight_ptr + taps[None, :] * C + columns[:, None], mask=known, other=0.0)
    product = tl.dot(h, weight, input_precision=PRECISION)  # [BLOCK_V, 32]
    at = planes_ptr + taps.to(tl.int64)[:, None] * V + voxel[None, :]
    tl.store(at, tl.trans(product), mask=(taps < 27)[:, None] & (voxel < V)[None, :])


@triton.jit
def _gather_kernel(planes_ptr, bias_ptr, out_ptr, V, X, Y, Z, BLOCK_V: tl.constexpr):
    """Compute out[v] = bias + Σ_t planes[t, v + offset of t], with zeros outside the grid."""
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    x, y, z = _split(voxel, X, Y, Z)
    total = tl.zeros([BLOCK_V], tl.float32) + tl.load(bias_ptr)
    for tap in tl.static_range(27):
        dx = tap // 9 - 1
        dy = tap // 3 % 3 - 1
        dz = tap % 3 - 1
        there = (x + dx >= 0) & (x + dx < X) & (y + dy >= 0) & (y + dy < Y) & (z + dz >= 0) & (z + dz < Z)
        at = planes_ptr + voxel + (dx * Y + dy) * Z + dz
        total += tl.load(at, mask=there & (voxel < V), other=0.0)
        planes_ptr += V
    tl.store(out_ptr + voxel, total, mask=voxel < V)


@triton.jit
def _weight_grad_kernel(
    a_ptr, b_ptr, sums_ptr, V, X, Y, Z,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_C)
    taps = tl.arange(0, 32)
    dx, dy, dz = taps // 9 - 1, taps // 3 % 3 - 1, taps % 3 - 1
    in_row = columns < C
    total = tl.zeros([BLOCK_C, 32], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(V, BLOCK_V), tl.num_programs(0)):
        voxel = block * BLOCK_V + tl.arange(0, BLOCK_V)
        x, y, z = _split(voxel, X, Y, Z)
        there = ((voxel < V)[:, None] & (taps < 27)[None, :]
                 & (x[:, None] + dx[None, :] >= 0) & (x[:, None] + dx[None, :] < X)
                 & (y[:, None] + dy[None, :] >= 0) & (y[:, None] + dy[None, :] < Y)
                 & (z[:, None] + dz[None, :] >= 0) & (z[:, None] + dz[None, :] < Z))  # fmt: skip
        shifted = voxel[:, None] + ((dx * Y + dy) * Z + dz)[None, :]
        a = tl.load(a_ptr + shifted, mask=there, other=0.0).to(tl.float32)
        inside = (voxel < V)[None, :] & in_row[:, None]
        b = tl.load(b_ptr + voxel.to(tl.int64)[None, :] * C + columns[:, None], mask=inside, other=0.0).to(tl.float32)
        total = tl.dot(b, a, total, input_precision=PRECISION)
    at = sums_ptr + tl.program_id(0) * C * 32 + columns[:, None] * 32 + taps[None, :]
    tl.store(at, total, mask=in_row[:, None])


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))  # the smallest size of a matrix product


def _precision(x: Tensor) -> str:
    """Return the precision for products with x. tf32 represents half-precision numbers exactly."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _check(name: str, x: Tensor, channels: int | None) -> None:
    if x.ndim != 5 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"{name} must be [B, {channels or 'C'}, X, Y, Z]; it is {tuple(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        raise ValueError(f"the kernels need channels_last_3d; strides of {name} {tuple(x.shape)} are {x.stride()}")


def expand(a: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Convolve from one channel: [B, 1, X, Y, Z] to [B, C, X, Y, Z] of `dtype`, in channels_last_3d.

    weight: [C, 27] float32, bias: [C] float32.
    """
    _check("a", a, 1)
    B, _, X, Y, Z = a.shape
    C, V = len(weight), a.numel()
    out = torch.empty((B, C, X, Y, Z), dtype=dtype, device=a.device, memory_format=torch.channels_last_3d)
    with on_device_of(a):
        _expand_kernel[(triton.cdiv(V, BLOCK_V),)](
            a, weight.t().contiguous(), bias, out, V, X, Y, Z,
            C=C, BLOCK_V=BLOCK_V, BLOCK_C=_width(C), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def contract(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve to one channel: [B, C, X, Y, Z] in channels_last_3d to [B, 1, X, Y, Z] float32.

    weight: [C, 27] float32, rounded to tf32 if h has half precision.
    bias: [1] float32.
    """
    _check("h", h, len(weight))
    B, C, X, Y, Z = h.shape
    out = torch.empty((B, 1, X, Y, Z), dtype=torch.float32, device=h.device)
    weight = weight.t().contiguous()
    planes = torch.empty((TAPS, min(B, SAMPLES_AT_ONCE) * X * Y * Z), dtype=torch.float32, device=h.device)
    with on_device_of(h):
        for part, result in zip(h.split(SAMPLES_AT_ONCE), out.split(SAMPLES_AT_ONCE), strict=True):
            V = result.numel()
            grid = (triton.cdiv(V, BLOCK_V),)
            _per_tap_kernel[grid](
                part, weight, planes, V,
                C=C, BLOCK_V=BLOCK_V, BLOCK_C=_width(C), PRECISION=_precision(h), num_warps=NUM_WARPS,
            )  # fmt: skip
            _gather_kernel[grid](planes, bias, result, V, X, Y, Z, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS)
    return out


def weight_grad(a: Tensor, b: Tensor) -> Tensor:
    """Compute Σ_v b[v, c] · a[v + offset of t], [C, 27] float32.

    a: [B, 1, X, Y, Z], rounded to tf32 if b has half precision.
    b: [B, C, X, Y, Z] in channels_last_3d.
    With the input a of `expand` and the gradient b of its result, this is the gradient of its weight. With the input b
    of `contract` and the gradient a of its result, it is the gradient of its weight, taps in reverse order.
    """
    _check("a", a, 1)
    _check("b", b, None)
    _, C, X, Y, Z = b.shape
    V = a.numel()
    programs = min(triton.cdiv(V, BLOCK_V), PROGRAMS_PER_SM * multiprocessors(a.device))
    sums = torch.empty((programs, C, 32), dtype=torch.float32, device=a.device)
    with on_device_of(a):
        _weight_grad_kernel[(programs,)](
            a, b, sums, V, X, Y, Z,
            C=C, BLOCK_V=BLOCK_V, BLOCK_C=_width(C), PRECISION=_precision(b), num_warps=NUM_WARPS,
        )  # fmt: skip
    return sums.sum(0)[:, :TAPS]
