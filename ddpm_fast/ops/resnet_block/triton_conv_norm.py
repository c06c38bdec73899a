"""Triton kernels of a 3×3 convolution with RMSNorm in its epilogue, and their launches.

    y = conv3x3(x, weight)      v = y + bias      x̂ = v·√K / max(‖v‖₂, 1e-12)
    out = dropout(SiLU(x̂·gain·(1 + scale) + shift)) + residual

RMSNorm is per pixel and a program has all K channels of its pixels, so the norm needs nothing but the program's own
sums. Of the convolution that reads such an `out`, the gradient at its input is another convolution, of mirrored taps;
the gradient at y follows from it in the epilogue in the same way, and the gradient at `out` is never in memory:

    da = conv3x3(grad, mirrored weightᵀ)      dy from da, y and ‖v‖₂ as in norm_silu, with Σ over pixels for the rows

Both are products of M = pixels, N = K and, per tap, the other map's channels. Maps are channels-last. Sums over pixels
have two stages, tiles of a sample's pixels and then norm_silu_bwd_rows_kernel, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot_of_many
from ddpm_fast.ops.common.triton_rows import is_exact
from ddpm_fast.ops.norm_silu.triton import Rows, dropout_numbers, gradients_of_rows
from ddpm_fast.ops.norm_silu.triton_tile import (
    dropout_key,
    finish_bwd,
    finish_fwd,
    load,
    rms_factor,
    rms_gradient,
    slope_and_intercept,
)
from ddpm_fast.ops.resnet_block.launch import BWD_REGISTERS, conv_norm_tile
from ddpm_fast.runtime import triton_launch

_ANY_SIZE = ["H", "W", "tiles", "tiles_c"]  # numbers for which nothing is compiled again


@triton.jit
def _product(
    x_ptr, weight_ptr, o_n, o_k, H, W, C, K, tiles_c,
    MIRRORED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_K) float32: the convolution of a sample's map (HW, C) at some pixels.

    The weight is (K, 3, 3, C); MIRRORED it is (C, 3, 3, K), and the result the gradient of its convolution's input.
    """
    o_y, o_x = o_n // W, o_n % W
    m_k = o_k < K
    b_out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(9 * tiles_c):
        i_tap, o_c = i // tiles_c, i % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        dy, dx = i_tap // 3 - 1, i_tap % 3 - 1
        y, x = o_y + dy, o_x + dx
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        o_map = (o_n + dy * W + dx)[:, None] * C + o_c[None, :]
        b_x = tl.load(x_ptr + o_map, mask=inside[:, None] & m_c[None, :], other=0.0)
        if MIRRORED:
            o_weight = o_c[:, None] * (9 * K) + (8 - i_tap) * K + o_k[None, :]
            b_weight = tl.load(weight_ptr + o_weight, mask=m_c[:, None] & m_k[None, :], other=0.0)
        else:
            o_weight = o_k[:, None] * (9 * C) + i_tap * C + o_c[None, :]
            b_weight = tl.trans(tl.load(weight_ptr + o_weight, mask=m_k[:, None] & m_c[None, :], other=0.0))
        b_out = dot_of_many(b_x, b_weight, b_out, PRECISION)
    return b_out


