"""Triton kernels of linear_attention, and their launches.

Per head, with D numbers each of q, k, v per position, E = D the second index of the context, and rows of all heads side
by side, HD = heads·D:

    context[d, e] = Σ k̂[n, d]·v[n, e] over N positions and M memory entries      k̂ = exp(k − max) / sum
    P[d, c] = D^−½·Σ context[d, e]·weight[c, e]      (HD, C), the output projection folded into the context
    y = q̂·P + bias      (N, C)      out = y / max(‖y‖₂, 1e-12)·√C·gain + residual

Forward is three launches: partial contexts per chunk of positions with a running maximum (Milakov & Gimelshein 2018),
their merge with the memory entries, and the rows. Backward is one pass over rows for q, the gradient's small matrices,
and one pass for k and v. The inner sum of k's softmax gradient, Σ k̂·dk̂ over positions, is Σ context·dcontext over e,
and the gradient of bias is any head's Σ dP over d, since q̂ sums to one. All sums are made in two stages, per chunk and
then over chunks, without atomics. Feature maps are read through strides: channels-last is the fast layout, contiguous
works as well. Statistics and sums are float32; factors of products have the dtype of the maps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.linear_attention.launch import Launch, choose_launch, empty_output, output_format
from ddpm_fast.runtime import triton_launch

_SMALLEST_NORM = tl.constexpr(1e-12)
_INFINITY = tl.constexpr(float("inf"))


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
def _head_columns(i_group, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
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
        b_q = tl.where(m_d[None, :], b_q, -_INFINITY)
    b_heads = tl.reshape(b_q, (b_q.shape[0], GROUP, BLOCK_D))
    b_heads = tl.exp(b_heads - tl.max(b_heads, axis=2, keep_dims=True))
    b_heads = b_heads / tl.sum(b_heads, axis=2, keep_dims=True)
    return tl.reshape(b_heads, (b_q.shape[0], GROUP * BLOCK_D))


@triton.jit
def linear_attention_context_kernel(
    qkv_ptr,  # (B, 3, H, D, N) through stride_b, stride_c, stride_n
    partial_ptr,  # (B, H, chunks, D, E) float32: Σ exp(k − max)·v over a chunk's positions
    partial_statistics_ptr,  # (B, H, chunks, 2, D) float32: max of k, Σ exp(k − max)
    N, chunks, stride_b, stride_c, stride_n,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·chunks·H,), the heads of a chunk side by side."""
    i_h, i_chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS % chunks
    i_b = tl.program_id(0) // (HEADS * chunks)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    k_ptr = qkv_ptr + i_b.to(tl.int64) * stride_b + (HEADS + i_h) * D * stride_c
    v_ptr = k_ptr + HEADS * D * stride_c
    b_max = tl.full((BLOCK_D,), -_INFINITY, tl.float32)
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    b_context = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_tile, m_tile = o_n[:, None] * stride_n + o_d[None, :] * stride_c, m_n[:, None] & m_d[None, :]
        b_k, b_v = load(k_ptr, o_tile, m_tile), load(v_ptr, o_tile, m_tile)
        b_k = tl.where(m_n[:, None], b_k, -_INFINITY)
        b_new_max = tl.maximum(b_max, tl.max(b_k, axis=0))  # finite: the first tile has a position that exists
        b_weight = tl.exp(b_k - b_new_max[None, :])
        b_kept = tl.exp(b_max - b_new_max)
        b_sum = b_sum * b_kept + tl.sum(b_weight, axis=0)
        b_context = b_context * b_kept[:, None]
        b_context += product(tl.trans(b_weight), b_v, qkv_ptr.dtype.element_ty, PRECISION)
        b_max = b_new_max
    i_partial = ((i_b * HEADS + i_h) * chunks + i_chunk).to(tl.int64)
    o_context = o_d[:, None] * D + o_d[None, :]
    tl.store(partial_ptr + i_partial * (D * D) + o_context, b_context, mask=m_d[:, None] & m_d[None, :])
    tl.store(partial_statistics_ptr + i_partial * (2 * D) + o_d, b_max, mask=m_d)
    tl.store(partial_statistics_ptr + i_partial * (2 * D) + D + o_d, b_sum, mask=m_d)


