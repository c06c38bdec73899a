"""RMSNorm's kernels: a program has all channels of its pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.norm_silu.triton_tile import (
    STAGES,
    dropout_key,
    finish_bwd,
    finish_fwd,
    load_bias,
    load_gradient,
    load_with_bias,
    rms_factor,
    rms_gradient,
    slope_and_intercept,
    sums_of,
)
from ddpm_fast.runtime import triton_launch


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
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )

    b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, load_bias(bias_ptr, o_c, m_c))
    b_factor = rms_factor(b_v, root_c, BLOCK_C < 16)
    tl.store(factors_ptr + i_b.to(tl.int64) * HW + o_n, b_factor, mask=m_n)
    finish_fwd(
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
    grad2_ptr=None, grad3_ptr=None, total_ptr=None,  # like grad: of branches of the output, and the sum of all
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c, scaled
    )
    b_bias = load_bias(bias_ptr, o_c, m_c)
    k0, k1 = dropout_key(seed_ptr)
    b_sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dy_normed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(TILES, num_stages=STAGES):
        n_start = (i_chunk * TILES + i_tile) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        m_n = o_n < HW
        o_tile, m_tile = o_n[:, None] * stride_n + o_c[None, :] * stride_c, m_n[:, None] & m_c[None, :]
        b_factor = tl.load(factors_ptr + i_b.to(tl.int64) * HW + o_n, mask=m_n, other=0.0)
        b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
        b_normed = b_v * b_factor[:, None]
        b_grad = load_gradient(grad_ptr, grad2_ptr, grad3_ptr, total_ptr, o_sample, o_tile, m_tile)
        b_dy = finish_bwd(
            b_grad, b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale,
            ACTIVATION, BLOCK_N, QUADS,
        )  # fmt: skip
        b_dnormed = b_dy * b_slope[None, :]
        b_dx = rms_gradient(b_dnormed, b_normed, b_factor, root_c)
        tl.store(dx_ptr + o_sample + o_tile, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)
        b_sum_dy += b_dy
        b_sum_dy_normed += b_dy * b_normed
        if bias_ptr is not None:
            b_sum_dx += b_dx
    o_sums = sums_of(i_b * chunks + i_chunk, bias_ptr, C) + o_c
    tl.store(sums_ptr + o_sums, tl.sum(b_sum_dy, axis=0), mask=m_c)
    tl.store(sums_ptr + o_sums + C, tl.sum(b_sum_dy_normed, axis=0), mask=m_c)
    if bias_ptr is not None:
        tl.store(sums_ptr + o_sums + 2 * C, tl.sum(b_sum_dx, axis=0), mask=m_c)


triton_launch.hash_functions(globals())
