"""Exact nearest codes on a GPU, as Triton kernels: the same result as `nearest.py`, without its tiles of scores.

A tensor core scores every pair of vector and code, each number as a sum of two fp16 parts. The codes of a tile
fall into eight slots, and a vector keeps, for each slot, the group of codes with the lowest score. fp64 then
decides among the codes of those groups that come close. Where another group comes close as well, fp64 decides
among all codes.

Scores. For the mean code c, z' = z - c and e' = e - c, half the squared distance is |z'|²/2 + s(e) with
s(e) = |e'|²/2 - z'·e'. Both are scaled by powers of two so that |z'| and |e'| stay below 2¹⁴, where fp16 neither
overflows nor loses much: |s(e)| then stays below 1.5·2²⁸. One row of `columns` holds a vector or a code such that
the dot product of two rows is the score:

    vector   high  low    high   r   r   r   2¹⁵
    code    -low  -high  -high   b₁  b₂  b₃  0, or 2¹⁵ for the padding behind the last code

high = fp16(x), low = fp16(x - high), r the power of two by which the vector's scale differs from the codes', and
b₁ + b₂ + b₃ = (1/2 - fold)·|e'|². Products of fp16 are exact in fp32.

Error. S = |z'||e'| + |e'|²/2 bounds the sum of all |products| but for 0.2 %.
- A tensor core aligns a few products and the running sum to the largest of them and cuts off the bits below
  (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). With four products at a time and 24 bits, the
  least that they found, four columns make 6 cuts of 2⁻²³·S. 8 are allowed for, 2⁻²²·S a column. The columns are
  added 16 at a time from the left, and while low parts alone are summed, cuts are 2⁻¹⁰ of that. So D + 3 columns
  count, and 2D mod 16 low ones that share a step with these.
- The parts leave out low·low and two remainders, 2⁻²²·|z'||e'| each, 3.1 of them with their products.
- fp16 is no finer than 2⁻²⁴. That costs at most 2⁻²⁵ in each low part and in b₃, a `floor` relative to the scales.
So the error is at most B·S + floor, B = 1.01·(D + 2D mod 16 + 7)·2⁻²². As |z'||e'| is at most (|z'|² + |e'|²)/2
and also at most |z'|·reach, where reach = max |e'|, it is at most B·|e'|² + slack with
slack = B·min(|z'|²/2, |z'|·reach) + floor. Lowering the bias by fold = B removes the code's share, so that
score <= s(e) + slack for every code. A code as close as the best one known, at squared distance d, then has a
score of at most d/2 - |z'|²/2 + slack; a group whose lowest score is above this cannot hold the answer.
The roundings in fp64 add (D + 8)·2⁻⁵¹ to fold and to the factor of |z'|². A NaN or infinity anywhere makes the
comparison fail, so that all codes are tried.

Axes: N vectors, K codes, D channels.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.launch import multiprocessors, on_device_of

# Vectors and codes are scaled to norms below 2**SCALE; the bias |e'|²/2 < 2**27 by a further 2**-BIAS_SCALE.
SCALE = tl.constexpr(14)
BIAS_SCALE = tl.constexpr(12)
# Slots of a tile. A group holds those of its codes whose scores lie in the same thread's registers, with the tensor
# core's layout of results (PTX ISA, wgmma): of 4·G codes in a row, group q has the G codes 8·j + 2·q + {0, 1}.
SLOTS = tl.constexpr(8)
# Elements of the vectors' columns at a time, 16 MiB: more vectors take several rounds.
COLUMN_ELEMENTS = 2**23
# Every kernel has four warps: a tensor core of Hopper takes its instructions from four. Three stages are the least
# with which codes are loaded while others are being scored.
WARPS, STAGES = 4, 3
# Vectors of one program that decides between groups; vectors and codes of one that tries all codes. Few vectors let
# a short list keep many multiprocessors busy; more of either do not fit the registers.
DECIDE_ROWS = 16
EXHAUST_ROWS, EXHAUST_CODES = 4, 512
# Programs per multiprocessor that try all codes for the vectors left undecided. Without such vectors they end at once.
PROGRAMS_PER_SM = 8


class Sizes(NamedTuple):
    """Block sizes for D channels. They depend on D alone, so that results never depend on the batch."""

    columns: int  # of the scaled parts, padded with zeros
    step: int  # columns of one dot product
    vectors: int  # of one program that scores
    codes: int  # scored at a time

    @classmethod
    def of(cls, channels: int) -> "Sizes":
        """Return the sizes for vectors of `channels`."""
        used = 3 * channels + 4
        # Many codes at a time are faster, but two programs must fit one multiprocessor's shared memory.
        if used > 128:
            return cls(triton.cdiv(used, 64) * 64, 64, 128, 64)
        columns = max(32, triton.next_power_of_2(used))
        return cls(columns, columns, 128, 128 if columns <= 64 else 64)


@torch.no_grad()
def nearest_code_cuda(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code in Euclidean distance, the lowest on ties, as [N] int64.

    vectors: [N, D] float32 on a CUDA device, codebook: [K, D] float32 on the same.
    The sum of squared differences in fp64 decides, so a vector's index does not depend on the other vectors. The host
    does not wait for the device. Needs up to 40 MiB of memory, and up to 16·D + 80 bytes per code. For a vector that
    is not finite, the index is undefined but lies in [0, K).
    """
    (N, D), K = vectors.shape, len(codebook)
    indices = torch.empty(N, dtype=torch.int64, device=vectors.device)
    if not N:
        return indices
    sizes = Sizes.of(D)
    vectors, codebook = vectors.contiguous(), codebook.contiguous()
    channels = triton.next_power_of_2(D)
    rows = max(1, 2048 // max(channels, sizes.step))  # of the kernels that prepare columns
    bound = 1.01 * (D + 2 * D % 16 + 7) * 2.0**-22
    rounding = (D + 8) * 2.0**-51
    bias = (0.5 - bound - rounding) * 2.0**-BIAS_SCALE.value
    # In the scale of scores: 2⁻²⁵·(|z'|₁ + |e'|₁) <= √D·2⁻¹⁰, r·2⁻²⁵ <= 2⁻¹³ for b₃, and 2⁻¹⁰ if fp16 has no such r.
    floor = (1.01 * math.sqrt(D) + 1.2) * 2.0**-10

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=vectors.device)

    with on_device_of(vectors):
        center = codebook.mean(0)
        reach = torch.zeros(1, dtype=torch.int64, device=vectors.device)
        _reach_kernel[(triton.cdiv(K, rows),)](codebook, center, reach, K, D=D, BLOCK_D=channels, ROWS=rows)
        tiles = triton.cdiv(K, sizes.codes)
        padded = tiles * sizes.codes
        code_columns = empty(padded, sizes.columns, dtype=torch.float16)
        transposed = empty(D, K, dtype=torch.float32)
        _code_columns_kernel[(triton.cdiv(padded, rows),)](
            codebook, center, reach, code_columns, transposed, K, padded,
            BIAS=bias, D=D, BLOCK_D=channels, COLUMNS=sizes.columns, STEP=sizes.step, ROWS=rows,
        )  # fmt: skip

        # A multiple of the block, so that all portions are aligned alike and share their compiled kernels.
        portion = min(N, max(1, COLUMN_ELEMENTS // (sizes.columns * sizes.vectors)) * sizes.vectors)
        columns = empty(portion, sizes.columns, dtype=torch.float16)
        scale = empty(portion, dtype=torch.float64)
        limit = empty(portion, dtype=torch.float64)
        lowest = empty(portion, SLOTS.value, dtype=torch.float32)
        tile_of_lowest = empty(portion, SLOTS.value, dtype=torch.int32)
        others = empty(portion, dtype=torch.float32)
        undecided = empty(portion, dtype=torch.int32)
        counts = torch.zeros(triton.cdiv(N, portion), dtype=torch.int32, device=vectors.device)
        parts = zip(vectors.split(portion), indices.split(portion), counts.split(1), strict=True)
        for part, nearest, count in parts:
            n = len(part)
            _vector_columns_kernel[(triton.cdiv(n, rows),)](
                part, center, reach, columns, scale, limit, n, BOUND=bound, FLOOR=floor, ROUNDING=rounding,
                D=D, BLOCK_D=channels, COLUMNS=sizes.columns, STEP=sizes.step, ROWS=rows,
            )  # fmt: skip
            _score_kernel[(triton.cdiv(n, sizes.vectors),)](
                columns, code_columns, lowest, tile_of_lowest, others, n, tiles,
                COLUMNS=sizes.columns, STEP=sizes.step, BLOCK_N=sizes.vectors, BLOCK_K=sizes.codes,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
            _decide_kernel[(triton.cdiv(n, DECIDE_ROWS),)](
                part, codebook, lowest, tile_of_lowest, others, scale, limit, nearest, undecided, count, n, K,
                D=D, BLOCK_D=min(8, channels), GROUP=sizes.codes // SLOTS.value, ROWS=DECIDE_ROWS,
            )  # fmt: skip
            programs = min(triton.cdiv(n, EXHAUST_ROWS), PROGRAMS_PER_SM * multiprocessors(vectors.device))
            _exhaust_kernel[(programs,)](
                part, transposed, undecided, count, nearest, K,
                D=D, UNROLL=math.gcd(D, 8), ROWS=EXHAUST_ROWS, BLOCK_K=EXHAUST_CODES,
            )  # fmt: skip
    return indices


@triton.jit
def _power_of_two(exponent):
    """Return 2**exponent as fp64, for exponents in -1022 … 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent_above(squared):
    """Return an exponent n >= -149 with sqrt(squared) < 2**n, from the exponent bits of fp64."""
    bits = (squared.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return tl.maximum((bits.to(tl.int32) - 1021) >> 1, -149)


@triton.jit
def _centered_squares(source_ptr, center_ptr, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return |x - c|² of each row in fp64."""
    d = tl.arange(0, BLOCK_D)[None, :]
    here = inside[:, None] & (d < D)
    x = tl.load(source_ptr + row[:, None].to(tl.int64) * D + d, mask=here, other=0.0).to(tl.float64)
    x -= tl.load(center_ptr + d, mask=d < D, other=0.0).to(tl.float64)
    x = tl.where(here, x, 0.0)
    return tl.sum(x * x, 1)


@triton.jit
def _parts(source_ptr, center_ptr, row, inside, column, factor, low_in: tl.constexpr, D: tl.constexpr):
    """Return columns of the scaled high and low parts as fp64, the low ones in third `low_in`. Other columns are 0."""
    third, d = column // D, column % D
    here = inside[:, None] & (column < 3 * D)
    x = tl.load(source_ptr + row[:, None].to(tl.int64) * D + d, mask=here, other=0.0).to(tl.float64)
    x = tl.where(here, (x - tl.load(center_ptr + d).to(tl.float64)) * factor[:, None], 0.0)
    high = x.to(tl.float16).to(tl.float64)
    return tl.where(third == low_in, x - high, high)


@triton.jit(do_not_specialize=["K"])
def _reach_kernel(codebook_ptr, center_ptr, reach_ptr, K, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Raise `reach` to the largest |e'|², as the bits of fp64, which sort like the numbers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squared = _centered_squares(codebook_ptr, center_ptr, row, row < K, D, BLOCK_D)
    tl.atomic_max(reach_ptr, tl.max(squared, 0).to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["K", "padded"])
def _code_columns_kernel(
    codebook_ptr, center_ptr, reach_ptr, columns_ptr, transposed_ptr, K, padded, BIAS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the codes' columns and the transposed codebook. BIAS: the factor of |e'|²."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < K
    d = tl.arange(0, BLOCK_D)[None, :]
    here = inside[:, None] & (d < D)
    e = tl.load(codebook_ptr + row[:, None].to(tl.int64) * D + d, mask=here)
    tl.store(transposed_ptr + d.to(tl.int64) * K + row[:, None], e, mask=here)
    factor = _power_of_two(-_exponent_above(tl.load(reach_ptr).to(tl.float64, bitcast=True)) + SCALE)
    squared = _centered_squares(codebook_ptr, center_ptr, row, inside, D, BLOCK_D)
    b = squared * factor * factor * BIAS
    b1 = b.to(tl.float16).to(tl.float64)
    b2 = (b - b1).to(tl.float16).to(tl.float64)
    b3 = b - b1 - b2
    for start in range(0, COLUMNS, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        value = -_parts(codebook_ptr, center_ptr, row, inside, column, tl.zeros([ROWS], tl.float64) + factor, 0, D)
        value = tl.where(column == 3 * D, b1[:, None], value)
        value = tl.where(column == 3 * D + 1, b2[:, None], value)
        value = tl.where(column == 3 * D + 2, b3[:, None], value)
        value = tl.where(column == 3 * D + 3, tl.where(inside, 0.0, 32768.0)[:, None], value)
        tl.store(columns_ptr + row[:, None].to(tl.int64) * COLUMNS + column, value.to(tl.float16),
                 mask=(row < padded)[:, None])  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _vector_columns_kernel(
    vectors_ptr, center_ptr, reach_ptr, columns_ptr, scale_ptr, limit_ptr, N,
    BOUND: tl.constexpr, FLOOR: tl.constexpr, ROUNDING: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the vectors' columns; `scale`, which turns a score into s(e); and `limit`, slack - |z'|²/2."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    reach_squared = tl.load(reach_ptr).to(tl.float64, bitcast=True)
    squared = _centered_squares(vectors_ptr, center_ptr, row, inside, D, BLOCK_D)
    code_exponent = _exponent_above(reach_squared)
    exponent = tl.maximum(_exponent_above(squared), code_exponent)
    factor = _power_of_two(-exponent + SCALE)
    bias_factor = _power_of_two(code_exponent - exponent + BIAS_SCALE)
    for start in range(0, COLUMNS, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        value = _parts(vectors_ptr, center_ptr, row, inside, column, factor, 1, D)
        value = tl.where((column >= 3 * D) & (column < 3 * D + 3), bias_factor[:, None], value)
        value = tl.where(column == 3 * D + 3, 32768.0, value)
        tl.store(columns_ptr + row[:, None] * COLUMNS + column, value.to(tl.float16), mask=inside[:, None])
    to_score = _power_of_two(exponent + code_exponent - 2 * SCALE)
    slack = BOUND * tl.minimum(0.5 * squared, tl.sqrt(squared) * tl.sqrt(reach_squared)) + FLOOR * to_score
    tl.store(scale_ptr + row, to_score, mask=inside)
    tl.store(limit_ptr + row, slack + (ROUNDING - 0.5) * squared, mask=inside)


@triton.jit(do_not_specialize=["N", "tiles"])
def _score_kernel(
    vectors_ptr, codes_ptr, lowest_ptr, tile_of_lowest_ptr, others_ptr, N, tiles,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write, for each vector and slot, the lowest score and its tile; for each vector, the other groups' lowest score.

    A group's minimum needs no exchange between threads, and one instruction per score.
    """
    GROUP: tl.constexpr = BLOCK_K // SLOTS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, STEP)
    z_at = vectors_ptr + row[:, None] * COLUMNS + column[None, :]
    e_at = codes_ptr + tl.arange(0, BLOCK_K)[None, :] * COLUMNS + column[:, None]
    inside = (row < N)[:, None]
    if COLUMNS == STEP:
        z = tl.load(z_at, mask=inside, other=0.0)
    best = tl.full([BLOCK_N, SLOTS // 4, 4], float("inf"), tl.float32)
    second = best
    tile_of_best = tl.zeros([BLOCK_N, SLOTS // 4, 4], tl.int32)
    for tile in range(tiles):
        if COLUMNS == STEP:
            scores = tl.dot(z, tl.load(e_at))
        else:
            scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for start in range(0, COLUMNS, STEP):
                scores = tl.dot(tl.load(z_at + start, mask=inside, other=0.0), tl.load(e_at + start), scores)
        score = tl.min(tl.min(tl.reshape(scores, [BLOCK_N, SLOTS // 4, GROUP // 2, 4, 2]), 4), 2)
        second = tl.minimum(second, tl.maximum(best, score))
        tile_of_best = tl.where(score < best, tile, tile_of_best)
        best = tl.minimum(best, score)
        e_at += BLOCK_K * COLUMNS
    at = row[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.store(lowest_ptr + at, tl.reshape(best, [BLOCK_N, SLOTS]), mask=inside)
    tl.store(tile_of_lowest_ptr + at, tl.reshape(tile_of_best, [BLOCK_N, SLOTS]), mask=inside)
    tl.store(others_ptr + row, tl.min(tl.reshape(second, [BLOCK_N, SLOTS]), 1), mask=row < N)


@triton.jit
def _nearest_of_group(
    vectors_ptr, codebook_ptr, tile_of_lowest_ptr, row, slot, inside, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the smallest squared distance to a code of each row's group in the slot, fp64, and the code's index."""
    tile = tl.load(tile_of_lowest_ptr + row * SLOTS + slot, mask=inside, other=0)
    member = tl.arange(0, GROUP)[None, :]
    first = tile * (SLOTS * GROUP) + slot // 4 * (4 * GROUP) + slot % 4 * 2
    code = first[:, None] + member // 2 * 8 + member % 2
    distance = tl.zeros([ROWS, GROUP], tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, None, :]
        z = tl.load(vectors_ptr + row[:, None, None] * D + d, mask=inside[:, None, None] & (d < D), other=0.0)
        here = (inside[:, None] & (code < K))[:, :, None] & (d < D)
        e = tl.load(codebook_ptr + code[:, :, None].to(tl.int64) * D + d, mask=here, other=0.0)
        difference = z.to(tl.float64) - e.to(tl.float64)
        distance += tl.sum(difference * difference, 2)
    distance = tl.where(code < K, distance, float("inf"))
    smallest = tl.min(distance, 1)
    return smallest, tl.min(tl.where(distance == smallest[:, None], code, 0x7FFFFFFF), 1)


@triton.jit(do_not_specialize=["count_ptr", "N", "K"])
def _decide_kernel(
    vectors_ptr, codebook_ptr, lowest_ptr, tile_of_lowest_ptr, others_ptr, scale_ptr, limit_ptr,
    nearest_ptr, undecided_ptr, count_ptr, N, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the nearest code of the slots' groups if no other group can have a closer one; else list the vector."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    to_score = tl.load(scale_ptr + row, mask=inside, other=0.0)
    slack = tl.load(limit_ptr + row, mask=inside, other=0.0)
    slots = row[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    first = tl.argmin(tl.load(lowest_ptr + slots, mask=inside[:, None], other=0.0), 1)
    smallest, index = _nearest_of_group(
        vectors_ptr, codebook_ptr, tile_of_lowest_ptr, row, first, inside, K, D, BLOCK_D, GROUP, ROWS
    )
    for slot in range(SLOTS):
        score = tl.load(lowest_ptr + row * SLOTS + slot, mask=inside, other=0.0).to(tl.float64) * to_score
        near = inside & (first != slot) & (score <= 0.5 * smallest + slack)
        if tl.max(near.to(tl.int32), 0) > 0:
            distance, code = _nearest_of_group(
                vectors_ptr, codebook_ptr, tile_of_lowest_ptr, row, tl.zeros([ROWS], tl.int32) + slot, near, K,
                D, BLOCK_D, GROUP, ROWS,
            )  # fmt: skip
            closer = near & ((distance < smallest) | ((distance == smallest) & (code < index)))
            smallest = tl.where(closer, distance, smallest)
            index = tl.where(closer, code, index)
    score = tl.load(others_ptr + row, mask=inside, other=0.0).to(tl.float64) * to_score
    decided = score > 0.5 * smallest + slack
    tl.store(nearest_ptr + row, index.to(tl.int64), mask=inside & decided)
    left = (inside & (decided == 0)).to(tl.int32)
    total = tl.sum(left, 0)
    if total > 0:
        entry = tl.atomic_add(count_ptr, total) + tl.cumsum(left, 0) - left
        tl.store(undecided_ptr + entry, row, mask=left != 0)


@triton.jit(do_not_specialize=["count_ptr", "K"])
def _exhaust_kernel(
    vectors_ptr, transposed_ptr, undecided_ptr, count_ptr, nearest_ptr, K,
    D: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the nearest of all codes for the listed vectors. Each program takes every num_programs-th block of them."""
    total = tl.load(count_ptr)
    lane = tl.arange(0, BLOCK_K)
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        entry = block * ROWS + tl.arange(0, ROWS)
        row = tl.load(undecided_ptr + entry, mask=entry < total, other=0)
        best = tl.full([ROWS, BLOCK_K], float("inf"), tl.float64)
        start_of_best = tl.zeros([ROWS, BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            z_at, e_at = vectors_ptr + row * D, transposed_ptr + start + lane
            distance = tl.zeros([ROWS, BLOCK_K], tl.float64)
            for _channel in range(0, D, UNROLL):  # not `_` twice: Triton 3.3 refuses a name of two kinds
                for _ in tl.static_range(UNROLL):
                    z = tl.load(z_at).to(tl.float64)
                    # Behind the last code: no distance is smaller than infinity.
                    e = tl.load(e_at, mask=start + lane < K, other=float("inf")).to(tl.float64)
                    difference = z[:, None] - e[None, :]
                    distance += difference * difference
                    z_at += 1
                    e_at += K
            closer = distance < best
            start_of_best = tl.where(closer, start, start_of_best)
            best = tl.where(closer, distance, best)
        smallest = tl.min(best, 1)
        index = tl.min(tl.where(best == smallest[:, None], start_of_best + lane[None, :], 0x7FFFFFFF), 1)
        tl.store(nearest_ptr + row, index.to(tl.int64), mask=entry < total)
