"""GroupNorm's kernels for maps of any size, each a pass over chunks of pixels or over their partial results.

Forward: moments of chunks, their merge into statistics, the output. Backward: sums of chunks, means of groups, the
gradient of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.norm_silu.triton_tile import (
    STAGES,
    dropout_key,
    finish_bwd,
    finish_fwd,
    load,
    load_bias_of,
    load_gradient,
    load_statistics,
    load_with_bias,
    slope_and_intercept,
    sums_of,
)
from ddpm_fast.runtime import triton_launch


@triton.jit
def group_moments_kernel(
    x_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n
    moments_ptr,  # (B, chunks, 2, C) float32: mean of v and Σ (v − mean)² over a chunk's pixels
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    HW, C, chunks, stride_b, stride_c, stride_n,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, BIAS_ROWS: tl.constexpr = False,
):  # fmt: skip
    """Each tile's moments in two passes over registers, tiles merged by Chan et al. 1983, eq. 2.1."""
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    x_ptr += i_b.to(tl.int64) * stride_b
    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_mean, b_m2 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i_tile in range(TILES):
        before = i_tile * BLOCK_N
        n_start = i_chunk * TILES * BLOCK_N + before
        o_n = n_start + tl.arange(0, BLOCK_N)
        m_tile = (o_n < HW)[:, None] & m_c[None, :]
        b_v = load_with_bias(x_ptr, o_n[:, None] * stride_n + o_c[None, :] * stride_c, m_tile, bias_ptr, b_bias)
        count = tl.minimum(tl.maximum(HW - n_start, 0), BLOCK_N)
        b_tile_mean = tl.sum(tl.where(m_tile, b_v, 0.0), axis=0) / tl.maximum(count, 1)
        b_centred = tl.where(m_tile, b_v - b_tile_mean[None, :], 0.0)
        share = count / tl.maximum(before + count, 1).to(tl.float32)
        b_delta = b_tile_mean - b_mean
        b_mean += b_delta * share
        b_m2 += tl.sum(b_centred * b_centred, axis=0) + b_delta * b_delta * (before * share)
    o_moments = (i_b * chunks + i_chunk) * 2 * C + o_c
    tl.store(moments_ptr + o_moments, b_mean, mask=m_c)
    tl.store(moments_ptr + o_moments + C, b_m2, mask=m_c)


