"""GroupNorm's kernels where the registers of a program hold all pixels of some groups: a launch forward, one backward.

`launch.choose_groups` says for which maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.norm_silu.triton_tile import (
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
    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    size = HW * D * 1.0
    b_mean = tl.div_rn(_over_groups(tl.sum(tl.where(m_tile, b_v, 0.0), axis=0), BLOCK_G), size)
    b_centred = tl.where(m_tile, b_v - b_mean[None, :], 0.0)
    b_variance = tl.div_rn(_over_groups(tl.sum(b_centred * b_centred, axis=0), BLOCK_G), size)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))
    o_statistics, m_first = (i_b * G + o_c // D) * 2, m_c & (o_c % D == 0)
    tl.store(statistics_ptr + o_statistics, b_mean, mask=m_first)
    tl.store(statistics_ptr + o_statistics + 1, b_rstd, mask=m_first)
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    finish_fwd(
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
    grad2_ptr=None, grad3_ptr=None, total_ptr=None,  # like grad: of branches of the output, and the sum of all
):  # fmt: skip
    """Its backward: grad and x are read once."""
    i_b, o_c, m_c, o_tile, m_tile = _tile_of_groups(HW, C, stride_c, stride_n, D, BLOCK_N, BLOCK_C, BLOCK_G)
    o_sample = i_b.to(tl.int64) * stride_b
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c
    )
    b_mean, b_rstd = load_statistics(statistics_ptr, i_b, o_c, m_c, C, G)
    b_bias = load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS)
    k0, k1 = dropout_key(seed_ptr)
    b_v = load_with_bias(x_ptr + o_sample, o_tile, m_tile, bias_ptr, b_bias)
    b_normed = (b_v - b_mean[None, :]) * b_rstd[None, :]
    b_grad = load_gradient(grad_ptr, grad2_ptr, grad3_ptr, total_ptr, o_sample, o_tile, m_tile)
    b_dy = finish_bwd(
        b_grad, b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b, 0, o_c, HW, threshold, kept_scale, ACTIVATION,
        BLOCK_N, QUADS,
    )  # fmt: skip
    b_sum_dy, b_sum_dy_normed = tl.sum(b_dy, axis=0), tl.sum(b_dy * b_normed, axis=0)
    o_sums = sums_of(i_b, bias_ptr, C) + o_c
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
        b_dx += load(added_ptr + o_sample, o_tile, m_tile)
    tl.store(dx_ptr + o_sample + o_tile, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)


triton_launch.hash_functions(globals())
