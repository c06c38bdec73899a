"""Triton kernels of linear_attention_block, and their launches: q, k, v are made from x in the kernels.

With W = weight_qkv·gain_in (3, HD, C), x̂ = x·√C / max(‖x‖₂, 1e-12) of every position, and HD = heads·D columns:

    q, k, v = x̂·Wᵀ      k̂ = exp(k − max) / sum over N positions and M memory entries
    sums = k̂ᵀ·x̂ over the positions      (HD, C), so that v is never made
    context = sums·Wvᵀ + the memory's k̂ᵀ·v      (D, D) per head      P = D^−½·context·weightᵀ      (HD, C)
    y = softmax(q)·P + bias      out = y / max(‖y‖₂, 1e-12)·√C·gain + residual

Forward is three launches: sums per chunk of positions with a running maximum, their merge with the memory, the rows.
Backward, with dS for the gradient of sums, u = grad·gain − ŷ·⟨grad·gain, ŷ⟩ / C and dy = u·√C / ‖y‖:

    dq̂ = dy·Pᵀ      dP = q̂ᵀ·dy      dcontext = D^−½·dP·weight      dS = dcontext·Wv
    δ = Σ sums·dS over c, and the memory's share      dk = k̂·(x̂·dSᵀ − δ)
    dx̂ = dq·Wq + dk·Wk + k̂·dS      dWq = dqᵀ·x̂      dWk = dkᵀ·x̂      dWv = dcontextᵀ·sums

It is a launch over rows for q, which adds the residual's gradient, one of small matrices, one over rows for k, which
adds to the dx of the first, and two that finish the parameters' gradients. So x is read twice forward and twice
backward, and no map but dx is written between. Sums over positions are made per chunk and then over chunks, without
atomics. Statistics and sums are float32; factors of products have the dtype of x.

The kernels are in triton_fwd.py and triton_bwd.py, what they share in triton_tile.py; launch.py chooses tiles.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.linear_attention.triton import kernel_precision
from ddpm_fast.ops.linear_attention_block.launch import Launch, choose_launch
from ddpm_fast.ops.linear_attention_block.triton_bwd import (
    linear_attention_block_finish_bwd_kernel,
    linear_attention_block_keys_bwd_kernel,
    linear_attention_block_queries_bwd_kernel,
    linear_attention_block_small_bwd_kernel,
    linear_attention_block_sums_bwd_kernel,
)
from ddpm_fast.ops.linear_attention_block.triton_fwd import (
    linear_attention_block_context_kernel,
    linear_attention_block_merge_kernel,
    linear_attention_block_rows_fwd_kernel,
)
from ddpm_fast.runtime import triton_launch


def linear_attention_block(
    x: torch.Tensor,  # (B, C, H, W), channels-last
    gain_in: torch.Tensor,  # C elements
    weight_qkv: torch.Tensor,  # (3·heads·D, C[, 1, 1])
    mem_kv: torch.Tensor,  # (2, heads, D, M)
    weight: torch.Tensor,  # (C, heads·D[, 1, 1])
    bias: torch.Tensor,  # (C,)
    gain: torch.Tensor,  # C elements
    residual: torch.Tensor | None,  # (B, C, H, W) or None
    heads: int,
    adds_x: bool,  # x is added to the output
) -> tuple[torch.Tensor, ...]:
    """Output, and for backward statistics (B, 2, HD), sums (B, HD, C), context (B, heads, D, D), P (B, HD, C)."""
    B, C, N, D, M = _sizes(x, mem_kv)
    launch = _launch_for(x, heads, D)
    chunks, HD = launch.chunks(N), heads * D
    out = torch.empty_like(x)
    partial = x.new_empty(B, chunks, HD, C, dtype=torch.float32)
    partial_statistics = x.new_empty(B, chunks, 2, HD, dtype=torch.float32)
    statistics = x.new_empty(B, 2, HD, dtype=torch.float32)
    sums = x.new_empty(B, HD, C, dtype=torch.float32)
    context = x.new_empty(B, heads, D, D, dtype=torch.float32)
    projection = x.new_empty(B, HD, C)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    gain_in, weight_qkv = gain_in.contiguous(), weight_qkv.contiguous()
    shared = {"HEADS": heads, "D": D, "PRECISION": kernel_precision()} | launch.sizes
    with torch.cuda.device_of(x):
        linear_attention_block_context_kernel[(B * chunks * launch.context.groups(heads),)](
            x, gain_in, weight_qkv, partial, partial_statistics, N, C, chunks, launch.context.tiles(launch.chunk),
            C**0.5, **shared, GROUPS=launch.context.groups(heads), **launch.context.constants,
        )  # fmt: skip
        linear_attention_block_merge_kernel[(B * heads, triton_launch.ceil_div(D, 16))](
            partial, partial_statistics, gain_in, weight_qkv, mem_kv.contiguous(), weight.contiguous(), statistics,
            sums, context, projection, C, chunks, D**-0.5, **shared, M=M, BLOCK_R=16, BLOCK_K=4, num_warps=4,
            num_stages=1,
        )  # fmt: skip
        programs = triton_launch.ceil_div(N, launch.span)
        linear_attention_block_rows_fwd_kernel[(B * programs,)](
            x, gain_in, weight_qkv, projection, bias.contiguous(), gain.contiguous(), residual, out, N, C, programs,
            launch.rows.tiles(launch.span), C**0.5, **shared, ADDS_X=adds_x, **launch.rows.constants,
        )  # fmt: skip
    return out, statistics, sums, context, projection


def linear_attention_block_backward(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    statistics: torch.Tensor,
    sums: torch.Tensor,
    context: torch.Tensor,
    projection: torch.Tensor,
    heads: int,
    adds_x: bool,
    grad2: torch.Tensor | None = None,  # of another reader of the output, with adds_x
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gain_in, weight_qkv, mem_kv, weight, bias and gain, each of its argument's shape and dtype."""
    B, C, N, D, M = _sizes(x, mem_kv)
    launch = _launch_for(x, heads, D)
    chunks, HD = launch.chunks(N), heads * D
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad2 = None if grad2 is None else grad2.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x)
    dgain_in, dweight_qkv, dmem_kv, dweight, dbias, dgain = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (gain_in, weight_qkv, mem_kv, weight, bias, gain)
    )
    gain_in, weight_qkv, gain = gain_in.contiguous(), weight_qkv.contiguous(), gain.contiguous()
    partial = x.new_empty(B, chunks, 2 * HD + 1, C, dtype=torch.float32)
    partial_keys = x.new_empty(B, chunks, HD, C, dtype=torch.float32)
    dsums, rows = torch.empty_like(projection), torch.empty_like(statistics)
    parameters = x.new_empty(B, 2 * HD * C + mem_kv.numel(), dtype=torch.float32)
    first, folded = x.new_empty(1 + D, C, dtype=torch.float32), x.new_empty(3 * HD, C, dtype=torch.float32)
    shared = {"HEADS": heads, "D": D, "PRECISION": kernel_precision()} | launch.sizes
    with torch.cuda.device_of(x):
        linear_attention_block_queries_bwd_kernel[(B * chunks,)](
            grad, x, dx, partial, gain_in, weight_qkv, projection, bias.contiguous(), gain, N, C, chunks,
            launch.queries.tiles(launch.chunk), C**0.5, **shared, **launch.queries.constants,
            ADDS_X=adds_x, grad2_ptr=grad2,
        )  # fmt: skip
        linear_attention_block_small_bwd_kernel[(B * heads,)](
            partial, statistics, sums, context, gain_in, weight_qkv, mem_kv.contiguous(), weight.contiguous(), dsums,
            rows, parameters, C, chunks, D**-0.5, **shared, M=M, num_warps=4, num_stages=1,
        )  # fmt: skip
        linear_attention_block_keys_bwd_kernel[(B * chunks,)](
            x, dx, partial_keys, gain_in, weight_qkv, statistics, dsums, rows, N, C, chunks,
            launch.keys.tiles(launch.chunk), C**0.5, **shared, **launch.keys.constants,
        )  # fmt: skip
        sums_blocks, finish_blocks = parameters_blocks(C, triton_launch.interpreted())
        columns = max((1 + D) * C, HD * C, 2 * HD * M)
        linear_attention_block_sums_bwd_kernel[(triton_launch.ceil_div(columns, sums_blocks["BLOCK"]), 6)](
            partial, partial_keys, parameters, first, folded, dweight, dmem_kv, B, C, chunks, HEADS=heads, D=D, M=M,
            **sums_blocks,
        )  # fmt: skip
        linear_attention_block_finish_bwd_kernel[(triton_launch.ceil_div(C, finish_blocks["BLOCK_C"]),)](
            first, folded, gain_in, weight_qkv, dgain_in, dweight_qkv, dbias, dgain, C, HEADS=heads, D=D,
            BLOCK_D=launch.block_d, **finish_blocks,
        )  # fmt: skip
    return dx, dgain_in, dweight_qkv, dmem_kv, dweight, dbias, dgain


