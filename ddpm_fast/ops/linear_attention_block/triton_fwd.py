"""The kernels of the forward pass, in the order of their launches; triton.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.ops.linear_attention.triton_tile import (
    INFINITY,
    SMALLEST_NORM,
    load,
    load_matrix,
    product,
    softmax_of_heads,
)
from ddpm_fast.ops.linear_attention_block.triton_tile import (
    ANY_SIZE,
    columns_of_heads,
    load_folded,
    load_rows,
    normed,
)
from ddpm_fast.runtime import triton_launch


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_context_kernel(
    x_ptr,  # (B, N, C)
    gain_ptr,  # (C,): gain_in
    weight_ptr,  # (3, HD, C): weight_qkv
    partial_ptr,  # (B, chunks, HD, C) float32: Σ exp(k − max)·x̂ over a chunk's positions
    statistics_ptr,  # (B, chunks, 2, HD) float32: max of k, Σ exp(k − max)
    N, C, chunks, tiles, root_c,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·chunks·GROUPS,), the groups of heads of a chunk side by side."""
    i_group, i_chunk = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS % chunks
    i_partial = (tl.program_id(0) // GROUPS).to(tl.int64)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HD: tl.constexpr = HEADS * D
    x_ptr += (tl.program_id(0) // (GROUPS * chunks)).to(tl.int64) * N * C
    o_j, m_j, _ = columns_of_heads(i_group, HEADS, D, GROUP, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_weight = cast(load_folded(weight_ptr + HD * C, gain_ptr, o_j, m_j, o_c, m_c, C), DTYPE)
    b_max = tl.full((GROUP * BLOCK_D,), -INFINITY, tl.float32)
    b_sum = tl.zeros((GROUP * BLOCK_D,), tl.float32)
    b_partial = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
    for i_tile in range(tiles):
        o_n = (i_chunk * tiles + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = cast(normed(load_rows(x_ptr, o_n, m_n, o_c, m_c, C), root_c)[0], DTYPE)
        b_k = product(b_weight, tl.trans(b_x), DTYPE, PRECISION)  # (columns, BLOCK_N)
        b_k = tl.where(m_n[None, :], b_k, -INFINITY)
        b_new_max = tl.maximum(b_max, tl.max(b_k, axis=1))  # finite: the first tile has a position that exists
        b_k = tl.exp(b_k - b_new_max[:, None])
        b_kept = tl.exp(b_max - b_new_max)
        b_sum = b_sum * b_kept + tl.sum(b_k, axis=1)
        b_partial = b_partial * b_kept[:, None]
        b_partial += product(b_k, b_x, DTYPE, PRECISION)
        b_max = b_new_max
    partial_ptr += i_partial * (HD * C)
    statistics_ptr += i_partial * (2 * HD)
    tl.store(partial_ptr + o_j[:, None] * C + o_c[None, :], b_partial, mask=m_j[:, None] & m_c[None, :])
    tl.store(statistics_ptr + o_j, b_max, mask=m_j)
    tl.store(statistics_ptr + HD + o_j, b_sum, mask=m_j)


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_merge_kernel(
    partial_ptr,  # (B, chunks, HD, C)
    partial_statistics_ptr,  # (B, chunks, 2, HD)
    gain_ptr, weight_qkv_ptr,  # (C,), (3, HD, C)
    mem_kv_ptr,  # (2, H, D, M)
    weight_ptr,  # (C, H·E)
    statistics_ptr,  # (B, 2, HD) float32: max and sum of all positions and memory entries
    sums_ptr,  # (B, HD, C) float32
    context_ptr,  # (B, H, D, E) float32
    projection_ptr,  # (B, HD, C): P
    C, chunks, scale,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, D / BLOCK_R): rows of one context are independent."""
    i_b, i_h = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    HD: tl.constexpr = HEADS * D
    o_r, o_e = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    o_c, o_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    m_r, m_e, m_c = o_r < D, o_e < D, o_c < C
    o_j = i_h * D + o_r
    partial_statistics_ptr += i_b * chunks * (2 * HD)
    partial_ptr += i_b * chunks * (HD * C)
    mem_k_ptr = mem_kv_ptr + i_h * (D * M)
    mem_v_ptr = mem_k_ptr + HD * M

    b_maxima = tl.full((BLOCK_K, BLOCK_R), -INFINITY, tl.float32)
    for i_k in range(0, chunks, BLOCK_K):
        o_chunk = i_k + o_k
        m_chunk = (o_chunk < chunks)[:, None] & m_r[None, :]
        o_statistics = o_chunk[:, None] * (2 * HD) + o_j[None, :]
        b_maxima = tl.maximum(b_maxima, tl.load(partial_statistics_ptr + o_statistics, mask=m_chunk, other=-INFINITY))
    b_max = tl.max(b_maxima, axis=0)  # (BLOCK_R,)
    for j in range(M):
        b_max = tl.maximum(b_max, load(mem_k_ptr, o_r * M + j, m_r))
    b_max = tl.where(m_r, b_max, 0.0)

    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_k in range(0, chunks, BLOCK_K):
        o_chunk = i_k + o_k
        m_chunk = (o_chunk < chunks)[:, None] & m_r[None, :]
        o_statistics = o_chunk[:, None] * (2 * HD) + o_j[None, :]
        b_weight = tl.load(partial_statistics_ptr + o_statistics, mask=m_chunk, other=-INFINITY)
        b_weight = tl.exp(b_weight - b_max[None, :])
        b_sum += tl.sum(b_weight * load(partial_statistics_ptr, o_statistics + HD, m_chunk), axis=0)
        o_partial = (o_chunk[:, None] * HD + o_j[None, :])[:, :, None] * C + o_c[None, None, :]
        b_partial = load(partial_ptr, o_partial, m_chunk[:, :, None] & m_c[None, None, :])
        b_sums += tl.sum(b_weight[:, :, None] * b_partial, axis=0)
    b_context = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for j in range(M):
        b_weight = tl.exp(load(mem_k_ptr, o_r * M + j, m_r) - b_max)
        b_sum += b_weight
        b_context += b_weight[:, None] * load(mem_v_ptr, o_e * M + j, m_e)[None, :]
    b_inverse = 1.0 / tl.where(m_r, b_sum, 1.0)
    b_sums = b_sums * b_inverse[:, None]
    b_values = load_folded(weight_qkv_ptr + (2 * HEADS + i_h) * D * C, gain_ptr, o_e, m_e, o_c, m_c, C)  # (E, C)
    b_context = b_context * b_inverse[:, None] + product(b_sums, tl.trans(b_values), tl.float32, PRECISION)
    b_weight = load(weight_ptr, o_c[None, :] * HD + (i_h * D + o_e)[:, None], m_e[:, None] & m_c[None, :])  # (E, C)
    b_projection = cast(product(b_context, b_weight, tl.float32, PRECISION) * scale, projection_ptr.dtype.element_ty)

    o_row, m_row = i_b * (HD * C) + o_j[:, None] * C + o_c[None, :], m_r[:, None] & m_c[None, :]
    tl.store(sums_ptr + o_row, b_sums, mask=m_row)
    tl.store(projection_ptr + o_row, b_projection, mask=m_row)
    o_context = (i_b * HD + o_j)[:, None] * D + o_e[None, :]
    tl.store(context_ptr + o_context, b_context, mask=m_r[:, None] & m_e[None, :])
    tl.store(statistics_ptr + i_b * (2 * HD) + o_j, b_max, mask=m_r)
    tl.store(statistics_ptr + i_b * (2 * HD) + HD + o_j, b_sum, mask=m_r)


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_rows_fwd_kernel(
    x_ptr,  # (B, N, C)
    gain_in_ptr, weight_ptr,  # (C,), (3, HD, C)
    projection_ptr,  # (B, HD, C)
    bias_ptr, gain_ptr,  # (C,)
    residual_ptr,  # (B, N, C) or None
    out_ptr,  # (B, N, C)
    N, C, programs, tiles, root_c,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, ADDS_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·programs,)."""
    i_b, i_program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    o_j, m_j, m_d = columns_of_heads(0, HEADS, D, GROUP, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    x_ptr += i_b * N * C
    out_ptr += i_b * N * C
    if residual_ptr is not None:
        residual_ptr += i_b * N * C
    b_weight = cast(load_folded(weight_ptr, gain_in_ptr, o_j, m_j, o_c, m_c, C), DTYPE)
    b_projection = load_matrix(projection_ptr + i_b * (HEADS * D * C), o_j, m_j, o_c, m_c, C)
    b_bias, b_gain = load(bias_ptr, o_c, m_c), load(gain_ptr, o_c, m_c)
    for i_tile in range(tiles):
        o_n = (i_program * tiles + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = load_rows(x_ptr, o_n, m_n, o_c, m_c, C)
        b_q = product(cast(normed(b_x, root_c)[0], DTYPE), tl.trans(b_weight), DTYPE, PRECISION)
        b_q = softmax_of_heads(b_q, m_d, D, GROUP, BLOCK_D)
        b_y = product(b_q, b_projection, DTYPE, PRECISION) + b_bias[None, :]
        b_factor = root_c / tl.maximum(tl.sqrt(tl.sum(b_y * b_y, axis=1)), SMALLEST_NORM)
        b_y = b_y * b_factor[:, None] * b_gain[None, :]
        if ADDS_X:
            b_y += b_x.to(tl.float32)
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :]
        if residual_ptr is not None:
            b_y += load(residual_ptr, o_tile, m_tile)
        tl.store(out_ptr + o_tile, cast(b_y, DTYPE), mask=m_tile)


triton_launch.hash_functions(globals())
