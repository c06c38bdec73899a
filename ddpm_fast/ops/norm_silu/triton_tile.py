"""What the kernels of both norms do with a tile before and after x̂; triton.py has the formulas.

Operands: a tile is BLOCK_N pixels of one sample times BLOCK_C channels, o_ its offsets, m_ its masks, b_ its numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.noise import STREAM_DROPOUT
from ddpm_fast.ops.common.triton import cast, philox4x32, philox_key, silu, silu_derivative
from ddpm_fast.runtime import triton_launch

STAGES = tl.constexpr(2)  # the next tile is loaded while a program computes one
_STREAM_DROPOUT = tl.constexpr(STREAM_DROPOUT)
_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def load(pointer, offsets, mask):
    """float32, 0 outside the mask."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dropout_key(seed_ptr):
    """The two words of dropout's key, 0 without dropout."""
    if seed_ptr is not None:
        return philox_key(tl.load(seed_ptr))
    else:
        return tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)


@triton.jit
def load_bias(bias_ptr, o_c, m_c):
    """(BLOCK_C,), 0 in channels that do not exist and without a bias; loaded before the loop over tiles."""
    if bias_ptr is not None:
        return load(bias_ptr, o_c, m_c)
    else:
        return tl.zeros_like(o_c).to(tl.float32)


@triton.jit
def load_bias_of(bias_ptr, i_b, o_c, m_c, BIAS_ROWS: tl.constexpr):
    """The same of a sample, whose bias is its own row where BIAS_ROWS, the stride of rows, is not 0."""
    if BIAS_ROWS:
        return load(bias_ptr, i_b * BIAS_ROWS + o_c, m_c)
    else:
        return load_bias(bias_ptr, o_c, m_c)


@triton.jit
def load_with_bias(x_ptr, o_tile, m_tile, bias_ptr, b_bias):
    """The norm's input v = x + bias: (BLOCK_N, BLOCK_C), 0 in channels that do not exist."""
    b_v = load(x_ptr, o_tile, m_tile)
    if bias_ptr is not None:
        b_v += b_bias[None, :]
    return b_v


@triton.jit
def slope_and_intercept(
    gain_ptr, offset_ptr, scale_ptr, shift_ptr, i_b, stride_scale, stride_shift, o_c, m_c, scaled=1
):  # fmt: skip
    """(BLOCK_C,) each, both 0 in channels that do not exist; scale and shift are 0 where `scaled` is."""
    b_slope = load(gain_ptr, o_c, m_c)
    b_intercept = tl.zeros_like(b_slope)
    if offset_ptr is not None:
        b_intercept = load(offset_ptr, o_c, m_c)
    if scale_ptr is not None:
        b_factor = 1.0 + load(scale_ptr, i_b * stride_scale + o_c, m_c & (scaled != 0))
        b_slope *= b_factor
        b_intercept *= b_factor
    if shift_ptr is not None:
        b_intercept += load(shift_ptr, i_b * stride_shift + o_c, m_c & (scaled != 0))
    return b_slope, b_intercept


@triton.jit
def rms_factor(b_v, root_c, EXACT: tl.constexpr):
    """√C / max(‖v‖₂, 1e-12) of each pixel: (BLOCK_N,).

    EXACT: both correctly rounded. Gradients of few channels cancel, and 2 units in the last place would show in them.
    """
    b_square = tl.sum(b_v * b_v, axis=1)
    if EXACT:
        return tl.div_rn(root_c, tl.maximum(tl.sqrt_rn(b_square), _SMALLEST_NORM))
    else:
        return root_c / tl.maximum(tl.sqrt(b_square), _SMALLEST_NORM)


@triton.jit
def rms_gradient(b_dnormed, b_normed, b_factor, root_c):
    """The gradient at v of that at x̂ = v·factor: (BLOCK_N, BLOCK_C). A clamped norm is a constant: nothing flows
    through it. A norm that is larger than the smallest by less than forward's rounding counts as clamped."""
    largest_factor, inverse_c = root_c * (0.999999 / _SMALLEST_NORM), tl.div_rn(1.0, root_c * root_c)
    b_projection = tl.where(b_factor < largest_factor, tl.sum(b_dnormed * b_normed, axis=1) * inverse_c, 0.0)
    return (b_dnormed - b_normed * b_projection[:, None]) * b_factor[:, None]


@triton.jit
def load_statistics(statistics_ptr, i_b, o_c, m_c, C, G):
    """Mean and 1/σ of each channel's group: (BLOCK_C,) each."""
    o_statistics = (i_b * G + o_c // (C // G)) * 2
    return load(statistics_ptr, o_statistics, m_c), load(statistics_ptr, o_statistics + 1, m_c)


@triton.jit
def sums_of(i_chunk, bias_ptr, C):
    """Where a chunk's sums begin, which are two rows of channels, with a bias three."""
    if bias_ptr is not None:
        return i_chunk.to(tl.int64) * (3 * C)
    else:
        return i_chunk.to(tl.int64) * (2 * C)


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
def finish_fwd(
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
        b_y += load(residual_ptr, o_tile, m_tile)
    tl.store(out_ptr + o_tile, b_y.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def load_gradient(grad_ptr, grad2_ptr, grad3_ptr, total_ptr, o_sample, o_tile, m_tile):
    """The gradient at the output: (BLOCK_N, BLOCK_C), 0 outside the map; of several their stored sum."""
    b_grad = load(grad_ptr + o_sample, o_tile, m_tile)
    if grad2_ptr is not None:
        b_grad += load(grad2_ptr + o_sample, o_tile, m_tile)
        if grad3_ptr is not None:
            b_grad += load(grad3_ptr + o_sample, o_tile, m_tile)
        b_total = cast(b_grad, total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_sample + o_tile, b_total, mask=m_tile)
        b_grad = b_total.to(tl.float32)
    return b_grad


@triton.jit
def finish_bwd(
    b_dy, b_normed, b_slope, b_intercept, seed_ptr, k0, k1, i_b, n_start, o_c, HW, threshold,
    kept_scale, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """dy, the gradient at y = x̂·slope + intercept, of b_dy, that at the output; 0 outside the map."""
    if seed_ptr is not None:
        b_dy = _dropped(b_dy, k0, k1, i_b, n_start, o_c, HW, threshold, kept_scale, BLOCK_N, QUADS)
    if ACTIVATION:
        b_dy *= silu_derivative(b_normed * b_slope[None, :] + b_intercept[None, :])
    return b_dy


triton_launch.hash_functions(globals())
