"""The kernels of the backward pass; triton.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.linear_attention.triton_tile import (
    INFINITY,
    add_groups,
    head_columns,
    load,
    load_matrix,
    product,
    row_numbers,
    scaled_product,
    softmax_of_heads,
    sum_of_heads,
)
from ddpm_fast.runtime import triton_launch


@triton.jit
def _grad_and_y(
    grad_ptr, qkv_ptr, projection_ptr, bias_ptr, b_q, o_own, m_own, i_own, o_n, m_n, o_c, m_c, C, stride_c, stride_n,
    stride_out_c, stride_out_n, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of some columns of one tile: grad, y of all heads (b_q is q̂ of the own group), and P of the own group."""
    b_p = load_matrix(projection_ptr, o_own, m_own, o_c, m_c, C)
    b_y = add_groups(
        product(b_q, b_p, qkv_ptr.dtype.element_ty, PRECISION), qkv_ptr, projection_ptr, bias_ptr, i_own, o_n, m_n, o_c,
        m_c, C, stride_c, stride_n, HEADS, D, GROUP, 1, GROUPS, BLOCK_D, PRECISION,
    )  # fmt: skip
    o_tile, m_tile = o_n[:, None] * stride_out_n + o_c[None, :] * stride_out_c, m_n[:, None] & m_c[None, :]
    return load(grad_ptr, o_tile, m_tile), b_y, b_p


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
    o_own, m_own, m_d = head_columns(i_own, HEADS, D, GROUP, BLOCK_D)
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
    o_own, m_own, m_d = head_columns(i_own, HEADS, D, GROUP, BLOCK_D)
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
    b_least = tl.min(tl.where(m_d, b_sum, INFINITY), axis=0)
    b_weight = tl.where(m_tile, tl.exp(load(qkv_ptr + o_k, o_tile, m_tile) - b_max[None, :]), 0.0)
    b_dv = product(b_weight, b_dcontext * (b_least / b_sum)[:, None], DTYPE, PRECISION) * (b_largest / b_least)
    tl.store(dqkv_ptr + o_v + o_tile, b_dv.to(DTYPE), mask=m_tile)
    b_dk = product(load(qkv_ptr + o_v, o_tile, m_tile), tl.trans(b_dcontext), DTYPE, PRECISION) * b_largest
    b_dk = (b_dk - load(inner_ptr + i_bh * D, o_d, m_d)[None, :]) * b_weight / b_sum[None, :]
    tl.store(dqkv_ptr + o_k + o_tile, b_dk.to(DTYPE), mask=m_tile)


triton_launch.hash_functions(globals())