@triton.jit
def group_merge_kernel(
    moments_ptr,  # (B, chunks, 2, C)
    statistics_ptr,  # (B, G, 2) float32: mean and 1/√(variance + eps)
    HW, C, G, chunks, eps,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_K: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """One program merges the chunks and channels of a group: mean, then variance (Chan et al. 1983).

    The numbers of blocks are constants, nearly always 1: the interpreters of Triton 3.5 and 3.6 cannot loop up to a
    tensor with numpy 2.4.
    """
    i_b, i_g = tl.program_id(0) // G, tl.program_id(0) % G
    D = C // G
    moments_ptr += i_b * chunks * 2 * C + i_g * D
    b_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i_k in range(BLOCKS_K):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_count = tl.minimum(HW - o_k * CHUNK, CHUNK)
        for i_d in range(BLOCKS_D):
            o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (o_k < chunks)[:, None] & (o_d < D)[None, :]
            b_sum += load(moments_ptr, o_k[:, None] * 2 * C + o_d[None, :], mask) * b_count[:, None]
    size = HW * D
    mean = tl.div_rn(tl.sum(tl.sum(b_sum, axis=1), axis=0), size * 1.0)
    b_m2 = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i_k in range(BLOCKS_K):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_count = tl.minimum(HW - o_k * CHUNK, CHUNK)
        for i_d in range(BLOCKS_D):
            o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (o_k < chunks)[:, None] & (o_d < D)[None, :]
            o_moments = o_k[:, None] * 2 * C + o_d[None, :]
            b_delta = tl.where(mask, load(moments_ptr, o_moments, mask) - mean, 0.0)
            b_m2 += load(moments_ptr, o_moments + C, mask) + b_delta * b_delta * b_count[:, None]
    variance = tl.sum(tl.sum(b_m2, axis=1), axis=0) / size
    tl.store(statistics_ptr + tl.program_id(0) * 2, mean)
    tl.store(statistics_ptr + tl.program_id(0) * 2 + 1, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def group_norm_silu_fwd_kernel(
    x_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are out and residual
    out_ptr,
    statistics_ptr,  # (B, G, 2)
    gain_ptr,  # (C,)
    offset_ptr,  # (C,)
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    residual_ptr,  # or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, G, tiles, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BIAS_ROWS: tl.constexpr = False,
):  # fmt: skip
    i_b, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_n, o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]
    if residual_ptr is not None:
        residual_ptr += o_sample
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = load_statistics(statistics_ptr, i_b, o_c, m_c, C, G)

    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    finish_fwd(
        (b_v - b_mean[None, :]) * b_rstd[None, :], residual_ptr, out_ptr + o_sample, o_tile, m_tile, b_slope,
        b_intercept, seed_ptr, i_b, i_n * BLOCK_N, o_c, HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
    )  # fmt: skip


@triton.jit
def group_norm_silu_sums_kernel(
    grad_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so is x
    x_ptr,
    sums_ptr,  # (B, chunks, 2 or, with bias, 3, C) float32: Σ dy and Σ dy·x̂ of a chunk's pixels are written
    statistics_ptr,  # (B, G, 2)
    gain_ptr,  # (C,)
    offset_ptr,  # (C,)
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, G, chunks, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    BIAS_ROWS: tl.constexpr = False,
    grad2_ptr=None, grad3_ptr=None, total_ptr=None,  # like grad: of branches of the output, and the sum of all
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = load_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = dropout_key(seed_ptr)
    b_sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dy_normed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(TILES, num_stages=STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]
        b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
        b_grad = load_gradient(grad_ptr, grad2_ptr, grad3_ptr, total_ptr, o_sample, o_tile, m_tile)
        b_dy = finish_bwd(
            b_grad, b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale,
            ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_sum_dy += b_dy
        b_sum_dy_normed += b_dy * b_normed
    o_sums = sums_of(i_b * chunks + i_chunk, bias_ptr, C) + o_c
    tl.store(sums_ptr + o_sums, tl.sum(b_sum_dy, axis=0), mask=m_c)
    tl.store(sums_ptr + o_sums + C, tl.sum(b_sum_dy_normed, axis=0), mask=m_c)


@triton.jit
def group_means_kernel(
    sums_ptr,  # (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂
    means_ptr,  # (B, 2, G) float32: mean over the group of dx̂ and of dx̂·x̂
    gain_ptr,  # (C,)
    bias_ptr,  # or None: not read
    scale_ptr,  # (B, C) or None
    HW, C, G, chunks, stride_scale,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_K: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """One program adds up the chunks and channels of a group; blocks as in `group_merge_kernel`."""
    i_b, i_g = tl.program_id(0) // G, tl.program_id(0) % G
    D = C // G
    b_dnormed, b_projection = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for i_d in range(BLOCKS_D):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        o_c, m_d = i_g * D + o_d, o_d < D
        b_slope, _ = slope_and_intercept(gain_ptr, None, scale_ptr, None, i_b, stride_scale, 0, o_c, m_d)
        b_sum_dy, b_sum_dy_normed = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
        for i_k in range(BLOCKS_K):
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = (o_k < chunks)[:, None] & m_d[None, :]
            o_sums = sums_of(i_b * chunks + o_k, bias_ptr, C)[:, None] + o_c[None, :]
            b_sum_dy += tl.sum(load(sums_ptr, o_sums, mask), axis=0)
            b_sum_dy_normed += tl.sum(load(sums_ptr, o_sums + C, mask), axis=0)
        b_dnormed += b_sum_dy * b_slope
        b_projection += b_sum_dy_normed * b_slope
    size = HW * D * 1.0
    o_means = i_b * 2 * G + i_g
    tl.store(means_ptr + o_means, tl.div_rn(tl.sum(b_dnormed, axis=0), size))
    tl.store(means_ptr + o_means + G, tl.div_rn(tl.sum(b_projection, axis=0), size))


@triton.jit
def group_norm_silu_bwd_kernel(
    grad_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are x and dx
    x_ptr,
    dx_ptr,
    sums_ptr,  # (B, chunks, 3, C) float32: Σ dx of a chunk's pixels is written; not touched without bias
    statistics_ptr,  # (B, G, 2)
    means_ptr,  # (B, 2, G) float32: mean over the group of dx̂ and of dx̂·x̂
    gain_ptr,  # (C,)
    offset_ptr,  # (C,)
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, G, chunks, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    BIAS_ROWS: tl.constexpr = False, added_ptr=None,  # like dx: added to it
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = load_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    o_means = i_b * 2 * G + o_c // (C // G)
    b_mean_dnormed = load(means_ptr, o_means, m_c)
    b_projection = load(means_ptr, o_means + G, m_c)
    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = dropout_key(seed_ptr)
    b_sum_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(TILES, num_stages=STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]
        b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
        b_dy = finish_bwd(
            load(grad_ptr + o_sample, o_tile, m_tile), b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b,
            n_start, o_c, HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_dx = b_dy * b_slope[None, :] - b_mean_dnormed[None, :] - b_normed * b_projection[None, :]
        b_dx *= b_rstd[None, :]
        if added_ptr is not None:
            b_stored = b_dx + load(added_ptr + o_sample, o_tile, m_tile)
        else:
            b_stored = b_dx
        tl.store(dx_ptr + o_sample + o_tile, b_stored.to(dx_ptr.dtype.element_ty), mask=m_tile)
        if bias_ptr is not None:
            b_sum_dx += tl.where(m_tile, b_dx, 0.0)
    if bias_ptr is not None:
        o_sums = sums_of(i_b * chunks + i_chunk, bias_ptr, C) + 2 * C + o_c
        tl.store(sums_ptr + o_sums, tl.sum(b_sum_dx, axis=0), mask=m_c)


triton_launch.hash_functions(globals())
