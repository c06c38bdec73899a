"""RMSNorm with SiLU and a 1×1 convolution to few channels in one pass: the normed map is never written.

    x̂ = (x + bias)·√C / max(‖x + bias‖₂, 1e-12)      a = SiLU(x̂·gain)      out = weight·a + residual

Backward makes a again, and of the gradient at out, whose few channels are at hand, the gradient at a:

    da = gradᵀ·weight      dx, dgain, dbias as of the norm alone      dweight = gradᵀ·a      dresidual = grad

Maps are channels-last. Sums over pixels have two stages, chunks of a sample's pixels and then the sum over chunks,
which is another launch: norm_silu_bwd_rows_kernel for gain and bias, and whoever takes `products` for the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot, silu, silu_and_derivative
from ddpm_fast.ops.norm_silu.launch import conv_chunk, conv_tile, sizes_of
from ddpm_fast.ops.norm_silu.triton_tile import STAGES, load, rms_factor, rms_gradient
from ddpm_fast.runtime import triton_launch


@triton.jit
def _load_weight(weight_ptr, o_j, o_c, J, C, dtype: tl.constexpr):
    """(BLOCK_J, BLOCK_C) in the maps' dtype."""
    mask = (o_j < J)[:, None] & (o_c < C)[None, :]
    return cast(tl.load(weight_ptr + o_j[:, None] * C + o_c[None, :], mask=mask, other=0.0), dtype)


@triton.jit
def rms_norm_silu_conv_fwd_kernel(
    x_ptr,  # (N, C)
    out_ptr,  # (N, J)
    factors_ptr,  # (N,) float32: √C / max(‖x + bias‖₂, 1e-12)
    gain_ptr,  # (C,)
    bias_ptr,  # (C,)
    residual_ptr,  # (N, J)
    weight_ptr,  # (J, C)
    N, C, J, root_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N,)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    o_n, o_c, o_j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    m_n, m_c = o_n < N - start, o_c < C
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    b_v = load(x_ptr + start * C, o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :])
    b_v += load(bias_ptr, o_c, m_c)[None, :]
    b_factor = rms_factor(b_v, root_c, True)
    tl.store(factors_ptr + start + o_n, b_factor, mask=m_n)
    b_a = cast(silu(b_v * b_factor[:, None] * load(gain_ptr, o_c, m_c)[None, :]), DTYPE)
    b_out = dot(b_a, tl.trans(_load_weight(weight_ptr, o_j, o_c, J, C, DTYPE)), None, PRECISION)
    o_jut, m_jut = o_n[:, None] * J + o_j[None, :], m_n[:, None] & (o_j < J)[None, :]
    b_out += load(residual_ptr + start * J, o_jut, m_jut)
    tl.store(out_ptr + start * J + o_jut, cast(b_out, out_ptr.dtype.element_ty), mask=m_jut)


