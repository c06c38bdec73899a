"""Triton kernels of norm_silu, and their launches.

A tile is BLOCK_N pixels of one sample times BLOCK_C channels. Feature maps are read through strides: channels-last is
the fast layout, contiguous works as well. Statistics and arithmetic are float32.

Everything per channel after the norm folds into one multiplication and one addition with

    slope = gain·(1 + scale)      intercept = offset·(1 + scale) + shift
    y = x̂·slope + intercept      out = dropout(SiLU(y)) + residual

so that all parameter gradients follow from sums over the pixels of each sample and channel, Σ dy, Σ dy·x̂ and, of the
bias, Σ dx. Sums are made in two stages, per chunk of pixels and then over chunks (norm_silu_bwd_rows_kernel), without
atomics. The second stage of both norms of a residual block is one launch, in the backward of the first.

GroupNorm reads a map once where the registers of a program hold all pixels of a group (`choose_groups`), as on maps of
32×32 and less: statistics and output, or sums and gradient, are one launch. On larger maps they are several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ddpm_fast.noise import STREAM_DROPOUT
from ddpm_fast.ops.common.triton import cast, philox4x32, philox_key, silu, silu_derivative
from ddpm_fast.runtime import triton_launch

_STREAM_DROPOUT = tl.constexpr(STREAM_DROPOUT)
_SMALLEST_NORM = tl.constexpr(1e-12)
_STAGES = tl.constexpr(2)  # the next tile is loaded while a program computes one


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _key(seed_ptr):
    """The two words of dropout's key, 0 without dropout."""
    if seed_ptr is not None:
        return philox_key(tl.load(seed_ptr))
    else:
        return tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)


@triton.jit
def _bias(bias_ptr, o_c, m_c):
    """(BLOCK_C,), 0 in channels that do not exist and without a bias; loaded before the loop over tiles."""
    if bias_ptr is not None:
        return _load(bias_ptr, o_c, m_c)
    else:
        return tl.zeros_like(o_c).to(tl.float32)


@triton.jit
def _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS: tl.constexpr):
    """The same of a sample, whose bias is its own row where BIAS_ROWS, the stride of rows, is not 0."""
    if BIAS_ROWS:
        return _load(bias_ptr, i_b * BIAS_ROWS + o_c, m_c)
    else:
        return _bias(bias_ptr, o_c, m_c)


@triton.jit
def _load_with_bias(x_ptr, o_tile, m_tile, bias_ptr, b_bias):
    """The norm's input v = x + bias: (BLOCK_N, BLOCK_C), 0 in channels that do not exist."""
    b_v = _load(x_ptr, o_tile, m_tile)
    if bias_ptr is not None:
        b_v += b_bias[None, :]
    return b_v


@triton.jit
def _slope_and_intercept(
    gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c, scaled=1
):  # fmt: skip
    """(BLOCK_C,) each, both 0 in channels that do not exist; scale and shift are 0 where `scaled` is."""
    b_slope = _load(gain_ptr, o_c, m_c)
    b_intercept = tl.zeros_like(b_slope)
    if offset_ptr is not None:
        b_intercept = _load(offset_ptr, o_c, m_c)
    if scale_ptr is not None:
        b_factor = 1.0 + _load(scale_ptr, i_b * stride_scale + o_c, m_c & (scaled != 0))
        b_slope *= b_factor
        b_intercept *= b_factor
    if shift_ptr is not None:
        b_intercept += _load(shift_ptr, i_b * stride_shift + o_c, m_c & (scaled != 0))
    return b_slope, b_intercept


@triton.jit
def _dropout_words(k0, k1, i_b, n_start, o_c, HW, BLOCK_N: tl.constexpr, QUADS: tl.constexpr):
    """The tile's 32-bit words: element = c·HW + n of sample i_b, word element % 4 of Philox block element // 4.

    With QUADS four pixels in a row are one block of every channel (HW, BLOCK_N and n_start are multiples of four), and
    one Philox call serves them; otherwise each element makes its own.
    """
    if QUADS:
        o_quad = n_start // 4 + tl.arange(0, BLOCK_N // 4)
        x0, x1, x2, x3 = _words(o_c[None, :] * (HW // 4) + o_quad[:, None], i_b, k0, k1)  # (BLOCK_N / 4, BLOCK_C)
        words = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # (BLOCK_N / 4, BLOCK_C, 2, 2), word 2i + j at [.., i, j]
        return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (BLOCK_N, o_c.shape[0]))
    elements = o_c[None, :] * HW + (n_start + tl.arange(0, BLOCK_N))[:, None]
    x0, x1, x2, x3 = _words(elements // 4, i_b, k0, k1)
    word = elements % 4
    return tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3))


@triton.jit
def _words(block, i_b, k0, k1):
    zero = (block * 0).to(tl.uint32)
    return philox4x32(block.to(tl.uint32), zero + i_b.to(tl.uint32), zero, zero + _STREAM_DROPOUT, k0, k1)


@triton.jit
def _dropped(b_y, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale, BLOCK_N: tl.constexpr, QUADS: tl.constexpr):
    """Dropout, which is its own gradient: b_y·kept_scale where the word is at least `threshold`, else 0."""
    words = _dropout_words(k0, k1, i_b, n_start, o_c, HW, BLOCK_N, QUADS)
    return tl.where(words.to(tl.int64) >= threshold, b_y * kept_scale, 0.0)