@triton.jit(do_not_specialize=_ANY_SIZE)
def conv_norm_fwd_kernel(
    x_ptr,  # (B, HW, C)
    weight_ptr,  # (K, 3, 3, C)
    y_ptr,  # (B, HW, K), or None: not kept
    out_ptr,  # (B, HW, K)
    factors_ptr,  # (B, HW) float32: √K / max(‖v‖₂, 1e-12), or None
    gain_ptr,  # (K,)
    bias_ptr,  # (K,)
    scale_ptr,  # (B, K) or None
    shift_ptr,  # (B, K) or None
    residual_ptr,  # (B, HW, K) or None
    seed_ptr,  # (1,) int64, or None: no dropout
    H, W, C, K, tiles, tiles_c, root_k, stride_scale, stride_shift, threshold, kept_scale,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (B·tiles,)."""
    i_b, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    HW = H * W
    o_n, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < HW, o_k < K
    o_pixel = i_b.to(tl.int64) * HW
    b_y = _product(
        x_ptr + o_pixel * C, weight_ptr, o_n, o_k, H, W, C, K, tiles_c, False, PRECISION, BLOCK_N, BLOCK_K, BLOCK_C
    )
    o_tile, m_tile = o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :]
    b_rounded = cast(b_y, out_ptr.dtype.element_ty)  # as a convolution's output in memory
    if y_ptr is not None:
        tl.store(y_ptr + o_pixel * K + o_tile, b_rounded, mask=m_tile)
    b_v = b_rounded.to(tl.float32) + load(bias_ptr, o_k, m_k)[None, :]
    b_factor = rms_factor(b_v, root_k, True)
    if factors_ptr is not None:
        tl.store(factors_ptr + o_pixel + o_n, b_factor, mask=m_n)
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_k, m_k
    )
    if residual_ptr is not None:
        residual_ptr += o_pixel * K
    finish_fwd(
        b_v * b_factor[:, None], residual_ptr, out_ptr + o_pixel * K, o_tile, m_tile, b_slope, b_intercept, seed_ptr,
        i_b, i_n * BLOCK_N, o_k, HW, threshold, kept_scale, True, BLOCK_N, QUADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE)
def conv_norm_bwd_kernel(
    grad_ptr,  # (B, HW, C): at the output of the convolution that reads out
    weight_ptr,  # (C, 3, 3, K): of that
    y_ptr,  # (B, HW, K)
    dy_ptr,  # (B, HW, K)
    sums_ptr,  # (B, tiles, 3, K) float32: of a tile's pixels, Σ da', Σ da'·x̂ and Σ dy, da' being da before SiLU
    factors_ptr,  # (B, HW)
    gain_ptr,  # (K,)
    bias_ptr,  # (K,)
    scale_ptr,  # (B, K) or None
    shift_ptr,  # (B, K) or None
    seed_ptr,  # (1,) int64, or None: no dropout
    H, W, C, K, tiles, tiles_c, root_k, stride_scale, stride_shift, threshold, kept_scale,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (B·tiles,)."""
    i_b, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    HW = H * W
    o_n, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < HW, o_k < K
    o_pixel = i_b.to(tl.int64) * HW
    b_grad = _product(
        grad_ptr + o_pixel * C, weight_ptr, o_n, o_k, H, W, C, K, tiles_c, True, PRECISION, BLOCK_N, BLOCK_K, BLOCK_C
    )
    o_tile, m_tile = o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :]
    b_grad = cast(tl.where(m_n[:, None], b_grad, 0.0), dy_ptr.dtype.element_ty).to(tl.float32)
    b_factor = tl.load(factors_ptr + o_pixel + o_n, mask=m_n, other=0.0)
    b_v = load(y_ptr + o_pixel * K, o_tile, m_tile) + load(bias_ptr, o_k, m_k)[None, :]
    b_normed = b_v * b_factor[:, None]
    b_slope, b_intercept = slope_and_intercept(
        gain_ptr, None, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_k, m_k
    )
    k0, k1 = dropout_key(seed_ptr)
    b_grad = finish_bwd(
        b_grad, b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b, i_n * BLOCK_N, o_k, HW, threshold, kept_scale,
        True, BLOCK_N, QUADS,
    )  # fmt: skip
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * K)
    tl.store(sums_ptr + o_k, tl.sum(b_grad, axis=0), mask=m_k)
    tl.store(sums_ptr + K + o_k, tl.sum(b_grad * b_normed, axis=0), mask=m_k)
    b_dy = rms_gradient(b_grad * b_slope[None, :], b_normed, b_factor, root_k)
    tl.store(dy_ptr + o_pixel * K + o_tile, cast(b_dy, dy_ptr.dtype.element_ty), mask=m_tile)
    tl.store(sums_ptr + 2 * K + o_k, tl.sum(b_dy, axis=0), mask=m_k)


