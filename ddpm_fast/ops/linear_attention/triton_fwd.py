"""The kernels of the forward pass, in the order of their launches; triton.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.linear_attention.triton_tile import (
    INFINITY,
    SMALLEST_NORM,
    add_groups,
    load,
    product,
)
from ddpm_fast.runtime import triton_launch


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
    b_max = tl.full((BLOCK_D,), -INFINITY, tl.float32)
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    b_context = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_tile, m_tile = o_n[:, None] * stride_n + o_d[None, :] * stride_c, m_n[:, None] & m_d[None, :]
        b_k, b_v = load(k_ptr, o_tile, m_tile), load(v_ptr, o_tile, m_tile)
        b_k = tl.where(m_n[:, None], b_k, -INFINITY)
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
    b_max = tl.max(tl.where((o_all < chunks)[:, None], b_maxima, -INFINITY), axis=0)  # (BLOCK_R,)
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
            b_y = add_groups(
                tl.zeros((BLOCK_N, BLOCK_C), tl.float32), qkv_ptr, projection_ptr, bias_ptr, 0, o_n, m_n, o_c, o_c < C,
                C, stride_c, stride_n, HEADS, D, GROUP, 0, GROUPS, BLOCK_D, PRECISION,
            )  # fmt: skip
            b_square += tl.sum(b_y * b_y, axis=1)
    for i_c in range(BLOCKS_C):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_y = add_groups(
            tl.zeros((BLOCK_N, BLOCK_C), tl.float32), qkv_ptr, projection_ptr, bias_ptr, 0, o_n, m_n, o_c, m_c, C,
            stride_c, stride_n, HEADS, D, GROUP, 0, GROUPS, BLOCK_D, PRECISION,
        )  # fmt: skip
        if BLOCKS_C == 1:
            b_square = tl.sum(b_y * b_y, axis=1)
        b_factor = root_c / tl.maximum(tl.sqrt(b_square), SMALLEST_NORM)
        b_out = b_y * b_factor[:, None] * load(gain_ptr, o_c, m_c)[None, :]
        o_tile, m_tile = o_n[:, None] * stride_out_n + o_c[None, :] * stride_out_c, m_n[:, None] & m_c[None, :]
        if residual_ptr is not None:
            b_out += load(residual_ptr, o_tile, m_tile)
        tl.store(out_ptr + o_tile, b_out.to(out_ptr.dtype.element_ty), mask=m_tile)


triton_launch.hash_functions(globals())
