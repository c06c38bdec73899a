"""The kernels of the backward pass, in the order of their launches; triton.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.ops.linear_attention.triton_tile import INFINITY, SMALLEST_NORM, load, load_matrix, product, row_numbers
from ddpm_fast.ops.linear_attention_block.triton_tile import (
    ANY_SIZE,
    columns_of_heads,
    load_folded,
    load_rows,
    normed,
)
from ddpm_fast.runtime import triton_launch


@triton.jit
def _norm_backward(b_z, b_normed, b_factor, root_c):
    """The gradient of x of the gradient b_z of x̂; a clamped norm is a constant, and nothing flows through it."""
    unclamped = b_factor < tl.div_rn(root_c, SMALLEST_NORM)
    b_inner = tl.where(unclamped, tl.sum(b_z * b_normed, axis=1) * tl.div_rn(1.0, root_c * root_c), 0.0)
    return (b_z - b_normed * b_inner[:, None]) * b_factor[:, None]


# Where positions are summed over, tiles of q and k are (columns of heads, positions): the matrix unit then has 128 rows
# for few positions, a number per column takes one or two registers, and q̂, k̂ and their gradients are first factors.


@triton.jit
def _softmax_of_heads(b_q, m_d, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Softmax over each head's D rows, 0 in rows beyond them: (GROUP·BLOCK_D, BLOCK_N)."""
    if D != BLOCK_D:
        b_q = tl.where(m_d[:, None], b_q, -INFINITY)
    b_heads = tl.reshape(b_q, (GROUP, BLOCK_D, b_q.shape[1]))
    b_heads = tl.exp(b_heads - tl.max(b_heads, axis=1, keep_dims=True))
    b_heads = b_heads / tl.sum(b_heads, axis=1, keep_dims=True)
    return tl.reshape(b_heads, (GROUP * BLOCK_D, b_q.shape[1]))