@triton.jit(do_not_specialize=["chunks", "tiles"])
def rms_norm_silu_conv_bwd_kernel(
    grad_ptr,  # (B, HW, J)
    x_ptr,  # (B, HW, C)
    dx_ptr,  # (B, HW, C)
    sums_ptr,  # (B, chunks, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of a chunk's pixels
    products_ptr,  # (B, chunks, J, C) float32: dweight of a chunk's pixels
    factors_ptr,  # (B, HW)
    gain_ptr,  # (C,)
    bias_ptr,  # (C,)
    weight_ptr,  # (J, C)
    HW, C, J, chunks, tiles, root_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Grid (B·chunks,)."""
    i_b, i_chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    o_c, o_j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    m_c, m_j = o_c < C, o_j < J
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    grad_ptr += i_b * HW * J
    x_ptr += i_b * HW * C
    dx_ptr += i_b * HW * C
    factors_ptr += i_b * HW
    b_gain, b_bias = load(gain_ptr, o_c, m_c), load(bias_ptr, o_c, m_c)
    b_weight = _load_weight(weight_ptr, o_j, o_c, J, C, DTYPE)
    b_products = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    b_sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dy_normed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_sum_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in tl.range(tiles, num_stages=STAGES):
        o_n = (i_chunk * tiles + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < HW
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :]
        b_grad = tl.load(grad_ptr + o_n[:, None] * J + o_j[None, :], mask=m_n[:, None] & m_j[None, :], other=0.0)
        b_v = load(x_ptr, o_tile, m_tile) + b_bias[None, :]
        b_factor = tl.load(factors_ptr + o_n, mask=m_n, other=0.0)
        b_normed = b_v * b_factor[:, None]
        b_a, b_derivative = silu_and_derivative(b_normed * b_gain[None, :])
        b_products = dot(tl.trans(b_grad), cast(b_a, DTYPE), b_products, PRECISION)
        b_dy = dot(b_grad, b_weight, None, PRECISION) * b_derivative
        b_dnormed = b_dy * b_gain[None, :]
        b_dx = rms_gradient(b_dnormed, b_normed, b_factor, root_c)
        tl.store(dx_ptr + o_tile, cast(b_dx, DTYPE), mask=m_tile)
        b_sum_dy += b_dy
        b_sum_dy_normed += b_dy * b_normed
        b_sum_dx += b_dx
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * C)
    tl.store(sums_ptr + o_c, tl.sum(b_sum_dy, axis=0), mask=m_c)
    tl.store(sums_ptr + C + o_c, tl.sum(b_sum_dy_normed, axis=0), mask=m_c)
    tl.store(sums_ptr + 2 * C + o_c, tl.sum(b_sum_dx, axis=0), mask=m_c)
    products_ptr += tl.program_id(0).to(tl.int64) * (J * C)
    tl.store(products_ptr + o_j[:, None] * C + o_c[None, :], b_products, mask=m_j[:, None] & m_c[None, :])


def norm_silu_conv(
    x: torch.Tensor,  # (B, C, H, W), channels-last
    gain: torch.Tensor,  # C elements
    bias: torch.Tensor,  # (C,)
    residual: torch.Tensor,  # (B, J, H, W)
    weight: torch.Tensor,  # (J, C, 1, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, J, H, W), channels-last, and the factors (B, HW) float32."""
    (B, C, HW), J = sizes_of(x), weight.shape[0]
    N, half = B * HW, x.dtype != torch.float32
    constants = conv_tile(HW, C, sums=False, half=half, interpreted=triton_launch.interpreted())
    out = torch.empty_like(residual, memory_format=torch.channels_last)
    factors = x.new_empty((B, HW), dtype=torch.float32)
    with torch.cuda.device_of(x):
        rms_norm_silu_conv_fwd_kernel[(triton_launch.ceil_div(N, constants["BLOCK_N"]),)](
            x, out, factors, gain.contiguous(), bias.contiguous(),
            residual.contiguous(memory_format=torch.channels_last), weight.reshape(J, C).contiguous(), N, C, J, C**0.5,
            PRECISION=triton_launch.convolution_precision(), **constants,
        )  # fmt: skip
    return out, factors


def norm_silu_conv_gradients(
    grad: torch.Tensor,  # (B, J, H, W)
    x: torch.Tensor,
    factors: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of x, the sums (B, chunks, 3, C) of `norm_silu_backward_of_both`, and (B, chunks, J, C) float32:
    the weight's gradient of chunks of pixels."""
    (B, C, HW), J = sizes_of(x), weight.shape[0]
    interpreted = triton_launch.interpreted()
    constants = conv_tile(HW, C, sums=True, half=x.dtype != torch.float32, interpreted=interpreted)
    chunk = conv_chunk(HW, C, interpreted)
    chunks = triton_launch.ceil_div(HW, chunk)
    dx = torch.empty_like(x)
    sums, products = (x.new_empty((B, chunks, rows, C), dtype=torch.float32) for rows in (3, J))
    with torch.cuda.device_of(x):
        rms_norm_silu_conv_bwd_kernel[(B * chunks,)](
            grad.contiguous(memory_format=torch.channels_last), x, dx, sums, products, factors, gain.contiguous(),
            bias.contiguous(), weight.reshape(J, C).contiguous(), HW, C, J, chunks, chunk // constants["BLOCK_N"],
            C**0.5, PRECISION=triton_launch.convolution_precision(), **constants,
        )  # fmt: skip
    return dx, sums, products


triton_launch.hash_functions(globals())