@triton.jit
def linear_attention_merge_kernel(
    partial_ptr,  # (B, H, chunks, D, E)
    partial_statistics_ptr,  # (B, H, chunks, 2, D)
    mem_kv_ptr,  # (2, H, D, M)
    weight_ptr,  # (C, H·E)
    context_ptr,  # (B, H, D, E) float32
    statistics_ptr,  # (B, H, 2, D) float32: max and sum of all positions and memory entries
    projection_ptr,  # (B, H, D, C): P
    C, chunks, scale,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, D / BLOCK_R): rows of one context are independent."""
    i_bh, i_h = tl.program_id(0).to(tl.int64), tl.program_id(0) % HEADS
    o_r, o_e = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_r, m_e = o_r < D, o_e < D
    m_context = m_r[:, None] & m_e[None, :]
    partial_statistics_ptr += i_bh * (chunks * 2 * D)
    partial_ptr += i_bh * (chunks * D * D)
    context_ptr += i_bh * (D * D)
    statistics_ptr += i_bh * (2 * D)
    projection_ptr += i_bh * (D * C)
    mem_k_ptr = mem_kv_ptr + i_h * (D * M)
    mem_v_ptr = mem_k_ptr + HEADS * D * M

    o_all = tl.arange(0, BLOCK_K * BLOCKS_K)
    b_maxima = load(partial_statistics_ptr, o_all[:, None] * (2 * D) + o_r[None, :],
                     (o_all < chunks)[:, None] & m_r[None, :])  # fmt: skip
    b_max = tl.max(tl.where((o_all < chunks)[:, None], b_maxima, -_INFINITY), axis=0)  # (BLOCK_R,)
    for j in range(M):
        b_max = tl.maximum(b_max, load(mem_k_ptr, o_r * M + j, m_r))

    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_context = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i_k in range(BLOCKS_K):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = (o_k < chunks)[:, None] & m_r[None, :]
        o_statistics = o_k[:, None] * (2 * D) + o_r[None, :]
        b_weight = tl.where(m_k, tl.exp(load(partial_statistics_ptr, o_statistics, m_k) - b_max[None, :]), 0.0)
        b_sum += tl.sum(b_weight * load(partial_statistics_ptr, o_statistics + D, m_k), axis=0)
        o_partial = o_k[:, None, None] * (D * D) + o_r[None, :, None] * D + o_e[None, None, :]
        b_partial = load(partial_ptr, o_partial, m_k[:, :, None] & m_e[None, None, :])
        b_context += tl.sum(b_weight[:, :, None] * b_partial, axis=0)
    for j in range(M):
        b_weight = tl.exp(load(mem_k_ptr, o_r * M + j, m_r) - b_max)
        b_sum += b_weight
        b_context += b_weight[:, None] * load(mem_v_ptr, o_e * M + j, m_e)[None, :]
    b_context = b_context / tl.where(m_r, b_sum, 1.0)[:, None]

    tl.store(context_ptr + o_r[:, None] * D + o_e[None, :], b_context, mask=m_context)
    tl.store(statistics_ptr + o_r, b_max, mask=m_r)
    tl.store(statistics_ptr + D + o_r, b_sum, mask=m_r)
    for i_c in range(BLOCKS_C):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        o_weight = o_c[None, :] * (HEADS * D) + (i_h * D + o_e)[:, None]
        b_weight = load(weight_ptr, o_weight, m_e[:, None] & m_c[None, :])  # (E, BLOCK_C)
        b_projection = product(b_context, b_weight, tl.float32, PRECISION) * scale
        o_projection = o_r[:, None] * C + o_c[None, :]
        b_projection = b_projection.to(projection_ptr.dtype.element_ty)
        tl.store(projection_ptr + o_projection, b_projection, mask=m_r[:, None] & m_c[None, :])


@triton.jit
def _load_projection(projection_ptr, o_j, m_j, o_c, m_c, C):
    return tl.load(projection_ptr + o_j[:, None] * C + o_c[None, :], mask=m_j[:, None] & m_c[None, :], other=0.0)


@triton.jit
def _add_groups(
    b_y, qkv_ptr, projection_ptr, bias_ptr, i_own, o_n, m_n, o_c, m_c, C, stride_c, stride_n, HEADS: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y in some columns: b_y, plus q̂·P of the groups FIRST … GROUPS − 1 after group i_own, plus bias."""
    for i_group in range(FIRST, GROUPS):
        o_j, m_j, m_d = _head_columns((i_own + i_group) % GROUPS, HEADS, D, GROUP, BLOCK_D)
        b_q = load(qkv_ptr, o_n[:, None] * stride_n + o_j[None, :] * stride_c, m_n[:, None] & m_j[None, :])
        b_q = softmax_of_heads(b_q, m_d, D, GROUP, BLOCK_D)
        b_p = _load_projection(projection_ptr, o_j, m_j, o_c, m_c, C)
        b_y += product(b_q, b_p, qkv_ptr.dtype.element_ty, PRECISION)
    return b_y + load(bias_ptr, o_c, m_c)[None, :]