def conv_norm(
    x: torch.Tensor,  # (B, C, H, W), channels-last
    weight: torch.Tensor,  # (K, C, 3, 3), of the dtype of x
    gain: torch.Tensor,  # K elements
    bias: torch.Tensor,  # (K,)
    scale: torch.Tensor | None,  # (B, K)
    shift: torch.Tensor | None,  # (B, K)
    residual: torch.Tensor | None,  # (B, K, H, W)
    seed: torch.Tensor | None,  # (1,) int64
    dropout_p: float,
    keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y and out, (B, K, H, W), channels-last, and factors (B, HW); without `keeps` y and factors are empty."""
    (B, C, H, W), K = x.shape, weight.shape[0]
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty((B, K, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y = torch.empty_like(out) if keeps else None
    factors = x.new_empty((B, H * W), dtype=torch.float32) if keeps else None
    rows = Rows(gain, None, bias, scale, shift)
    tiles, constants = _launch(x, H * W, C, K)
    with torch.cuda.device_of(x):
        conv_norm_fwd_kernel[(B * tiles,)](
            x, weight.contiguous(memory_format=torch.channels_last), y, out, factors, rows.gain, rows.bias, rows.scale,
            rows.shift, None if residual is None else residual.contiguous(memory_format=torch.channels_last), seed, H,
            W, C, K, tiles, triton_launch.ceil_div(C, constants["BLOCK_C"]), K**0.5, *rows.strides,
            *dropout_numbers(dropout_p), **constants,
        )  # fmt: skip
    if y is None or factors is None:
        return x.new_empty(0), out, x.new_empty(0, dtype=torch.float32)
    return y, out, factors


def conv_norm_gradients(
    grad: torch.Tensor,  # (B, C, H, W): at the output of the convolution that reads out
    weight: torch.Tensor,  # (C, K, 3, 3): of that, of the dtype of y
    y: torch.Tensor,  # (B, K, H, W), channels-last
    factors: torch.Tensor,  # (B, HW)
    gain: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    last_sums: torch.Tensor,  # (B, chunks, 3, K) float32, of another norm
    dropout_p: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of y, gain, bias, scale, shift, and of gain and bias of the other norm; empty where there is none."""
    (B, K, H, W), C = y.shape, grad.shape[1]
    dy, rows = torch.empty_like(y), Rows(gain, None, bias, scale, shift)
    tiles, constants = _launch(y, H * W, C, K)
    sums = y.new_empty((B, tiles, 3, K), dtype=torch.float32)
    with torch.cuda.device_of(y):
        conv_norm_bwd_kernel[(B * tiles,)](
            grad.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last),
            y, dy, sums, factors, rows.gain, rows.bias, rows.scale, rows.shift, seed, H, W, C, K, tiles,
            triton_launch.ceil_div(C, constants["BLOCK_C"]), K**0.5, *rows.strides, *dropout_numbers(dropout_p),
            **constants, **triton_launch.register_bound(BWD_REGISTERS),
        )  # fmt: skip
    dgain, _, dbias, dscale, dshift, last_dgain, _, last_dbias = gradients_of_rows(y, sums, rows, last_sums)
    made = (dgain, dbias, dscale, dshift, last_dgain, last_dbias)
    return dy, *(y.new_empty(0) if gradient is None else gradient for gradient in made)


def _launch(x: torch.Tensor, HW: int, C: int, K: int) -> tuple[int, dict]:
    """Tiles of a sample, and the constants of a launch."""
    precision = triton_launch.convolution_precision()
    tile = conv_norm_tile(HW, C, K, exact=is_exact(x, precision))
    quads = HW % 4 == 0  # tiles are of 16 pixels or more
    return triton_launch.ceil_div(HW, tile["BLOCK_N"]), {"QUADS": quads, "PRECISION": precision, **tile}


triton_launch.hash_functions(globals())
