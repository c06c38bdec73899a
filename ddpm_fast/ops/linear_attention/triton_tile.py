"""What the kernels do with tiles: products, the columns of heads, the numbers of a row's norm."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.runtime import triton_launch

SMALLEST_NORM = tl.constexpr(1e-12)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product(b_x, b_y, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """b_x·b_y in float32, of factors rounded to DTYPE.

    The interpreter (PRECISION None) truncates to bfloat16 and multiplies it wrongly: there factors stay float32.
    """
    if PRECISION is None:
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32))
    return tl.dot(b_x.to(DTYPE), b_y.to(DTYPE), input_precision=PRECISION)


@triton.jit
def head_columns(i_group, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """GROUP heads side by side, BLOCK_D columns each: channel, whether it exists, whether it is one of a head's D."""
    o_j = tl.arange(0, GROUP * BLOCK_D)
    if D == BLOCK_D:
        o_channel = i_group * (GROUP * D) + o_j
        return o_channel, o_channel < HEADS * D, o_j < GROUP * BLOCK_D
    o_head, o_d = i_group * GROUP + o_j // BLOCK_D, o_j % BLOCK_D
    return o_head * D + o_d, (o_head < HEADS) & (o_d < D), o_d < D


@triton.jit
def softmax_of_heads(b_q, m_d, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Softmax over each head's D columns, 0 in columns beyond them: (BLOCK_N, GROUP·BLOCK_D)."""
    if D != BLOCK_D:
        b_q = tl.where(m_d[None, :], b_q, -INFINITY)
    b_heads = tl.reshape(b_q, (b_q.shape[0], GROUP, BLOCK_D))
    b_heads = tl.exp(b_heads - tl.max(b_heads, axis=2, keep_dims=True))
    b_heads = b_heads / tl.sum(b_heads, axis=2, keep_dims=True)
    return tl.reshape(b_heads, (b_q.shape[0], GROUP * BLOCK_D))


@triton.jit
def sum_of_heads(b_x, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each head's sum over its columns, in all of them: (BLOCK_N, GROUP·BLOCK_D)."""
    b_heads = tl.reshape(b_x, (b_x.shape[0], GROUP, BLOCK_D))
    b_sums = tl.sum(b_heads, axis=2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(b_sums, (b_x.shape[0], GROUP, BLOCK_D)), (b_x.shape[0], GROUP * BLOCK_D))


@triton.jit
def row_numbers(b_square, b_product, root_c):
    """factor and inner of ‖y‖² and Σ grad·gain·y over a row: dy = factor·u, u = grad·gain − y·factor·inner."""
    b_norm = tl.maximum(tl.sqrt(b_square), SMALLEST_NORM)
    b_factor = root_c / b_norm
    # A clamped norm is a constant: nothing flows through it.
    return b_factor, tl.where(b_norm > SMALLEST_NORM, b_product * b_factor / (root_c * root_c), 0.0)


@triton.jit
def scaled_product(b_q, b_factor, m_n, b_u, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(factor·q̂)ᵀ·u of the rows that exist.

    float16 does not hold 1 / ‖y‖ of a small y: there the largest factor is applied outside.
    """
    if DTYPE != tl.float16:
        return product(tl.trans(b_q * b_factor[:, None]), b_u, DTYPE, PRECISION)
    b_factor = tl.where(m_n, b_factor, 0.0)
    b_largest = tl.max(b_factor, axis=0)
    b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
    return product(tl.trans(b_q * (b_factor / b_largest)[:, None]), b_u, DTYPE, PRECISION) * b_largest


@triton.jit
def load_matrix(pointer, o_j, m_j, o_c, m_c, C):
    """Some rows of a matrix of C columns, 0 outside."""
    return tl.load(pointer + o_j[:, None] * C + o_c[None, :], mask=m_j[:, None] & m_c[None, :], other=0.0)


@triton.jit
def add_groups(
    b_y, qkv_ptr, projection_ptr, bias_ptr, i_own, o_n, m_n, o_c, m_c, C, stride_c, stride_n, HEADS: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y in some columns: b_y, plus q̂·P of the groups FIRST … GROUPS − 1 after group i_own, plus bias."""
    for i_group in range(FIRST, GROUPS):
        o_j, m_j, m_d = head_columns((i_own + i_group) % GROUPS, HEADS, D, GROUP, BLOCK_D)
        b_q = load(qkv_ptr, o_n[:, None] * stride_n + o_j[None, :] * stride_c, m_n[:, None] & m_j[None, :])
        b_q = softmax_of_heads(b_q, m_d, D, GROUP, BLOCK_D)
        b_p = load_matrix(projection_ptr, o_j, m_j, o_c, m_c, C)
        b_y += product(b_q, b_p, qkv_ptr.dtype.element_ty, PRECISION)
    return b_y + load(bias_ptr, o_c, m_c)[None, :]


triton_launch.hash_functions(globals())
