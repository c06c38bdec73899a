"""Triton kernels of the gradients of the first convolution's output, where several ops read it.

    total = grad + grad2 + grad3      dbias = Σ total over all pixels

in one pass over the maps. The sum over pixels has two stages, chunks of pixels and then the sum over chunks, without
atomics. Maps are channels-last: rows of channels, one per pixel of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.runtime import triton_launch


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def stem_conv_bwd_sum_kernel(
    grad_ptr,  # (N, C); so are the others and total
    grad2_ptr,
    grad3_ptr,  # or None
    total_ptr,
    sums_ptr,  # (chunks, C) float32
    N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, C / BLOCK_C)."""
    i_chunk = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], (o_n < N)[:, None] & (o_c < C)[None, :]
        b_total = _load(grad_ptr, o_tile, m_tile) + _load(grad2_ptr, o_tile, m_tile)
        if grad3_ptr is not None:
            b_total += _load(grad3_ptr, o_tile, m_tile)
        b_total = cast(b_total, total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_tile, b_total, mask=m_tile)
        b_sums += b_total.to(tl.float32)
    tl.store(sums_ptr + i_chunk * C + o_c, tl.sum(b_sums, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=["chunks"])
def stem_conv_bwd_bias_kernel(
    sums_ptr,  # (chunks, C) float32
    out_ptr,  # (C,)
    chunks, C,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_C,)."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_sum += _load(sums_ptr, o_k[:, None] * C + o_c[None, :], (o_k < chunks)[:, None] & (o_c < C)[None, :])
    tl.store(out_ptr + o_c, cast(tl.sum(b_sum, axis=0), out_ptr.dtype.element_ty), mask=o_c < C)


def blocks_of_sums(C: int) -> dict[str, int]:
    """The blocks of stem_conv_bwd_sum_kernel."""
    return {"BLOCK_N": 32, "BLOCK_C": min(64, triton_launch.next_power_of_2(C)), "TILES": 8, "num_warps": 4}


# Those of stem_conv_bwd_bias_kernel; eight channels are the 32 bytes that memory hands out at once.
BIAS_BLOCKS = {"BLOCK_K": 128, "BLOCK_C": 8, "num_warps": 4}


def stem_conv_sum_of_gradients(
    grad: torch.Tensor,  # (B, C, H, W), so are the others
    grad2: torch.Tensor,
    grad3: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the gradients, channels-last, and its sum over all pixels (C,), both of grad's dtype."""
    grads = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (grad, grad2, grad3)]
    B, C, H, W = grad.shape
    N, blocks = B * H * W, blocks_of_sums(C)
    chunks = triton_launch.ceil_div(N, blocks["BLOCK_N"] * blocks["TILES"])
    total, dbias = torch.empty_like(grad, memory_format=torch.channels_last), grad.new_empty(C)
    sums = grad.new_empty((chunks, C), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        stem_conv_bwd_sum_kernel[(chunks, triton_launch.ceil_div(C, blocks["BLOCK_C"]))](
            *grads, total, sums, N, C, **blocks
        )
        stem_conv_bwd_bias_kernel[(triton_launch.ceil_div(C, BIAS_BLOCKS["BLOCK_C"]),)](
            sums, dbias, chunks, C, **BIAS_BLOCKS
        )
    return total, dbias


triton_launch.hash_functions(globals())