@triton.jit
def linear_attention_rows_fwd_kernel(
    qkv_ptr,  # (B, 3·HD, N) through stride_b, stride_c, stride_n
    projection_ptr,  # (B, HD, C)
    bias_ptr,  # (C,)
    gain_ptr,  # (C,)
    residual_ptr,  # laid out like out, or None
    out_ptr,  # (B, C, N) through stride_out_c, stride_out_n
    N, C, tiles, root_c, stride_b, stride_c, stride_n, stride_out_c, stride_out_n,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·tiles,). Where a tile does not have all columns of the output, they are walked over twice."""
    i_b, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    qkv_ptr += i_b.to(tl.int64) * stride_b
    projection_ptr += i_b.to(tl.int64) * (HEADS * D * C)
    out_ptr += i_b.to(tl.int64) * N * C
    if residual_ptr is not None:
        residual_ptr += i_b.to(tl.int64) * N * C
    b_square = tl.zeros((BLOCK_N,), tl.float32)
    if BLOCKS_C > 1:
        for i_c in range(BLOCKS_C):
            o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
            b_y = _add_groups(
                tl.zeros((BLOCK_N, BLOCK_C), tl.float32), qkv_ptr, projection_ptr, bias_ptr, 0, o_n, m_n, o_c, o_c < C,
                C, stride_c, stride_n, HEADS, D, GROUP, 0, GROUPS, BLOCK_D, PRECISION,
            )  # fmt: skip
            b_square += tl.sum(b_y * b_y, axis=1)
    for i_c in range(BLOCKS_C):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_y = _add_groups(
            tl.zeros((BLOCK_N, BLOCK_C), tl.float32), qkv_ptr, projection_ptr, bias_ptr, 0, o_n, m_n, o_c, m_c, C,
            stride_c, stride_n, HEADS, D, GROUP, 0, GROUPS, BLOCK_D, PRECISION,
        )  # fmt: skip
        if BLOCKS_C == 1:
            b_square = tl.sum(b_y * b_y, axis=1)
        b_factor = root_c / tl.maximum(tl.sqrt(b_square), _SMALLEST_NORM)
        b_out = b_y * b_factor[:, None] * load(gain_ptr, o_c, m_c)[None, :]
        o_tile, m_tile = o_n[:, None] * stride_out_n + o_c[None, :] * stride_out_c, m_n[:, None] & m_c[None, :]
        if residual_ptr is not None:
            b_out += load(residual_ptr, o_tile, m_tile)
        tl.store(out_ptr + o_tile, b_out.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def sum_of_heads(b_x, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each head's sum over its columns, in all of them: (BLOCK_N, GROUP·BLOCK_D)."""
    b_heads = tl.reshape(b_x, (b_x.shape[0], GROUP, BLOCK_D))
    b_sums = tl.sum(b_heads, axis=2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(b_sums, (b_x.shape[0], GROUP, BLOCK_D)), (b_x.shape[0], GROUP * BLOCK_D))


