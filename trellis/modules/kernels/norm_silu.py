"""Layer norm over channels followed by SiLU, forward and backward, and the residual sum, each in one pass.

All are limited by memory bandwidth: every tensor is read or written once, in its own dtype, and the arithmetic is
fp32. A row's mean and variance are computed again in each pass, so that none are saved.

Axes: M rows (voxels of all samples), C channels, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, on_device_of

# Elements that one program processes at a time, in whole rows, and its warps. The backward pass keeps more of a row
# in registers; with smaller programs, enough of them fit to hide the memory's latency.
FORWARD_TILE, FORWARD_WARPS = 4096, 8
BACKWARD_TILE, BACKWARD_WARPS = 1024, 4
# Programs of the backward pass per multiprocessor. Each sums its share of the rows' parameter gradients, so that
# few partial sums remain and the result does not depend on the order in which programs run.
PROGRAMS_PER_SM = 8


@triton.jit
def _normalize(x, in_row, C: tl.constexpr, eps):
    """Return (x̂, 1/σ) of rows [BLOCK_M, BLOCK_C] float32, of which the first C columns count."""
    mean = tl.sum(x, 1) / C
    centered = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def _norm_silu_kernel(
    x_ptr, shift_ptr, gamma_ptr, beta_ptr, out_ptr, M, eps,
    C: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    inside = (rows < M)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    gamma = tl.load(gamma_ptr + columns, mask=in_row, other=0.0)[None, :]
    beta = tl.load(beta_ptr + columns, mask=in_row, other=0.0)[None, :]

    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift_ptr + columns, mask=in_row, other=0.0)[None, :]
    normal, _ = _normalize(x, in_row, C, eps)
    n = normal * gamma + beta
    tl.store(out_ptr + offsets, (n * tl.sigmoid(n)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_silu_backward_kernel(
    x_ptr, shift_ptr, gamma_ptr, beta_ptr, grad_ptr, residual_grad_ptr, grad_x_ptr, sums_ptr, M, eps,
    C: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    gamma = tl.load(gamma_ptr + columns, mask=in_row, other=0.0)[None, :]
    beta = tl.load(beta_ptr + columns, mask=in_row, other=0.0)[None, :]
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + columns, mask=in_row, other=0.0)[None, :]
    if NEEDS_SUMS:
        grad_gamma = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        grad_beta = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        grad_bias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & in_row[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            x += shift
        normal, rstd = _normalize(x, in_row, C, eps)
        n = normal * gamma + beta
        s = tl.sigmoid(n)
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad_n = grad * s * (1 + n * (1 - s))
        scaled = grad_n * gamma
        along_mean = tl.sum(scaled, 1) / C
        along_normal = tl.sum(scaled * normal, 1) / C
        grad_x = rstd[:, None] * (scaled - along_mean[:, None] - normal * along_normal[:, None])
        # In columns past C and rows past M, grad and grad_x are undefined; neither may enter a sum.
        grad_x = tl.where(inside, grad_x, 0.0)
        if NEEDS_SUMS:
            grad_gamma += grad_n * normal
            grad_beta += grad_n
        if HAS_RESIDUAL:
            residual_grad = tl.load(residual_grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if NEEDS_SUMS:
                grad_bias += residual_grad
            grad_x += residual_grad
        elif NEEDS_SUMS:
            grad_bias += grad_x
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)

    if NEEDS_SUMS:
        own_sums_ptr = sums_ptr + tl.program_id(0) * 3 * C + columns
        tl.store(own_sums_ptr, tl.sum(grad_gamma, 0), mask=in_row)
        tl.store(own_sums_ptr + C, tl.sum(grad_beta, 0), mask=in_row)
        tl.store(own_sums_ptr + 2 * C, tl.sum(grad_bias, 0), mask=in_row)


@triton.jit
def _add_kernel(
    x_ptr, residual_ptr, bias_ptr, M, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    inside = (rows < M)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=inside).to(tl.float32)
    x += tl.load(residual_ptr + offsets, mask=inside).to(tl.float32)
    x += tl.load(bias_ptr + columns, mask=in_row)[None, :]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=inside)


def _blocks(channels: int, tile: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK_C": width, "BLOCK_M": max(1, tile // width)}


def _rows(x: Tensor) -> int:
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        raise ValueError(f"the kernels need channels_last_3d; strides of {tuple(x.shape)} are {x.stride()}")
    return x.numel() // x.shape[1]


def norm_silu(
    x: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute silu(layer_norm(x + shift) · gamma + beta) over the channels of each voxel.

    x: [B, C, X, Y, Z] in channels_last_3d, float32, bfloat16 or float16.
    shift, gamma, beta: [C] float32.
    dtype: of the result; by default that of x.
    Raise ValueError for another memory format.
    """
    M, sizes = _rows(x), _blocks(x.shape[1], FORWARD_TILE)
    out = torch.empty_like(x, dtype=dtype)
    with on_device_of(x):
        _norm_silu_kernel[(triton.cdiv(M, sizes["BLOCK_M"]),)](
            x, gamma if shift is None else shift, gamma, beta, out, M, eps,
            HAS_SHIFT=shift is not None, num_warps=FORWARD_WARPS, **sizes,
        )  # fmt: skip
    return out


def norm_silu_backward(
    x: Tensor,
    shift: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    grad: Tensor,
    residual_grad: Tensor | None = None,
    needs_sums: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of `norm_silu`, given the gradient `grad` of its result.

    residual_grad: a tensor like x, which is added to the gradient of x.
    Return (grad_x, grad_gamma, grad_beta, grad_bias): grad_x like x, the others [C] float32, or None without
    `needs_sums`. grad_bias is the sum of residual_grad over voxels, or, without one, the sum of grad_x, which is the
    gradient of shift.
    """
    M, C, sizes = _rows(x), x.shape[1], _blocks(x.shape[1], BACKWARD_TILE)
    if _rows(grad) != M or (residual_grad is not None and _rows(residual_grad) != M):
        raise ValueError(f"gradients must be shaped like x, {tuple(x.shape)}")
    programs = min(triton.cdiv(M, sizes["BLOCK_M"]), PROGRAMS_PER_SM * multiprocessors(x.device))
    grad_x = torch.empty_like(x)
    sums = torch.empty((programs if needs_sums else 0, 3, C), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _norm_silu_backward_kernel[(programs,)](
            x, gamma if shift is None else shift, gamma, beta, grad, grad if residual_grad is None else residual_grad,
            grad_x, sums, M, eps,
            HAS_SHIFT=shift is not None, HAS_RESIDUAL=residual_grad is not None, NEEDS_SUMS=needs_sums,
            num_warps=BACKWARD_WARPS, **sizes,
        )  # fmt: skip
    return (grad_x, *sums.sum(0)) if needs_sums else (grad_x, None, None, None)


def add_(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """Add residual and bias to x in place. x, residual: [B, C, X, Y, Z] in channels_last_3d; bias: [C] float32."""
    M, sizes = _rows(x), _blocks(x.shape[1], FORWARD_TILE)
    if _rows(residual) != M:
        raise ValueError(f"the residual must be shaped like x, {tuple(x.shape)}; it is {tuple(residual.shape)}")
    with on_device_of(x):
        _add_kernel[(triton.cdiv(M, sizes["BLOCK_M"]),)](x, residual, bias, M, num_warps=FORWARD_WARPS, **sizes)
    return x