def linear_attention_block_backward_of_readers(
    grad: torch.Tensor, grad2: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """As `linear_attention_block_backward`, with adds_x, of an output that two ops read."""
    return linear_attention_block_backward(grad, *arguments, True, grad2)


def parameters_blocks(C: int, interpreted: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """The blocks of the two kernels that finish the parameters' gradients: constants on a GPU, for all sizes.

    A program of sums has 8 KB of them on their way; eight channels are the 32 bytes that memory hands out at once.
    """
    if interpreted:
        return (
            {"BLOCK_R": 16, "BLOCK": 1024, "num_warps": 1},
            {"BLOCK_J": 128, "BLOCK_C": triton_launch.next_power_of_2(C), "num_warps": 1},
        )
    return {"BLOCK_R": 32, "BLOCK": 64, "num_warps": 4}, {"BLOCK_J": 128, "BLOCK_C": 8, "num_warps": 4}


def _launch_for(x: torch.Tensor, heads: int, D: int) -> Launch:
    _, C, H, W = x.shape
    return choose_launch(H * W, heads, D, C, interpreted=triton_launch.interpreted())


def _sizes(x: torch.Tensor, mem_kv: torch.Tensor) -> tuple[int, int, int, int, int]:
    """B, C, N, D, M."""
    B, C, H, W = x.shape
    return B, C, H * W, mem_kv.shape[2], mem_kv.shape[3]