@triton.jit
def _grad_and_y(
    grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C, stride_c, stride_n,
    stride_out_c, stride_out_n, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of some columns of one tile: grad, y of all heads (b_q is q̂ of the own group), and P of the own group."""
    b_p = _load_projection(projection_ptr, o_own, m_own, o_c, m_c, C)
    b_y = _add_groups(
        product(b_q, b_p, qkv_ptr.dtype.element_ty, PRECISION), qkv_ptr, projection_ptr, bias_ptr, i_own, o_n, m_n, o_c,
        m_c, C, stride_c, stride_n, HEADS, D, GROUP, 1, GROUPS, BLOCK_D, PRECISION,
    )  # fmt: skip
    o_tile, m_tile = o_n[:, None] * stride_out_n + o_c[None, :] * stride_out_c, m_n[:, None] & m_c[None, :]
    return load(grad_ptr, o_tile, m_tile), b_y, b_p


@triton.jit
def row_numbers(b_square, b_product, root_c):
    """factor and inner of ‖y‖² and Σ grad·gain·y over a row: dy = factor·u, u = grad·gain − y·factor·inner."""
    b_norm = tl.maximum(tl.sqrt(b_square), _SMALLEST_NORM)
    b_factor = root_c / b_norm
    # A clamped norm is a constant: nothing flows through it.
    return b_factor, tl.where(b_norm > _SMALLEST_NORM, b_product * b_factor / (root_c * root_c), 0.0)


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


# In the backward of rows factor is applied outside the products with u, which half types could not always hold.


@triton.jit
def linear_attention_rows_bwd_kernel(
    grad_ptr,  # (B, C, N) through stride_out_c, stride_out_n
    qkv_ptr,  # (B, 3·HD, N) through stride_b, stride_c, stride_n; so is dqkv
    dqkv_ptr,  # its q part is written
    sums_ptr,  # (B, chunks, HD + 1, C) float32: dP, and in the last row dgain, over a chunk's positions
    numbers_ptr,  # (B, 2, N) float32: factor and inner
    projection_ptr,  # (B, HD, C)
    bias_ptr,  # (C,)
    gain_ptr,  # (C,)
    N, C, chunks, root_c, stride_b, stride_c, stride_n, stride_out_c, stride_out_n,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a group of heads' q; grid (B·chunks·GROUPS,).

    Where a tile has all columns of the output, their sums are made here and numbers are not touched; elsewhere the
    columns are walked over twice, and linear_attention_sums_bwd_kernel makes the sums with the numbers.
    """
    i_own, i_chunk = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS % chunks
    i_b = tl.program_id(0) // (GROUPS * chunks)
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    grad_ptr += i_b.to(tl.int64) * N * C
    qkv_ptr += i_b.to(tl.int64) * stride_b
    dqkv_ptr += i_b.to(tl.int64) * stride_b
    projection_ptr += i_b.to(tl.int64) * (HEADS * D * C)
    o_own, m_own, m_d = _head_columns(i_own, HEADS, D, GROUP, BLOCK_D)
    if BLOCKS_C == 1:
        b_dp = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
        b_dg = tl.zeros((BLOCK_C,), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_tile, m_tile = o_n[:, None] * stride_n + o_own[None, :] * stride_c, m_n[:, None] & m_own[None, :]
        b_q = softmax_of_heads(load(qkv_ptr, o_tile, m_tile), m_d, D, GROUP, BLOCK_D)
        if BLOCKS_C == 1:
            o_c = tl.arange(0, BLOCK_C)
            m_c = o_c < C
            b_grad, b_y, b_p = _grad_and_y(
                grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C, stride_c,
                stride_n, stride_out_c, stride_out_n, HEADS, D, GROUP, GROUPS, BLOCK_D, PRECISION,
            )  # fmt: skip
            b_u = b_grad * load(gain_ptr, o_c, m_c)[None, :]
            b_factor, b_inner = row_numbers(tl.sum(b_y * b_y, axis=1), tl.sum(b_u * b_y, axis=1), root_c)
            b_y *= b_factor[:, None]
            b_u -= b_y * b_inner[:, None]
            b_dg += tl.sum(b_grad * b_y, axis=0)
            b_dp += scaled_product(b_q, b_factor, m_n, b_u, DTYPE, PRECISION)
            b_dq = product(b_u, tl.trans(b_p), DTYPE, PRECISION)
        else:
            b_square, b_product = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
            for i_c in range(BLOCKS_C):
                o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
                m_c = o_c < C
                b_grad, b_y, _ = _grad_and_y(
                    grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C,
                    stride_c, stride_n, stride_out_c, stride_out_n, HEADS, D, GROUP, GROUPS, BLOCK_D, PRECISION,
                )  # fmt: skip
                b_square += tl.sum(b_y * b_y, axis=1)
                b_product += tl.sum(b_grad * load(gain_ptr, o_c, m_c)[None, :] * b_y, axis=1)
            b_factor, b_inner = row_numbers(b_square, b_product, root_c)
            o_numbers, m_numbers = i_b.to(tl.int64) * (2 * N) + o_n, m_n & (i_own == 0)
            tl.store(numbers_ptr + o_numbers, b_factor, mask=m_numbers)
            tl.store(numbers_ptr + o_numbers + N, b_inner, mask=m_numbers)
            b_dq = tl.zeros((BLOCK_N, GROUP * BLOCK_D), tl.float32)
            for i_c in range(BLOCKS_C):
                o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
                m_c = o_c < C
                b_grad, b_y, b_p = _grad_and_y(
                    grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C,
                    stride_c, stride_n, stride_out_c, stride_out_n, HEADS, D, GROUP, GROUPS, BLOCK_D, PRECISION,
                )  # fmt: skip
                b_u = b_grad * load(gain_ptr, o_c, m_c)[None, :] - b_y * (b_factor * b_inner)[:, None]
                b_dq += product(b_u, tl.trans(b_p), DTYPE, PRECISION)
        b_dq *= b_factor[:, None]
        b_dq = b_q * (b_dq - sum_of_heads(b_q * b_dq, GROUP, BLOCK_D))
        tl.store(dqkv_ptr + o_tile, b_dq.to(DTYPE), mask=m_tile)
    if BLOCKS_C == 1:
        o_c = tl.arange(0, BLOCK_C)
        _store_sums(sums_ptr, i_b * chunks + i_chunk, b_dp, b_dg, i_own, o_own, m_own, o_c, o_c < C, C, HEADS * D)


@triton.jit
def _store_sums(sums_ptr, i_partial, b_dp, b_dg, i_own, o_own, m_own, o_c, m_c, C, HD: tl.constexpr):
    sums_ptr += i_partial.to(tl.int64) * ((HD + 1) * C)
    tl.store(sums_ptr + o_own[:, None] * C + o_c[None, :], b_dp, mask=m_own[:, None] & m_c[None, :])
    tl.store(sums_ptr + HD * C + o_c, b_dg, mask=m_c & (i_own == 0))


@triton.jit
def linear_attention_sums_bwd_kernel(
    grad_ptr,  # (B, C, N) through stride_out_c, stride_out_n
    qkv_ptr,  # (B, 3·HD, N) through stride_b, stride_c, stride_n
    sums_ptr,  # (B, chunks, HD + 1, C) float32: dP, and in the last row dgain, over a chunk's positions
    numbers_ptr,  # (B, 2, N) float32: factor and inner
    projection_ptr,  # (B, HD, C)
    bias_ptr,  # (C,)
    gain_ptr,  # (C,)
    N, C, chunks, stride_b, stride_c, stride_n, stride_out_c, stride_out_n,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of a group of heads and BLOCK_C columns of the output; grid (B·chunks·GROUPS·BLOCKS_C,)."""
    i_own, i_chunk = tl.program_id(0) // BLOCKS_C % GROUPS, tl.program_id(0) // (BLOCKS_C * GROUPS) % chunks
    i_b = tl.program_id(0) // (BLOCKS_C * GROUPS * chunks)
    o_c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    grad_ptr += i_b.to(tl.int64) * N * C
    qkv_ptr += i_b.to(tl.int64) * stride_b
    numbers_ptr += i_b.to(tl.int64) * (2 * N)
    projection_ptr += i_b.to(tl.int64) * (HEADS * D * C)
    o_own, m_own, m_d = _head_columns(i_own, HEADS, D, GROUP, BLOCK_D)
    b_dp = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
    b_dg = tl.zeros((BLOCK_C,), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_q = load(qkv_ptr, o_n[:, None] * stride_n + o_own[None, :] * stride_c, m_n[:, None] & m_own[None, :])
        b_q = softmax_of_heads(b_q, m_d, D, GROUP, BLOCK_D)
        b_grad, b_y, _ = _grad_and_y(
            grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C, stride_c,
            stride_n, stride_out_c, stride_out_n, HEADS, D, GROUP, GROUPS, BLOCK_D, PRECISION,
        )  # fmt: skip
        b_factor = load(numbers_ptr, o_n, m_n)
        b_y *= b_factor[:, None]
        b_dg += tl.sum(b_grad * b_y, axis=0)
        b_u = b_grad * load(gain_ptr, o_c, m_c)[None, :] - b_y * load(numbers_ptr, N + o_n, m_n)[:, None]
        b_dp += scaled_product(b_q, b_factor, m_n, b_u, DTYPE, PRECISION)
    _store_sums(sums_ptr, i_b * chunks + i_chunk, b_dp, b_dg, i_own, o_own, m_own, o_c, m_c, C, HEADS * D)


@triton.jit
def linear_attention_small_bwd_kernel(
    sums_ptr,  # (B, HD + 1, C) float32: dP
    context_ptr,  # (B, H, D, E)
    statistics_ptr,  # (B, H, 2, D)
    mem_kv_ptr,  # (2, H, D, M)
    weight_ptr,  # (C, H·E)
    dcontext_ptr,  # (B, H, D, E) float32
    inner_ptr,  # (B, H, D) float32: Σ context·dcontext over e
    dmem_kv_ptr,  # (B, blocks of rows, 2, H, D, M) float32: of k the block's own rows, of v what they add
    dweight_ptr,  # (B, blocks of rows, C, H·E) float32
    C, scale,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·H·BLOCKS_R,): a program has BLOCK_R rows of a context."""
    i_bh, i_r = tl.program_id(0) // BLOCKS_R, tl.program_id(0) % BLOCKS_R
    i_b, i_h = (i_bh // HEADS).to(tl.int64), i_bh % HEADS
    i_bh = i_bh.to(tl.int64)
    i_partial = i_b * BLOCKS_R + i_r
    o_r, o_e = i_r * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_r, m_e = o_r < D, o_e < D
    o_context, m_context = o_r[:, None] * D + o_e[None, :], m_r[:, None] & m_e[None, :]
    b_context = load(context_ptr + i_bh * (D * D), o_context, m_context)
    sums_ptr += i_b * (HEADS * D + 1) * C + i_h * D * C
    dweight_ptr += i_partial * (HEADS * D * C)
    b_dcontext = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i_c in range(BLOCKS_C):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_dp = load(sums_ptr, o_r[:, None] * C + o_c[None, :], m_r[:, None] & m_c[None, :])
        o_weight, m_weight = o_c[:, None] * (HEADS * D) + i_h * D + o_e[None, :], m_c[:, None] & m_e[None, :]
        b_dcontext += product(b_dp, load(weight_ptr, o_weight, m_weight), tl.float32, PRECISION)
        b_dweight = product(tl.trans(b_dp), b_context, tl.float32, PRECISION) * scale  # (BLOCK_C, E)
        tl.store(dweight_ptr + o_weight, b_dweight, mask=m_weight)
    b_dcontext *= scale
    b_inner = tl.sum(b_context * b_dcontext, axis=1)
    tl.store(dcontext_ptr + i_bh * (D * D) + o_context, b_dcontext, mask=m_context)
    tl.store(inner_ptr + i_bh * D + o_r, b_inner, mask=m_r)

    b_max, b_sum = _load_statistics(statistics_ptr, i_bh, o_r, m_r, D)
    mem_kv_ptr += i_h * (D * M)
    dmem_kv_ptr += i_partial * (2 * HEADS * D * M) + i_h * (D * M)
    for j in range(M):
        b_weight = tl.where(m_r, tl.exp(load(mem_kv_ptr, o_r * M + j, m_r) - b_max) / b_sum, 0.0)
        b_v = load(mem_kv_ptr, HEADS * D * M + o_e * M + j, m_e)
        b_dk = b_weight * (tl.sum(b_dcontext * b_v[None, :], axis=1) - b_inner)
        b_dv = tl.sum(b_weight[:, None] * b_dcontext, axis=0)
        tl.store(dmem_kv_ptr + o_r * M + j, b_dk, mask=m_r)
        tl.store(dmem_kv_ptr + HEADS * D * M + o_e * M + j, b_dv, mask=m_e)


@triton.jit
def _load_statistics(statistics_ptr, i_bh, o_d, m_d, D: tl.constexpr):
    """Max and sum of k's softmax, (BLOCK_D,) each; the sum is 1 where no column is."""
    statistics_ptr += i_bh * (2 * D)
    return load(statistics_ptr, o_d, m_d), tl.load(statistics_ptr + D + o_d, mask=m_d, other=1.0)


@triton.jit
def linear_attention_kv_bwd_kernel(
    qkv_ptr,  # (B, 3, H, D, N) through stride_b, stride_c, stride_n; so is dqkv
    dqkv_ptr,  # its k and v parts are written
    dcontext_ptr,  # (B, H, D, E)
    inner_ptr,  # (B, H, D)
    statistics_ptr,  # (B, H, 2, D)
    N, tiles, stride_b, stride_c, stride_n,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = k̂·(dcontext·v − inner) and dv = k̂·dcontext; grid (B·tiles·H,), the heads of a tile side by side."""
    i_h, i_n = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS % tiles
    i_b = (tl.program_id(0) // (HEADS * tiles)).to(tl.int64)
    i_bh = i_b * HEADS + i_h
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    o_tile, m_tile = o_n[:, None] * stride_n + o_d[None, :] * stride_c, m_n[:, None] & m_d[None, :]
    o_k = i_b * stride_b + (HEADS + i_h) * D * stride_c
    o_v = o_k + HEADS * D * stride_c
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty

    dcontext_ptr += i_bh * (D * D)
    b_dcontext = load(dcontext_ptr, o_d[:, None] * D + o_d[None, :], m_d[:, None] & m_d[None, :])
    # float16 holds neither large sums over positions nor 1 / their number: largest and sum are applied outside.
    b_largest = tl.max(tl.max(tl.abs(b_dcontext), axis=1), axis=0)
    b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
    b_dcontext = b_dcontext / b_largest
    b_max, b_sum = _load_statistics(statistics_ptr, i_bh, o_d, m_d, D)
    b_least = tl.min(tl.where(m_d, b_sum, _INFINITY), axis=0)
    b_weight = tl.where(m_tile, tl.exp(load(qkv_ptr + o_k, o_tile, m_tile) - b_max[None, :]), 0.0)
    b_dv = product(b_weight, b_dcontext * (b_least / b_sum)[:, None], DTYPE, PRECISION) * (b_largest / b_least)
    tl.store(dqkv_ptr + o_v + o_tile, b_dv.to(DTYPE), mask=m_tile)
    b_dk = product(load(qkv_ptr + o_v, o_tile, m_tile), tl.trans(b_dcontext), DTYPE, PRECISION) * b_largest
    b_dk = (b_dk - load(inner_ptr + i_bh * D, o_d, m_d)[None, :]) * b_weight / b_sum[None, :]
    tl.store(dqkv_ptr + o_k + o_tile, b_dk.to(DTYPE), mask=m_tile)


def linear_attention(
    qkv: torch.Tensor,  # (B, 3·HD, H, W), channels-last or contiguous
    mem_kv: torch.Tensor,  # (2, heads, D, M)
    weight: torch.Tensor,  # (C, HD[, 1, 1])
    bias: torch.Tensor,  # (C,)
    gain: torch.Tensor,  # C elements
    residual: torch.Tensor | None,  # (B, C, H, W)
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and for its backward context (B, heads, D, E), statistics (B, heads, 2, D), P (B, HD, C)."""
    B, C, N, D, M = _sizes(qkv, weight, mem_kv, heads)
    out = empty_output(qkv, C)
    launch = _launch_for(qkv, heads, D, C)
    chunks = launch.context.programs(N)
    partial = qkv.new_empty(B, heads, chunks, D, D, dtype=torch.float32)
    partial_statistics = qkv.new_empty(B, heads, chunks, 2, D, dtype=torch.float32)
    context = qkv.new_empty(B, heads, D, D, dtype=torch.float32)
    statistics = qkv.new_empty(B, heads, 2, D, dtype=torch.float32)
    projection = qkv.new_empty(B, heads * D, C)
    residual = None if residual is None else residual.contiguous(memory_format=output_format(qkv))
    head = {"HEADS": heads, "D": D, "BLOCK_D": launch.block_d}
    precision = {"PRECISION": kernel_precision()}
    with torch.cuda.device_of(qkv):
        linear_attention_context_kernel[(B * chunks * heads,)](
            qkv, partial, partial_statistics, N, chunks, *_strides(qkv), **head, **precision,
            TILES=launch.context.tiles, **launch.context.constants,
        )  # fmt: skip
        linear_attention_merge_kernel[(B * heads, triton.cdiv(D, 16))](
            partial, partial_statistics, mem_kv.contiguous(), weight.contiguous(), context, statistics, projection,
            C, chunks, D**-0.5, **head, **precision, M=M, BLOCK_R=16, **_columns(launch, launch.small_columns),
            **launch.merge_constants(chunks), num_warps=4, num_stages=1,
        )  # fmt: skip
        tiles = launch.forward.programs(N)
        linear_attention_rows_fwd_kernel[(B * tiles,)](
            qkv, projection, bias.contiguous(), gain.contiguous(), residual, out, N, C, tiles, C**0.5,
            *_strides(qkv), *_strides(out)[1:], **head, **precision, GROUP=launch.forward.group,
            GROUPS=launch.forward.groups(heads), **_columns(launch, launch.forward_columns),
            **launch.forward.constants,
        )  # fmt: skip
    return out, context, statistics, projection


def linear_attention_backward(
    grad: torch.Tensor,  # (B, C, H, W)
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    context: torch.Tensor,
    statistics: torch.Tensor,
    projection: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of qkv, and in float32 of mem_kv, weight (C, HD), bias and gain (C,); see `linear_attention`."""
    B, C, N, D, M = _sizes(qkv, weight, mem_kv, heads)
    launch = _launch_for(qkv, heads, D, C)
    dqkv = torch.empty_like(qkv)
    grad = grad.contiguous(memory_format=output_format(qkv))
    rows, sums, kv = launch.backward, launch.sums, launch.kv
    fused = launch.backward_columns == launch.block_c  # the sums are made with the rows
    chunks = (rows if fused else sums).programs(N)
    partial = qkv.new_empty(B, chunks, heads * D + 1, C, dtype=torch.float32)
    numbers = None if fused else qkv.new_empty(B, 2, N, dtype=torch.float32)
    dcontext, inner = torch.empty_like(context), qkv.new_empty(B, heads, D, dtype=torch.float32)
    blocks = triton.cdiv(D, launch.small_rows)
    make = qkv.new_empty if blocks == 1 else qkv.new_zeros  # a block of rows leaves the others' keys alone
    dmem_kv = make(B * blocks, 2, heads, D, M, dtype=torch.float32)
    dweight = qkv.new_empty(B * blocks, C, heads * D, dtype=torch.float32)
    parameters = (projection, bias.contiguous(), gain.contiguous())
    head = {"HEADS": heads, "D": D, "BLOCK_D": launch.block_d}
    columns = _columns(launch, launch.backward_columns)
    precision = {"PRECISION": kernel_precision()}
    strides = (*_strides(qkv), *_strides(grad)[1:])
    with torch.cuda.device_of(qkv):
        linear_attention_rows_bwd_kernel[(B * rows.programs(N) * rows.groups(heads),)](
            grad, qkv, dqkv, partial, numbers, *parameters, N, C, rows.programs(N), C**0.5, *strides, **head,
            **precision, **columns, GROUP=rows.group, GROUPS=rows.groups(heads), TILES=rows.tiles, **rows.constants,
        )  # fmt: skip
        if not fused:
            linear_attention_sums_bwd_kernel[(B * chunks * sums.groups(heads) * columns["BLOCKS_C"],)](
                grad, qkv, partial, numbers, *parameters, N, C, chunks, *strides, **head, **precision,
                **columns, GROUP=sums.group, GROUPS=sums.groups(heads), TILES=sums.tiles, **sums.constants,
            )  # fmt: skip
        summed = partial.sum(1)
        linear_attention_small_bwd_kernel[(B * heads * blocks,)](
            summed, context, statistics, mem_kv.contiguous(), weight.contiguous(), dcontext, inner, dmem_kv, dweight,
            C, D**-0.5, **head, **precision, M=M, **_columns(launch, launch.small_columns),
            BLOCK_R=launch.small_rows, BLOCKS_R=blocks, num_warps=launch.small_warps, num_stages=1,
        )  # fmt: skip
        linear_attention_kv_bwd_kernel[(B * kv.programs(N) * heads,)](
            qkv, dqkv, dcontext, inner, statistics, N, kv.programs(N), *_strides(qkv), **head, **precision,
            **kv.constants,
        )  # fmt: skip
    return dqkv, dmem_kv.sum(0), dweight.sum(0), summed[:, :D].sum((0, 1)), summed[:, -1].sum(0)


def kernel_precision() -> str | None:
    """How products of float32 factors are made; None in the interpreter.

    Three TF32 products on the tensor cores are expected to come near float32's accuracy (Ootomo & Yokota 2022); that is
    unmeasured here. One of float32 would run on the other cores and take more registers than there are. Plain TF32 only
    where torch's own products are.
    """
    if triton_launch.interpreted():
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _columns(launch: Launch, columns: int) -> dict[str, int]:
    """Constants of a kernel that walks over the output's columns."""
    return {"BLOCK_C": columns, "BLOCKS_C": launch.block_c // columns}


def _launch_for(qkv: torch.Tensor, heads: int, D: int, C: int) -> Launch:
    N = qkv.shape[2] * qkv.shape[3]
    return choose_launch(N, heads, D, C, half=qkv.element_size() == 2, interpreted=triton_launch.interpreted())


def _sizes(qkv, weight, mem_kv, heads: int) -> tuple[int, int, int, int, int]:
    """B, C, N, D, M."""
    B, _, H, W = qkv.shape
    return B, weight.shape[0], H * W, qkv.shape[1] // (3 * heads), mem_kv.shape[3]


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of sample, channel and position."""
    _, C, H, W = x.shape
    return (C * H * W, 1, C) if x.is_contiguous(memory_format=torch.channels_last) else (C * H * W, H * W, 1)


triton_launch.hash_functions(globals())
