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

The kernels are in triton_fwd.py and triton_bwd.py, what they share in triton_tile.py; launch.py chooses tiles.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.linear_attention.launch import Launch, choose_launch, empty_output, output_format
from ddpm_fast.ops.linear_attention.triton_bwd import (
    linear_attention_kv_bwd_kernel,
    linear_attention_rows_bwd_kernel,
    linear_attention_small_bwd_kernel,
    linear_attention_sums_bwd_kernel,
)
from ddpm_fast.ops.linear_attention.triton_fwd import (
    linear_attention_context_kernel,
    linear_attention_merge_kernel,
    linear_attention_rows_fwd_kernel,
)
from ddpm_fast.runtime import triton_launch


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
        linear_attention_merge_kernel[(B * heads, triton_launch.ceil_div(D, 16))](
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
    blocks = triton_launch.ceil_div(D, launch.small_rows)
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