@triton.jit
def _finish_fwd(
    b_normed, residual_ptr, out_ptr, o_tile, m_tile, b_slope, b_intercept, seed_ptr, i_b, n_start, o_c, HW, threshold,
    kept_scale, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """The steps after x̂: affine map, SiLU, dropout, residual and the store."""
    b_y = b_normed * b_slope[None, :] + b_intercept[None, :]
    if ACTIVATION:
        b_y = silu(b_y)
    if seed_ptr is not None:
        k0, k1 = philox_key(tl.load(seed_ptr))
        b_y = _dropped(b_y, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale, BLOCK_N, QUADS)
    if residual_ptr is not None:
        b_y += _load(residual_ptr, o_tile, m_tile)
    tl.store(out_ptr + o_tile, b_y.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def _finish_bwd(
    grad_ptr, b_normed, o_tile, m_tile, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c, HW, threshold,
    kept_scale, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """dy, the gradient at y = x̂·slope + intercept, 0 outside the map."""
    b_dy = _load(grad_ptr, o_tile, m_tile)
    if seed_ptr is not None:
        b_dy = _dropped(b_dy, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale, BLOCK_N, QUADS)
    if ACTIVATION:
        b_dy *= silu_derivative(b_normed * b_slope[None, :] + b_intercept[None, :])
    return b_dy


@triton.jit
def _sums_of(i_chunk, bias_ptr, C):
    """Where a chunk's sums begin, which are two rows of channels, with a bias three."""
    if bias_ptr is not None:
        return i_chunk.to(tl.int64) * (3 * C)
    else:
        return i_chunk.to(tl.int64) * (2 * C)


@triton.jit
def rms_norm_silu_fwd_kernel(
    x_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are out and residual
    out_ptr,
    factors_ptr,  # (B, HW) float32: √C / max(‖v‖₂, 1e-12)
    gain_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    residual_ptr,  # or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, tiles, root_c, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_n, o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    m_n, m_c = o_n < HW, o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, m_n[:, None] & m_c[None, :]
    if residual_ptr is not None:
        residual_ptr += o_sample
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )

    b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, _bias(bias_ptr, o_c, m_c))
    b_square = tl.sum(b_v * b_v, axis=1)  # (BLOCK_N,)
    if BLOCK_C < 16:  # gradients of few channels cancel, and 2 units in the last place would show in them
        b_factor = tl.div_rn(root_c, tl.maximum(tl.sqrt_rn(b_square), _SMALLEST_NORM))
    else:
        b_factor = root_c / tl.maximum(tl.sqrt(b_square), _SMALLEST_NORM)
    tl.store(factors_ptr + i_b.to(tl.int64) * HW + o_n, b_factor, mask=m_n)
    _finish_fwd(
        b_v * b_factor[:, None], residual_ptr, out_ptr + o_sample, o_tile, m_tile, b_slope,
        b_intercept, seed_ptr, i_b, i_n * BLOCK_N, o_c, HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunks", "scaled"])
def rms_norm_silu_bwd_kernel(
    grad_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are x and dx
    x_ptr,
    dx_ptr,
    sums_ptr,  # (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of a chunk's pixels
    factors_ptr,  # (B, HW)
    gain_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    scale_ptr,  # (B, C), or None; any pointer where `scaled` is 0
    shift_ptr,  # (B, C), or None; any pointer where `scaled` is 0
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, chunks, root_c, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale, scaled,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c, scaled
    )
    b_bias = _bias(bias_ptr, o_c, m_c)
    k0, k1 = _key(seed_ptr)
    b_sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dy_normed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    # A norm that is larger than the smallest by less than forward's rounding counts as clamped.
    largest_factor, inverse_c = root_c * (0.999999 / _SMALLEST_NORM), tl.div_rn(1.0, root_c * root_c)
    for i_tile in tl.range(TILES, num_stages=_STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        m_n = o_n < HW
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, m_n[:, None] & m_c[None, :]
        b_factor = tl.load(factors_ptr + i_b.to(tl.int64) * HW + o_n, mask=m_n, other=0.0)
        b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = b_v * b_factor[:, None]
        b_dy = _finish_bwd(
            grad_ptr + o_sample, b_normed, o_tile, m_tile, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c,
            HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_dnormed = b_dy * b_slope[None, :]
        # A clamped norm is a constant: nothing flows through it.
        b_projection = tl.where(b_factor < largest_factor, tl.sum(b_dnormed * b_normed, axis=1) * inverse_c, 0.0)
        b_dx = (b_dnormed - b_normed * b_projection[:, None]) * b_factor[:, None]
        tl.store(dx_ptr + o_sample + o_tile, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)
        b_sum_dy += b_dy
        b_sum_dy_normed += b_dy * b_normed
        if bias_ptr is not None:
            b_sum_dx += b_dx
    o_sums = _sums_of(i_b * chunks + i_chunk, bias_ptr, C) + o_c
    tl.store(sums_ptr + o_sums, tl.sum(b_sum_dy, axis=0), mask=m_c)
    tl.store(sums_ptr + o_sums + C, tl.sum(b_sum_dy_normed, axis=0), mask=m_c)
    if bias_ptr is not None:
        tl.store(sums_ptr + o_sums + 2 * C, tl.sum(b_sum_dx, axis=0), mask=m_c)


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
    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_mean, b_m2 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i_tile in range(TILES):
        before = i_tile * BLOCK_N
        n_start = i_chunk * TILES * BLOCK_N + before
        o_n = n_start + tl.arange(0, BLOCK_N)
        m_tile = (o_n < HW)[:, None] & m_c[None, :]
        b_v = _load_with_bias(x_ptr, o_n[:, None] * stride_n + o_c[None, :] * stride_c, m_tile, bias_ptr, b_bias)
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
            b_sum += _load(moments_ptr, o_k[:, None] * 2 * C + o_d[None, :], mask) * b_count[:, None]
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
            b_delta = tl.where(mask, _load(moments_ptr, o_moments, mask) - mean, 0.0)
            b_m2 += _load(moments_ptr, o_moments + C, mask) + b_delta * b_delta * b_count[:, None]
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
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = _group_statistics(statistics_ptr, i_b, o_c, m_c, C, G)

    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    _finish_fwd(
        (b_v - b_mean[None, :]) * b_rstd[None, :], residual_ptr, out_ptr + o_sample, o_tile, m_tile, b_slope,
        b_intercept, seed_ptr, i_b, i_n * BLOCK_N, o_c, HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
    )  # fmt: skip


@triton.jit
def _group_statistics(statistics_ptr, i_b, o_c, m_c, C, G):
    """Mean and 1/σ of each channel's group: (BLOCK_C,) each."""
    o_statistics = (i_b * G + o_c // (C // G)) * 2
    return _load(statistics_ptr, o_statistics, m_c), _load(statistics_ptr, o_statistics + 1, m_c)


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
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = _group_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = _key(seed_ptr)
    b_sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dy_normed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(TILES, num_stages=_STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]
        b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
        b_dy = _finish_bwd(
            grad_ptr + o_sample, b_normed, o_tile, m_tile, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c,
            HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_sum_dy += b_dy
        b_sum_dy_normed += b_dy * b_normed
    o_sums = _sums_of(i_b * chunks + i_chunk, bias_ptr, C) + o_c
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
        b_slope, _ = _slope_and_intercept(gain_ptr, None, scale_ptr, None, i_b, stride_scale, 0, o_c, m_d)
        b_sum_dy, b_sum_dy_normed = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
        for i_k in range(BLOCKS_K):
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = (o_k < chunks)[:, None] & m_d[None, :]
            o_sums = _sums_of(i_b * chunks + o_k, bias_ptr, C)[:, None] + o_c[None, :]
            b_sum_dy += tl.sum(_load(sums_ptr, o_sums, mask), axis=0)
            b_sum_dy_normed += tl.sum(_load(sums_ptr, o_sums + C, mask), axis=0)
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
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = _group_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    o_means = i_b * 2 * G + o_c // (C // G)
    b_mean_dnormed = _load(means_ptr, o_means, m_c)
    b_projection = _load(means_ptr, o_means + G, m_c)
    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = _key(seed_ptr)
    b_sum_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(TILES, num_stages=_STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]
        b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
        b_dy = _finish_bwd(
            grad_ptr + o_sample, b_normed, o_tile, m_tile, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c,
            HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_dx = b_dy * b_slope[None, :] - b_mean_dnormed[None, :] - b_normed * b_projection[None, :]
        b_dx *= b_rstd[None, :]
        if added_ptr is not None:
            b_stored = b_dx + _load(added_ptr + o_sample, o_tile, m_tile)
        else:
            b_stored = b_dx
        tl.store(dx_ptr + o_sample + o_tile, b_stored.to(dx_ptr.dtype.element_ty), mask=m_tile)
        if bias_ptr is not None:
            b_sum_dx += tl.where(m_tile, b_dx, 0.0)
    if bias_ptr is not None:
        o_sums = _sums_of(i_b * chunks + i_chunk, bias_ptr, C) + 2 * C + o_c
        tl.store(sums_ptr + o_sums, tl.sum(b_sum_dx, axis=0), mask=m_c)


@triton.jit
def _over_groups(b_row, BLOCK_G: tl.constexpr):
    """(BLOCK_C,) → (BLOCK_C,): for each channel the sum over its group, of BLOCK_G groups side by side."""
    if BLOCK_G == 1:
        return tl.zeros_like(b_row) + tl.sum(b_row, axis=0)
    else:
        SIZE: tl.constexpr = b_row.shape[0] // BLOCK_G
        b_sum = tl.sum(tl.reshape(b_row, (BLOCK_G, SIZE)), axis=1)
        return tl.reshape(tl.broadcast_to(b_sum[:, None], (BLOCK_G, SIZE)), (b_row.shape[0],))


@triton.jit
def _tile_of_groups(
    HW, C, stride_c, stride_n, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Of a program that has all pixels of BLOCK_G groups of D channels: its sample, channels, and their tile."""
    programs = C // (D * BLOCK_G)
    i_b, i_g = tl.program_id(0) // programs, tl.program_id(0) % programs
    o_d = tl.arange(0, BLOCK_C)
    o_n, o_c, m_c = tl.arange(0, BLOCK_N), i_g * (D * BLOCK_G) + o_d, o_d < D * BLOCK_G
    return i_b, o_c, m_c, o_n[:, None] * stride_n + o_c[None, :] * stride_c, (o_n < HW)[:, None] & m_c[None, :]


@triton.jit
def whole_group_norm_silu_fwd_kernel(
    x_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are out and residual
    out_ptr,
    statistics_ptr,  # (B, G, 2) float32: mean and 1/√(variance + eps) are written
    gain_ptr,  # (C,)
    offset_ptr,  # (C,)
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    residual_ptr,  # or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, G, eps, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, BIAS_ROWS: tl.constexpr = False,
):  # fmt: skip
    """The whole of GroupNorm where a program's registers hold all pixels of a group: x is read once."""
    i_b, o_c, m_c, o_tile, m_tile = _tile_of_groups(HW, C, stride_c, stride_n, D, BLOCK_N, BLOCK_C, BLOCK_G)
    o_sample = i_b.to(tl.int64) * stride_b
    if residual_ptr is not None:
        residual_ptr += o_sample
    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    size = HW * D * 1.0
    b_mean = tl.div_rn(_over_groups(tl.sum(tl.where(m_tile, b_v, 0.0), axis=0), BLOCK_G), size)
    b_centred = tl.where(m_tile, b_v - b_mean[None, :], 0.0)
    b_variance = tl.div_rn(_over_groups(tl.sum(b_centred * b_centred, axis=0), BLOCK_G), size)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))
    o_statistics, m_first = (i_b * G + o_c // D) * 2, m_c & (o_c % D == 0)
    tl.store(statistics_ptr + o_statistics, b_mean, mask=m_first)
    tl.store(statistics_ptr + o_statistics + 1, b_rstd, mask=m_first)
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    _finish_fwd(
        b_centred * b_rstd[None, :], residual_ptr, out_ptr + o_sample, o_tile, m_tile, b_slope, b_intercept, seed_ptr,
        i_b, 0, o_c, HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
    )  # fmt: skip


@triton.jit
def whole_group_norm_silu_bwd_kernel(
    grad_ptr,  # (B, C, HW) through stride_b, stride_c, stride_n; so are x and dx
    x_ptr,
    dx_ptr,
    sums_ptr,  # (B, 1, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of all pixels
    statistics_ptr,  # (B, G, 2)
    gain_ptr,  # (C,)
    offset_ptr,  # (C,)
    bias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    scale_ptr,  # (B, C) or None
    shift_ptr,  # (B, C) or None
    seed_ptr,  # (1,) int64, or None: no dropout
    HW, C, G, stride_b, stride_c, stride_n, stride_scale, stride_shift, threshold, kept_scale,
    ACTIVATION: tl.constexpr, QUADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, BIAS_ROWS: tl.constexpr = False, added_ptr=None,  # like dx: added to it
):  # fmt: skip
    """Its backward: grad and x are read once."""
    i_b, o_c, m_c, o_tile, m_tile = _tile_of_groups(HW, C, stride_c, stride_n, D, BLOCK_N, BLOCK_C, BLOCK_G)
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = _slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = _group_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    b_bias = _bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = _key(seed_ptr)
    b_v = _load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
    b_dy = _finish_bwd(
        grad_ptr + o_sample, b_normed, o_tile, m_tile, b_slope, b_intercept, seed_ptr, k0, k1, i_b, 0, o_c,
        HW, threshold, kept_scale, ACTIVATION, BLOCK_N, QUADS,
    )  # fmt: skip
    b_sum_dy, b_sum_dy_normed = tl.sum(b_dy, axis=0), tl.sum(b_dy * b_normed, axis=0)
    o_sums = _sums_of(i_b, bias_ptr, C) + o_c
    tl.store(sums_ptr + o_sums, b_sum_dy, mask=m_c)
    tl.store(sums_ptr + o_sums + C, b_sum_dy_normed, mask=m_c)
    size = HW * D * 1.0
    b_mean_dnormed = tl.div_rn(_over_groups(b_sum_dy * b_slope, BLOCK_G), size)
    b_projection = tl.div_rn(_over_groups(b_sum_dy_normed * b_slope, BLOCK_G), size)
    b_dx = b_dy * b_slope[None, :] - b_mean_dnormed[None, :] - b_normed * b_projection[None, :]
    b_dx *= b_rstd[None, :]
    if bias_ptr is not None:
        tl.store(sums_ptr + o_sums + 2 * C, tl.sum(tl.where(m_tile, b_dx, 0.0), axis=0), mask=m_c)
    if added_ptr is not None:
        b_dx += _load(added_ptr + o_sample, o_tile, m_tile)
    tl.store(dx_ptr + o_sample + o_tile, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["B", "chunks", "scaled", "last_chunks"])
def norm_silu_bwd_rows_kernel(
    sums_ptr,  # (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of a chunk's pixels
    gain_ptr,  # (C,)
    offset_ptr,  # (C,) or None
    scale_ptr,  # (B, C), or None; any pointer for samples from `scaled` on, and so are dscale_ptr and dshift_ptr
    dgain_ptr,  # (C,)
    doffset_ptr,  # (C,) or None
    dbias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    dscale_ptr,  # (B, C) or None
    dshift_ptr,  # (B, C) or None
    last_sums_ptr,  # (B, last_chunks, 2 or 3, C) float32 of another norm, without scale and shift, or None
    last_dgain_ptr,  # its gradients, of the types of this norm's
    last_doffset_ptr,
    last_dbias_ptr,
    B, C, chunks, stride_scale, last_chunks,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, scaled=2**31 - 1,
    BIAS_ROWS: tl.constexpr = False,
):  # fmt: skip
    """The gradients of all arguments per channel, each written once; grid (C / BLOCK_C, norms).

    One program has a few channels of all samples and chunks of a norm. It loops by `while`, since the interpreters of
    Triton 3.5 and 3.6 cannot count up to an argument. A sample's sums depend on its chunks alone.
    """
    if last_sums_ptr is not None:
        is_last = tl.program_id(1) == 1
        chunks, scaled = tl.where(is_last, last_chunks, chunks), tl.where(is_last, 0, scaled)
        if is_last:
            sums_ptr, dgain_ptr = last_sums_ptr, last_dgain_ptr
            if doffset_ptr is not None:
                doffset_ptr = last_doffset_ptr
            if dbias_ptr is not None:
                dbias_ptr = last_dbias_ptr
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_gain = _load(gain_ptr, o_c, m_c)
    b_dgain = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_doffset = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_start = 0
    while b_start < B:
        o_b = b_start + tl.arange(0, BLOCK_B)
        b_sum_dy = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        b_sum_dy_normed = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        if BIAS_ROWS:
            b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        k_start = 0
        while k_start < chunks:
            o_k = k_start + tl.arange(0, BLOCK_K)
            mask = ((o_b < B)[:, None] & (o_k < chunks)[None, :])[:, :, None] & m_c[None, None, :]
            o_chunk = o_b[:, None] * chunks + o_k[None, :]
            o_sums = _sums_of(o_chunk, dbias_ptr, C)[:, :, None] + o_c[None, None, :]
            b_sum_dy += tl.sum(_load(sums_ptr, o_sums, mask), axis=1)
            b_sum_dy_normed += tl.sum(_load(sums_ptr, o_sums + C, mask), axis=1)
            if dbias_ptr is not None:
                b_dbias += tl.sum(_load(sums_ptr, o_sums + 2 * C, mask), axis=1)
            k_start += BLOCK_K
        o_row = o_b[:, None] * C + o_c[None, :]
        b_factor = tl.full((BLOCK_B, BLOCK_C), 1.0, tl.float32)
        m_scaled = (o_b < tl.minimum(B, scaled))[:, None] & m_c[None, :]
        if scale_ptr is not None:
            b_factor += _load(scale_ptr, o_b[:, None] * stride_scale + o_c[None, :], m_scaled)
            b_dscale = b_sum_dy_normed * b_gain[None, :]
            if offset_ptr is not None:
                b_dscale += b_sum_dy * _load(offset_ptr, o_c, m_c)[None, :]
            tl.store(dscale_ptr + o_row, cast(b_dscale, dscale_ptr.dtype.element_ty), mask=m_scaled)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + o_row, cast(b_sum_dy, dshift_ptr.dtype.element_ty), mask=m_scaled)
        if BIAS_ROWS:
            m_row = (o_b < B)[:, None] & m_c[None, :]
            tl.store(dbias_ptr + o_row, cast(b_dbias, dbias_ptr.dtype.element_ty), mask=m_row)
        b_dgain += b_sum_dy_normed * b_factor
        b_doffset += b_sum_dy * b_factor
        b_start += BLOCK_B
    tl.store(dgain_ptr + o_c, cast(tl.sum(b_dgain, axis=0), dgain_ptr.dtype.element_ty), mask=m_c)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + o_c, cast(tl.sum(b_doffset, axis=0), doffset_ptr.dtype.element_ty), mask=m_c)
    if dbias_ptr is not None and not BIAS_ROWS:
        tl.store(dbias_ptr + o_c, cast(tl.sum(b_dbias, axis=0), dbias_ptr.dtype.element_ty), mask=m_c)


# Tiles that a program of sums walks over: a constant, since another number is another kernel to compile. A program has
# 8192 numbers of a map, and its partial sums are at most a quarter of the bytes of that at 512 channels.
_TILES = 8


@dataclass(frozen=True)
class Tile:
    """How a launch is cut up.

    Args:
        block_n, block_c: pixels and channels of a tile.
        tiles: tiles that one program walks over.
        num_warps: warps per program.
    """

    block_n: int
    block_c: int
    tiles: int
    num_warps: int

    @property
    def chunk(self) -> int:
        """Pixels of one program."""
        return self.block_n * self.tiles


@cache
def choose_tile(HW: int, C: int, *, whole_rows: bool, sums: bool, dropout: bool, interpreted: bool = False) -> Tile:
    """The launch for a map of HW pixels and C channels. It depends on these arguments alone, and so do results.

    Args:
        whole_rows: a program must see all channels of its pixels, as RMSNorm does.
        sums: the kernel adds up over pixels: fewer elements per thread, since the sums take registers too, and programs
            that walk over several tiles, so that there are few partial sums.
        dropout: whole Philox blocks of four pixels are wanted.
        interpreted: large tiles, since the interpreter's time is per operation.
    """
    per_thread = 8 if sums else 16
    elements = 8192 if interpreted else 128 * per_thread
    block_c = triton_launch.next_power_of_2(C) if whole_rows else min(64, triton_launch.next_power_of_2(C))
    block_n = max(4 if dropout and block_c <= 1024 else 1, min(elements // block_c, triton_launch.next_power_of_2(HW)))
    tiles = 1
    if sums:
        tiles = min(16, triton_launch.next_power_of_2(-(-HW // (2 * block_n)))) if interpreted else _TILES
    num_warps = min(32, max(1, block_n * block_c // (32 * per_thread)))
    return Tile(block_n, block_c, tiles, num_warps)


@dataclass(frozen=True)
class Groups:
    """The launch of a kernel whose program has all pixels of some groups: `block_n` pixels, `block_c` channels."""

    groups: int
    block_n: int
    block_c: int
    num_warps: int


_LARGEST_WHOLE = 8192  # numbers of a map that the registers of a program hold, twice in backward


@cache
def choose_groups(HW: int, C: int, G: int) -> Groups | None:
    """The launch for a map of HW pixels and C channels in G groups; None where a group is too large for a program.

    Several groups of few numbers are one program: eight channels are the 32 bytes that memory hands out at once.
    """
    D = C // G
    block_n, block_d, groups = triton_launch.next_power_of_2(HW), triton_launch.next_power_of_2(D), 1
    if block_n * block_d > _LARGEST_WHOLE:
        return None
    while block_d == D and G % (2 * groups) == 0 and block_n * D * groups < (4096 if D * groups < 8 else 512):
        groups *= 2
    elements = block_n * block_d * groups
    return Groups(groups, block_n, block_d * groups, num_warps=min(16, max(1, elements // 512)))


def sums_shape(x: torch.Tensor, bias: torch.Tensor | None, groups: int, *, dropout: bool = False) -> tuple[int, ...]:
    """(B, chunks, 2 or, with bias, 3, C): the partial sums over pixels that backward makes of a map."""
    B, C, H, W = x.shape
    HW = int(H * W)  # a symbolic size is fixed
    if groups > 0 and choose_groups(HW, int(C), groups) is not None:
        return B, 1, 2 if bias is None else 3, C
    tile = choose_tile(
        HW,
        int(C),
        whole_rows=groups == 0,
        sums=True,
        dropout=dropout and HW % 4 == 0,
        interpreted=triton_launch.interpreted(),
    )
    return B, triton_launch.ceil_div(HW, tile.chunk), 2 if bias is None else 3, C


def most_registers(dropout: bool, writes_dx: bool = True, added: bool = False) -> int:
    """The bound of a backward kernel of maps, with which none spills; with 96 a multiprocessor runs five programs."""
    return 120 if writes_dx and (dropout or (added and triton_launch.is_triton_before(3, 6))) else 96


def norm_silu(
    x: torch.Tensor,  # (B, C, H, W), channels-last or contiguous
    gain: torch.Tensor,  # C elements
    offset: torch.Tensor | None,  # (C,)
    bias: torch.Tensor | None,  # (C,), or (B, C) for GroupNorm
    scale: torch.Tensor | None,  # (B, C)
    shift: torch.Tensor | None,  # (B, C)
    residual: torch.Tensor | None,  # (B, C, H, W)
    seed: torch.Tensor | None,  # (1,) int64
    groups: int,
    eps: float,
    activation: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the statistics for `norm_silu_backward`: factors (B, HW) for RMSNorm (groups = 0), else (B, G, 2)."""
    B, C, HW = _sizes(x)
    out = torch.empty_like(x)
    rows = _Rows(gain, offset, bias, scale, shift)
    residual = None if residual is None else _laid_out_like(x, residual)
    plan = _plan_of(x, seed, activation, whole_rows=groups == 0, sums=False)
    tile, constants = plan.tile, plan.constants
    tiles = triton_launch.ceil_div(HW, tile.block_n)
    numbers = (*plan.strides, *rows.strides, *_dropout_numbers(dropout_p))
    with torch.cuda.device_of(x):
        if groups == 0:
            statistics = x.new_empty(B, HW, dtype=torch.float32)
            rms_norm_silu_fwd_kernel[(B * tiles,)](
                x, out, statistics, rows.gain, rows.bias, rows.scale, rows.shift, residual, seed, HW, C, tiles,
                C**0.5, *numbers, **constants,
            )  # fmt: skip
            return out, statistics
        whole = _whole_plan_of(x, groups, activation)
        if whole is not None:
            statistics = x.new_empty(B, groups, 2, dtype=torch.float32)
            whole_group_norm_silu_fwd_kernel[(whole.programs(B),)](
                x, out, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, residual, seed, HW, C,
                groups, eps, *whole.strides, *rows.strides, *_dropout_numbers(dropout_p), **whole.constants,
                **rows.constants,
            )  # fmt: skip
            return out, statistics
        statistics = _group_statistics_of(x, rows, groups, eps)
        group_norm_silu_fwd_kernel[(B * tiles, triton_launch.ceil_div(C, tile.block_c))](
            x, out, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, residual, seed, HW, C,
            groups, tiles, *numbers, **constants, **rows.constants,
        )  # fmt: skip
        return out, statistics


def norm_silu_backward(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    groups: int,
    activation: bool,
    dropout_p: float,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, gain, offset, bias, scale, shift, each with its argument's dtype: None where that is None."""
    rows = _Rows(gain, offset, bias, scale, shift)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, seed, groups, activation, dropout_p)
    gradients = [_empty_row(row) for row in (gain, offset, bias, scale, shift)]
    _finish_rows(x, sums, rows, gradients)
    return dx, *gradients


def norm_silu_backward_beside(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    added: torch.Tensor,  # (B, C, H, W)
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of GroupNorm: the gradient of x with `added` added to it, and those of gain and offset."""
    rows = _Rows(gain, offset, None, None, None)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, None, groups, activation, 0.0, added)
    gradients = [_empty_row(row) for row in (gain, offset, None, None, None)]
    _finish_rows(x, sums, rows, gradients)
    return dx, gradients[0], gradients[1]  # type: ignore[return-value]


def norm_silu_backward_of_last(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a norm with SiLU: the gradient of x, and the sums that `norm_silu_backward_of_both` takes as `last_sums`."""
    return _gradient_of_map(grad, x, statistics, _Rows(gain, offset, bias, None, None), None, groups, True, 0.0)


def norm_silu_backward_of_both(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    last_sums: torch.Tensor,  # (B, chunks, 2 or, with bias, 3, C) float32
    groups: int,
    dropout_p: float,
) -> tuple[torch.Tensor, ...]:
    """As `norm_silu_backward` with SiLU, then gradients of gain, offset and bias of a last norm, alike in shape and
    dtype; empty where there is no such argument."""
    rows = _Rows(gain, offset, bias, scale, shift)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, seed, groups, True, dropout_p)
    gradients = [_empty_row(row) for row in (gain, offset, bias, scale, shift)]
    of_last = [_empty_row(row) for row in (gain, offset, bias)]
    _finish_rows(x, sums, rows, gradients, last_sums, of_last)
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in (*gradients, *of_last))


def _gradient_of_map(
    grad: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    rows: _Rows,
    seed: torch.Tensor | None,
    groups: int,
    activation: bool,
    dropout_p: float,
    added: torch.Tensor | None = None,  # of GroupNorm alone: added to the gradient of x
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x, and (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of chunks of pixels."""
    B, C, HW = _sizes(x)
    dx = torch.empty_like(x)
    grad = _laid_out_like(x, grad)
    plan = _plan_of(x, seed, activation, whole_rows=groups == 0, sums=True)
    tile, constants = plan.tile, plan.constants
    sums = x.new_empty(sums_shape(x, rows.bias, groups, dropout=seed is not None), dtype=torch.float32)
    chunks = sums.shape[1]
    numbers = (*plan.strides, *rows.strides, *_dropout_numbers(dropout_p))
    with torch.cuda.device_of(x):
        if groups == 0:
            rms_norm_silu_bwd_kernel[(B * chunks,)](
                grad, x, dx, sums, statistics, rows.gain, rows.bias, *rows.scale_and_shift(x), seed, HW, C, chunks,
                C**0.5, *numbers, int(rows.scaled), **constants,
            )  # fmt: skip
            return dx, sums
        added = None if added is None else _laid_out_like(x, added)
        whole = _whole_plan_of(x, groups, activation)
        if whole is not None:
            # A group of one number has no gradient: its dy must be rounded as the mean is.
            fusion = {"enable_fp_fusion": False} if HW * C == groups else {}
            whole_group_norm_silu_bwd_kernel[(whole.programs(B),)](
                grad, x, dx, sums, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, seed, HW, C,
                groups, *whole.strides, *rows.strides, *_dropout_numbers(dropout_p), **whole.constants,
                **rows.constants, **fusion, added_ptr=added,
            )  # fmt: skip
            return dx, sums
        grid = (B * chunks, triton_launch.ceil_div(C, tile.block_c))
        inputs = (rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, seed, HW, C, groups, chunks, *numbers)
        bound = triton_launch.register_bound(most_registers(seed is not None, writes_dx=False))
        constants = constants | rows.constants
        group_norm_silu_sums_kernel[grid](grad, x, sums, statistics, *inputs, **(constants | bound))
        means = x.new_empty((B, 2, groups), dtype=torch.float32)
        group_means_kernel[(B * groups,)](
            sums, means, rows.gain, rows.bias, rows.scale, HW, C, groups, chunks, rows.strides[0],
            **_group_blocks(C // groups, chunks),
        )  # fmt: skip
        constants |= triton_launch.register_bound(most_registers(seed is not None, added=added is not None))
        group_norm_silu_bwd_kernel[grid](
            grad, x, dx, sums, statistics, means, *inputs, **constants, added_ptr=added
        )  # fmt: skip
    return dx, sums


def _empty_row(row: torch.Tensor | None) -> torch.Tensor | None:
    return None if row is None else torch.empty_like(row, memory_format=torch.contiguous_format)


def _finish_rows(
    x: torch.Tensor,
    sums: torch.Tensor,
    rows: _Rows,
    gradients: list[torch.Tensor | None],  # of gain, offset, bias, scale, shift: written
    last_sums: torch.Tensor | None = None,
    of_last: Sequence[torch.Tensor | None] = (None, None, None),  # of gain, offset, bias of a last norm: written
) -> None:
    B, chunks, _, C = sums.shape
    blocks = rows_blocks(C, triton_launch.interpreted())
    programs = triton_launch.ceil_div(C, blocks["BLOCK_C"])
    scale, _ = rows.scale_and_shift(x)
    rest = gradients[3:] if rows.scaled else (scale, scale)
    norms, last_chunks = (1, 0) if last_sums is None else (2, last_sums.shape[1])
    with torch.cuda.device_of(sums):
        norm_silu_bwd_rows_kernel[(programs, norms)](
            sums, rows.gain, rows.offset, scale, *gradients[:3], *rest, last_sums, *of_last, B, C, chunks,
            rows.strides[0], last_chunks, scaled=B if rows.scaled else 0, **blocks,
            BIAS_ROWS="BIAS_ROWS" in rows.constants,
        )  # fmt: skip


def rows_blocks(C: int, interpreted: bool = False) -> dict[str, int]:
    """The blocks of norm_silu_bwd_rows_kernel, a constant on a GPU: no size compiles it again.

    48 KB of sums are on their way at a time. Eight channels are the 32 bytes that memory hands out at once.
    """
    if interpreted:
        return {"BLOCK_B": 4, "BLOCK_K": 4, "BLOCK_C": min(1024, triton_launch.next_power_of_2(C)), "num_warps": 1}
    sizes = {"BLOCK_B": 16, "BLOCK_K": 32, "BLOCK_C": 8, "num_warps": 8}
    return sizes | triton_launch.register_bound(168)  # one program per multiprocessor has more


def _group_blocks(D: int, chunks: int) -> dict[str, int]:
    """The blocks of the kernels with one program per group: of a group's channels, and of chunks."""
    block_d = min(64, triton_launch.next_power_of_2(D))
    block_k = min(1024 // block_d, triton_launch.next_power_of_2(chunks))
    return {
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "BLOCKS_K": triton_launch.ceil_div(chunks, block_k),
        "BLOCKS_D": triton_launch.ceil_div(D, block_d),
        "num_warps": 1,
    }


class _Rows:
    """The arguments per channel as the kernels read them: channels side by side, rows of scale and shift anywhere."""

    def __init__(self, gain, offset, bias, scale, shift):
        self.gain = gain.contiguous()
        self.offset = None if offset is None else offset.contiguous()
        self.bias, self.constants = bias, {}  # what forward and backward take for rows of a bias: their stride
        if bias is not None and bias.dim() == 2:
            self.bias, self.constants["BIAS_ROWS"] = _side_by_side(bias)
        elif bias is not None:
            self.bias = bias.contiguous()
        self.scale, scale_stride = _side_by_side(scale)
        self.shift, shift_stride = _side_by_side(shift)
        self.strides = (scale_stride, shift_stride)
        self.scaled = scale is not None or shift is not None

    def scale_and_shift(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For kernels that serve both norms of a block: where neither is there, a tensor of no elements for both."""
        if self.scaled:
            return self.scale, self.shift
        absent = x.new_empty(0)
        return absent, absent


def _side_by_side(rows: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Rows with channels side by side, and their stride."""
    if rows is None:
        return None, 0
    stride, spacing = rows.stride()
    return (rows, stride) if spacing == 1 else (rows.contiguous(), rows.shape[1])


def _group_statistics_of(x: torch.Tensor, rows: _Rows, groups: int, eps: float) -> torch.Tensor:
    """(B, G, 2): mean and 1/√(variance + eps) of every group."""
    B, C, HW = _sizes(x)
    plan = _plan_of(x, None, False, whole_rows=False, sums=True)
    tile = plan.tile
    chunks = triton_launch.ceil_div(HW, tile.chunk)
    moments = x.new_empty(B, chunks, 2, C, dtype=torch.float32)
    group_moments_kernel[(B * chunks, triton_launch.ceil_div(C, tile.block_c))](
        x, moments, rows.bias, HW, C, chunks, *plan.strides,
        BLOCK_N=tile.block_n, BLOCK_C=tile.block_c, TILES=tile.tiles, num_warps=tile.num_warps, **rows.constants,
    )  # fmt: skip
    statistics = x.new_empty(B, groups, 2, dtype=torch.float32)
    group_merge_kernel[(B * groups,)](
        moments, statistics, HW, C, groups, chunks, eps, CHUNK=tile.chunk, **_group_blocks(C // groups, chunks)
    )
    return statistics


@dataclass(frozen=True)
class _Plan:
    """What a launch takes besides tensors: its tile, the strides of sample, channel and pixel, and constants."""

    tile: Tile
    strides: tuple[int, int, int]
    constants: dict[str, int]


def _plan_of(x: torch.Tensor, seed: torch.Tensor | None, activation: bool, *, whole_rows: bool, sums: bool) -> _Plan:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return _plan(*_sizes(x)[1:], channels_last, seed is not None, activation, whole_rows, sums)


@cache
def _plan(C: int, HW: int, channels_last: bool, dropout: bool, activation: bool, whole_rows: bool, sums: bool) -> _Plan:
    tile = choose_tile(
        HW,
        C,
        whole_rows=whole_rows,
        sums=sums,
        dropout=dropout and HW % 4 == 0,
        interpreted=triton_launch.interpreted(),
    )
    constants = {
        "ACTIVATION": activation,
        "QUADS": HW % 4 == 0 and tile.block_n % 4 == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "num_warps": tile.num_warps,
    }
    if sums:
        constants |= {"TILES": tile.tiles, **triton_launch.register_bound(most_registers(dropout))}
    return _Plan(tile, (C * HW, 1, C) if channels_last else (C * HW, HW, 1), constants)


@dataclass(frozen=True)
class _WholePlan:
    """The same for a kernel whose program has all pixels of some groups, and its programs per sample."""

    programs_per_sample: int
    strides: tuple[int, int, int]
    constants: dict[str, int]

    def programs(self, B: int) -> int:
        return B * self.programs_per_sample


def _whole_plan_of(x: torch.Tensor, groups: int, activation: bool) -> _WholePlan | None:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return _whole_plan(*_sizes(x)[1:], groups, channels_last, activation)


@cache
def _whole_plan(C: int, HW: int, groups: int, channels_last: bool, activation: bool) -> _WholePlan | None:
    chosen = choose_groups(HW, C, groups)
    if chosen is None:
        return None
    constants = {
        "ACTIVATION": activation,
        "QUADS": HW % 4 == 0 and chosen.block_n % 4 == 0,
        "D": C // groups,
        "BLOCK_N": chosen.block_n,
        "BLOCK_C": chosen.block_c,
        "BLOCK_G": chosen.groups,
        "num_warps": chosen.num_warps,
    }
    strides = (C * HW, 1, C) if channels_last else (C * HW, HW, 1)
    return _WholePlan(groups // chosen.groups, strides, constants)


def _dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The smallest random word that keeps an element, and the factor of kept elements."""
    return round(dropout_p * 2**32), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:  # (B, C, H, W) -> B, C, HW
    B, C, H, W = x.shape
    return B, C, H * W


def _laid_out_like(x: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it has the strides of x, a copy that has them elsewhere."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


triton_launch.hash_functions(globals())
