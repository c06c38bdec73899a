"""The second stage of both norms' sums: the gradients of all arguments per channel."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.ops.norm_silu.triton_tile import load, sums_of
from ddpm_fast.runtime import triton_launch


@triton.jit(do_not_specialize=["B", "chunks", "scaled", "last_chunks"])
def norm_silu_bwd_rows_kernel(
    sums_ptr,  # (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of a chunk's pixels
    gain_ptr,  # (C,)
    offset_ptr,  # (C,) or None
    scale_ptr,  # (B, C), or None; any pointer for samples from `scaled` on, and so are dscale_ptr and dshift_ptr
    dgain_ptr,  # (C,)
    doffset_ptr,  # (C,) or None
    dbias_ptr,  # (C,), or (B, C) with BIAS_ROWS, or None
    dscale_ptr,  # (B, C) or None
    dshift_ptr,  # (B, C) or None
    last_sums_ptr,  # (B, last_chunks, 2 or 3, C) float32 of another norm, without scale and shift, or None
    last_dgain_ptr,  # its gradients, of the types of this norm's
    last_doffset_ptr,
    last_dbias_ptr,
    B, C, chunks, stride_scale, last_chunks,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, scaled=2**31 - 1,
    BIAS_ROWS: tl.constexpr = False,
):  # fmt: skip
    """The gradients of all arguments per channel, each written once; grid (C / BLOCK_C, norms).

    One program has a few channels of all samples and chunks of a norm. It loops by `while`, since the interpreters of
    Triton 3.5 and 3.6 cannot count up to an argument. A sample's sums depend on its chunks alone.
    """
    if last_sums_ptr is not None:
        is_last = tl.program_id(1) == 1
        chunks, scaled = tl.where(is_last, last_chunks, chunks), tl.where(is_last, 0, scaled)
        if is_last:
            sums_ptr, dgain_ptr = last_sums_ptr, last_dgain_ptr
            if doffset_ptr is not None:
                doffset_ptr = last_doffset_ptr
            if dbias_ptr is not None:
                dbias_ptr = last_dbias_ptr
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_gain = load(gain_ptr, o_c, m_c)
    b_dgain = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_doffset = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_start = 0
    while b_start < B:
        o_b = b_start + tl.arange(0, BLOCK_B)
        b_sum_dy = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        b_sum_dy_normed = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        if BIAS_ROWS:
            b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        k_start = 0
        while k_start < chunks:
            o_k = k_start + tl.arange(0, BLOCK_K)
            mask = ((o_b < B)[:, None] & (o_k < chunks)[None, :])[:, :, None] & m_c[None, None, :]
            o_chunk = o_b[:, None] * chunks + o_k[None, :]
            o_sums = sums_of(o_chunk, dbias_ptr, C)[:, :, None] + o_c[None, None, :]
            b_sum_dy += tl.sum(load(sums_ptr, o_sums, mask), axis=1)
            b_sum_dy_normed += tl.sum(load(sums_ptr, o_sums + C, mask), axis=1)
            if dbias_ptr is not None:
                b_dbias += tl.sum(load(sums_ptr, o_sums + 2 * C, mask), axis=1)
            k_start += BLOCK_K
        o_row = o_b[:, None] * C + o_c[None, :]
        b_factor = tl.full((BLOCK_B, BLOCK_C), 1.0, tl.float32)
        m_scaled = (o_b < tl.minimum(B, scaled))[:, None] & m_c[None, :]
        if scale_ptr is not None:
            b_factor += load(scale_ptr, o_b[:, None] * stride_scale + o_c[None, :], m_scaled)
            b_dscale = b_sum_dy_normed * b_gain[None, :]
            if offset_ptr is not None:
                b_dscale += b_sum_dy * load(offset_ptr, o_c, m_c)[None, :]
            tl.store(dscale_ptr + o_row, cast(b_dscale, dscale_ptr.dtype.element_ty), mask=m_scaled)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + o_row, cast(b_sum_dy, dshift_ptr.dtype.element_ty), mask=m_scaled)
        if BIAS_ROWS:
            m_row = (o_b < B)[:, None] & m_c[None, :]
            tl.store(dbias_ptr + o_row, cast(b_dbias, dbias_ptr.dtype.element_ty), mask=m_row)
        b_dgain += b_sum_dy_normed * b_factor
        b_doffset += b_sum_dy * b_factor
        b_start += BLOCK_B
    tl.store(dgain_ptr + o_c, cast(tl.sum(b_dgain, axis=0), dgain_ptr.dtype.element_ty), mask=m_c)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + o_c, cast(tl.sum(b_doffset, axis=0), doffset_ptr.dtype.element_ty), mask=m_c)
    if dbias_ptr is not None and not BIAS_ROWS:
        tl.store(dbias_ptr + o_c, cast(tl.sum(b_dbias, axis=0), dbias_ptr.dtype.element_ty), mask=m_c)


triton_launch.hash_functions(globals())