@triton.jit
def _sum_of_heads(b_x, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each head's sum over its rows, in all of them: (GROUP·BLOCK_D, BLOCK_N)."""
    b_heads = tl.reshape(b_x, (GROUP, BLOCK_D, b_x.shape[1]))
    b_sums = tl.broadcast_to(tl.sum(b_heads, axis=1, keep_dims=True), (GROUP, BLOCK_D, b_x.shape[1]))
    return tl.reshape(b_sums, (GROUP * BLOCK_D, b_x.shape[1]))


@triton.jit
def _scaled_product(b_q, b_factor, m_n, b_u, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(q̂·factor)·u of the positions that exist.

    float16 does not hold 1 / ‖y‖ of a small y: there the largest factor is applied outside.
    """
    if DTYPE != tl.float16:
        return product(b_q * b_factor[None, :], b_u, DTYPE, PRECISION)
    b_factor = tl.where(m_n, b_factor, 0.0)
    b_largest = tl.max(b_factor, axis=0)
    b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
    return product(b_q * (b_factor / b_largest)[None, :], b_u, DTYPE, PRECISION) * b_largest


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_queries_bwd_kernel(
    grad_ptr,  # (B, N, C)
    x_ptr,  # (B, N, C)
    dx_ptr,  # (B, N, C): what flows through q and, with ADDS_X, past the block
    sums_ptr,  # (B, chunks, 1 + 2·HD, C) float32: dgain in the first row, dP and dWq, over a chunk's positions
    gain_in_ptr, weight_ptr,  # (C,), (3, HD, C)
    projection_ptr,  # (B, HD, C)
    bias_ptr, gain_ptr,  # (C,)
    N, C, chunks, tiles, root_c,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ADDS_X: tl.constexpr,
    grad2_ptr=None,  # (B, N, C): of another reader of the output
):  # fmt: skip
    """Grid (B·chunks,)."""
    i_b, i_chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HD: tl.constexpr = HEADS * D
    o_j, m_j, m_d = columns_of_heads(0, HEADS, D, GROUP, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    grad_ptr += i_b * N * C
    if grad2_ptr is not None:
        grad2_ptr += i_b * N * C
    x_ptr += i_b * N * C
    dx_ptr += i_b * N * C
    b_weight = cast(load_folded(weight_ptr, gain_in_ptr, o_j, m_j, o_c, m_c, C), DTYPE)
    b_projection = load_matrix(projection_ptr + i_b * (HD * C), o_j, m_j, o_c, m_c, C)
    b_bias, b_gain = load(bias_ptr, o_c, m_c), load(gain_ptr, o_c, m_c)
    b_dp = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
    b_dweight = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
    b_dgain = tl.zeros((BLOCK_C,), tl.float32)
    for i_tile in range(tiles):
        o_n = (i_chunk * tiles + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = load_rows(x_ptr, o_n, m_n, o_c, m_c, C)
        b_grad = load_rows(grad_ptr, o_n, m_n, o_c, m_c, C)
        if grad2_ptr is not None:
            b_grad2 = load_rows(grad2_ptr, o_n, m_n, o_c, m_c, C)
            b_grad = cast(b_grad.to(tl.float32) + b_grad2.to(tl.float32), DTYPE)
        b_normed = cast(normed(b_x, root_c)[0], DTYPE)
        b_q = product(b_weight, tl.trans(b_normed), DTYPE, PRECISION)  # (columns, BLOCK_N)
        b_q = _softmax_of_heads(b_q, m_d, D, GROUP, BLOCK_D)
        b_y = product(tl.trans(b_projection), b_q, DTYPE, PRECISION) + b_bias[:, None]  # (BLOCK_C, BLOCK_N)
        b_grad = tl.trans(b_grad).to(tl.float32)
        b_u = b_grad * b_gain[:, None]
        b_factor, b_inner = row_numbers(tl.sum(b_y * b_y, axis=0), tl.sum(b_u * b_y, axis=0), root_c)
        b_y *= b_factor[None, :]
        b_dgain += tl.sum(b_grad * b_y, axis=1)
        b_u -= b_y * b_inner[None, :]
        # factor is applied outside the products with u, which half types could not always hold.
        b_dp += _scaled_product(b_q, b_factor, m_n, tl.trans(b_u), DTYPE, PRECISION)
        b_dq = product(b_projection, b_u, DTYPE, PRECISION) * b_factor[None, :]
        b_dq = cast(b_q * (b_dq - _sum_of_heads(b_q * b_dq, GROUP, BLOCK_D)), DTYPE)
        b_dweight += product(b_dq, b_normed, DTYPE, PRECISION)
        b_z = tl.trans(product(tl.trans(b_weight), b_dq, DTYPE, PRECISION))  # (BLOCK_N, BLOCK_C)
        b_normed_again, b_factor_again = normed(b_x, root_c)
        b_dx = _norm_backward(b_z, b_normed_again, b_factor_again, root_c)
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :]
        if ADDS_X:  # read again, from the cache: the products leave no registers
            if grad2_ptr is not None:
                b_dx += load(grad2_ptr, o_tile, m_tile)
            b_dx += load(grad_ptr, o_tile, m_tile)
        tl.store(dx_ptr + o_tile, cast(b_dx, DTYPE), mask=m_tile)
    sums_ptr += tl.program_id(0).to(tl.int64) * ((2 * HD + 1) * C)
    o_matrix, m_matrix = o_j[:, None] * C + o_c[None, :], m_j[:, None] & m_c[None, :]
    tl.store(sums_ptr + o_c, b_dgain, mask=m_c)
    tl.store(sums_ptr + C + o_matrix, b_dp, mask=m_matrix)
    tl.store(sums_ptr + C + HD * C + o_matrix, b_dweight, mask=m_matrix)


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_small_bwd_kernel(
    partial_ptr,  # (B, chunks, 1 + 2·HD, C) float32: dgain, dP, dWq over a chunk's positions
    statistics_ptr,  # (B, 2, HD)
    sums_ptr,  # (B, HD, C) float32
    context_ptr,  # (B, H, D, E) float32
    gain_ptr, weight_qkv_ptr,  # (C,), (3, HD, C)
    mem_kv_ptr,  # (2, H, D, M)
    weight_ptr,  # (C, H·E)
    dsums_ptr,  # (B, HD, C): dS, every row over its largest number
    rows_ptr,  # (B, 2, HD) float32: that number of every row, and δ over it
    parameters_ptr,  # (B, 2·HD·C + 2·HD·M) float32: dweight (C, H·E), dWv (HD, C), dmem_kv (2, H, D, M)
    C, chunks, scale,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·H,)."""
    i_b, i_h = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    HD: tl.constexpr = HEADS * D
    DTYPE: tl.constexpr = dsums_ptr.dtype.element_ty
    o_d, o_c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    m_d, m_c = o_d < D, o_c < C
    o_j = i_h * D + o_d
    o_row, m_row = o_j[:, None] * C + o_c[None, :], m_d[:, None] & m_c[None, :]
    parameters_ptr += i_b * (2 * HD * C + 2 * HD * M)
    b_context = load(context_ptr + (i_b * HEADS + i_h) * (D * D), o_d[:, None] * D + o_d[None, :],
                     m_d[:, None] & m_d[None, :])  # fmt: skip
    partial_ptr += i_b * chunks * ((2 * HD + 1) * C) + C
    b_dp = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for i_k in range(0, chunks, 4):
        for j in tl.static_range(4):  # four loads on their way at once
            o_chunk = (i_k + j) * ((2 * HD + 1) * C)
            b_dp += load(partial_ptr, o_chunk + o_row, m_row & (i_k + j < chunks))  # (D, C)
    o_weight, m_weight = o_c[:, None] * HD + o_j[None, :], m_c[:, None] & m_d[None, :]
    b_weight = load(weight_ptr, o_weight, m_weight)  # (C, E)
    b_dweight = product(tl.trans(b_dp), b_context, tl.float32, PRECISION) * scale
    tl.store(parameters_ptr + o_weight, b_dweight, mask=m_weight)
    b_dcontext = product(b_dp, b_weight, tl.float32, PRECISION) * scale  # (D, E)
    b_sums = load(sums_ptr + i_b * (HD * C), o_row, m_row)
    b_dvalues = product(tl.trans(b_dcontext), b_sums, tl.float32, PRECISION)  # (E, C)
    tl.store(parameters_ptr + HD * C + o_row, b_dvalues, mask=m_row)
    b_values = load_folded(weight_qkv_ptr + 2 * HD * C, gain_ptr, o_j, m_d, o_c, m_c, C)
    b_dsums = product(b_dcontext, b_values, tl.float32, PRECISION)  # (D, C)
    # float16 holds neither large sums over positions nor 1 / their number: rows are stored over their largest number.
    b_largest = tl.max(tl.abs(b_dsums), axis=1)
    b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
    b_dsums = cast(b_dsums / b_largest[:, None], DTYPE)
    tl.store(dsums_ptr + i_b * (HD * C) + o_row, b_dsums, mask=m_row)
    # Of the rounded dS, as dk is: where a position has nearly all the weight the two cancel.
    b_delta = tl.sum(b_sums * b_dsums.to(tl.float32), axis=1)

    b_max = load(statistics_ptr + i_b * (2 * HD), o_j, m_d)
    b_sum = tl.load(statistics_ptr + i_b * (2 * HD) + HD + o_j, mask=m_d, other=1.0)
    mem_k_ptr = mem_kv_ptr + i_h * (D * M)
    for j in range(M):
        b_weight_of = tl.where(m_d, tl.exp(load(mem_k_ptr, o_d * M + j, m_d) - b_max) / b_sum, 0.0)
        b_v = load(mem_k_ptr, HD * M + o_d * M + j, m_d)
        b_delta += b_weight_of * tl.sum(b_dcontext * b_v[None, :], axis=1) / b_largest
    dmem_k_ptr = parameters_ptr + 2 * HD * C + i_h * (D * M)
    for j in range(M):
        b_weight_of = tl.where(m_d, tl.exp(load(mem_k_ptr, o_d * M + j, m_d) - b_max) / b_sum, 0.0)
        b_v = load(mem_k_ptr, HD * M + o_d * M + j, m_d)
        b_dk = b_weight_of * (tl.sum(b_dcontext * b_v[None, :], axis=1) - b_delta * b_largest)
        b_dv = tl.sum(b_weight_of[:, None] * b_dcontext, axis=0)
        tl.store(dmem_k_ptr + o_d * M + j, b_dk, mask=m_d)
        tl.store(dmem_k_ptr + HD * M + o_d * M + j, b_dv, mask=m_d)
    tl.store(rows_ptr + i_b * (2 * HD) + o_j, b_largest, mask=m_d)
    tl.store(rows_ptr + i_b * (2 * HD) + HD + o_j, b_delta, mask=m_d)


@triton.jit(do_not_specialize=ANY_SIZE)
def linear_attention_block_keys_bwd_kernel(
    x_ptr,  # (B, N, C)
    dx_ptr,  # (B, N, C), added to
    partial_ptr,  # (B, chunks, HD, C) float32: dWk over a chunk's positions
    gain_in_ptr, weight_ptr,  # (C,), (3, HD, C)
    statistics_ptr,  # (B, 2, HD)
    dsums_ptr,  # (B, HD, C): dS over rows[0]
    rows_ptr,  # (B, 2, HD) float32
    N, C, chunks, tiles, root_c,
    HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B·chunks,)."""
    i_b, i_chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HD: tl.constexpr = HEADS * D
    o_j, m_j, _ = columns_of_heads(0, HEADS, D, GROUP, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    x_ptr += i_b * N * C
    dx_ptr += i_b * N * C
    b_weight = cast(load_folded(weight_ptr + HD * C, gain_in_ptr, o_j, m_j, o_c, m_c, C), DTYPE)
    b_dsums = load_matrix(dsums_ptr + i_b * (HD * C), o_j, m_j, o_c, m_c, C)
    b_max = load(statistics_ptr + i_b * (2 * HD), o_j, m_j)
    b_delta = load(rows_ptr + i_b * (2 * HD) + HD, o_j, m_j)
    # k̂·dS is exp(k − max)·share times (dS over its rows' largest) times largest: both factors are 1 at most.
    b_share = tl.where(m_j, load(rows_ptr + i_b * (2 * HD), o_j, m_j) /
                       tl.load(statistics_ptr + i_b * (2 * HD) + HD + o_j, mask=m_j, other=1.0), 0.0)  # fmt: skip
    largest = tl.max(b_share, axis=0)
    b_share = b_share / largest
    b_dweight = tl.zeros((GROUP * BLOCK_D, BLOCK_C), tl.float32)
    for i_tile in range(tiles):
        o_n = (i_chunk * tiles + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :]
        b_x = load_rows(x_ptr, o_n, m_n, o_c, m_c, C)
        b_dx = load(dx_ptr, o_tile, m_tile)
        b_normed = cast(normed(b_x, root_c)[0], DTYPE)
        b_k = product(b_weight, tl.trans(b_normed), DTYPE, PRECISION)  # (columns, BLOCK_N)
        b_k = tl.where(m_n[None, :], tl.exp(b_k - b_max[:, None]) * b_share[:, None], 0.0)
        b_dk = product(b_dsums, tl.trans(b_normed), DTYPE, PRECISION) - b_delta[:, None]
        b_dk = cast(b_k * b_dk, DTYPE)
        b_dweight += product(b_dk, b_normed, DTYPE, PRECISION)
        b_z = product(tl.trans(b_dsums), b_k, DTYPE, PRECISION)
        b_z = tl.trans(b_z + product(tl.trans(b_weight), b_dk, DTYPE, PRECISION))  # (BLOCK_N, BLOCK_C)
        b_normed_again, b_factor_again = normed(b_x, root_c)
        b_dx += _norm_backward(b_z * largest, b_normed_again, b_factor_again, root_c)
        tl.store(dx_ptr + o_tile, cast(b_dx, DTYPE), mask=m_tile)
    o_matrix, m_matrix = o_j[:, None] * C + o_c[None, :], m_j[:, None] & m_c[None, :]
    partial_ptr += tl.program_id(0).to(tl.int64) * (HD * C)
    tl.store(partial_ptr + o_matrix, b_dweight * largest, mask=m_matrix)


@triton.jit(do_not_specialize=[*ANY_SIZE, "B"])
def linear_attention_block_sums_bwd_kernel(
    queries_ptr,  # (B·chunks, 1 + 2·HD, C) float32: dgain, dP, dWq
    keys_ptr,  # (B·chunks, HD, C) float32: dWk
    parameters_ptr,  # (B, 2·HD·C + 2·HD·M) float32: dweight, dWv, dmem_kv
    first_ptr,  # (1 + D, C) float32: dgain, dP of the first head
    folded_ptr,  # (3, HD, C) float32: the gradient of weight_qkv·gain_in
    dweight_ptr,  # (C, HD)
    dmem_kv_ptr,  # (2, HD, M)
    B, C, chunks,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of all images and chunks. Grid (columns / BLOCK, 6): a row of programs for every part."""
    part, o = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    HD: tl.constexpr = HEADS * D
    size = HD * C
    if part == 0:
        _sum_rows(queries_ptr, first_ptr, o, (1 + D) * C, B * chunks, (1 + 2 * HD) * C, BLOCK_R)
    elif part == 1:
        _sum_rows(queries_ptr + C + size, folded_ptr, o, size, B * chunks, (1 + 2 * HD) * C, BLOCK_R)
    elif part == 2:
        _sum_rows(keys_ptr, folded_ptr + size, o, size, B * chunks, size, BLOCK_R)
    elif part == 3:
        _sum_rows(parameters_ptr, dweight_ptr, o, size, B, 2 * HD * (C + M), BLOCK_R)
    elif part == 4:
        _sum_rows(parameters_ptr + size, folded_ptr + 2 * size, o, size, B, 2 * HD * (C + M), BLOCK_R)
    else:
        _sum_rows(parameters_ptr + 2 * size, dmem_kv_ptr, o, 2 * HD * M, B, 2 * HD * (C + M), BLOCK_R)


@triton.jit
def _sum_rows(rows_ptr, out_ptr, o, columns, rows, stride, BLOCK_R: tl.constexpr):
    """Some columns, summed over all rows; `while` since older interpreters cannot count up to a number."""
    b_sum = tl.zeros((BLOCK_R, o.shape[0]), tl.float32)
    start = 0
    while start < rows:
        o_r = start + tl.arange(0, BLOCK_R)
        b_sum += load(rows_ptr, o_r.to(tl.int64)[:, None] * stride + o[None, :], (o_r < rows)[:, None] & (o < columns))
        start += BLOCK_R
    tl.store(out_ptr + o, cast(tl.sum(b_sum, axis=0), out_ptr.dtype.element_ty), mask=o < columns)


@triton.jit
def linear_attention_block_finish_bwd_kernel(
    first_ptr,  # (1 + D, C) float32
    folded_ptr,  # (3·HD, C) float32
    gain_in_ptr, weight_qkv_ptr,  # (C,), (3·HD, C)
    dgain_in_ptr, dweight_qkv_ptr, dbias_ptr, dgain_ptr,
    C,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_C,)."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_gain_in = load(gain_in_ptr, o_c, m_c)
    b_sum = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for start in range(0, 3 * HEADS * D, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        o_tile, m_tile = o_j[:, None] * C + o_c[None, :], (o_j < 3 * HEADS * D)[:, None] & m_c[None, :]
        b_folded = load(folded_ptr, o_tile, m_tile)
        b_sum += b_folded * load(weight_qkv_ptr, o_tile, m_tile)
        b_dweight = cast(b_folded * b_gain_in[None, :], dweight_qkv_ptr.dtype.element_ty)
        tl.store(dweight_qkv_ptr + o_tile, b_dweight, mask=m_tile)
    tl.store(dgain_in_ptr + o_c, cast(tl.sum(b_sum, axis=0), dgain_in_ptr.dtype.element_ty), mask=m_c)
    tl.store(dgain_ptr + o_c, cast(load(first_ptr, o_c, m_c), dgain_ptr.dtype.element_ty), mask=m_c)
    o_d = tl.arange(0, BLOCK_D)
    # q̂ sums to one over a head's columns, so that the bias's gradient is the sum of dP over them.
    b_dp = load(first_ptr + C, o_d[:, None] * C + o_c[None, :], (o_d < D)[:, None] & m_c[None, :])
    tl.store(dbias_ptr + o_c, cast(tl.sum(b_dp, axis=0), dbias_ptr.dtype.element_ty), mask=m_c)


triton_launch.hash_functions(globals())
