"""A block of linear attention made of the ops of its steps, each with its own backend."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.norm_linear.op import norm_linear, norm_linear_beside


def linear_attention_block(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.linear_attention_block.op.linear_attention_block`.

    With `recompute` only the arguments are kept, and backward runs the block again.
    """
    tensors = (x, residual, gain_in, weight_qkv, mem_kv, weight, bias, gain)
    if recompute and torch.is_grad_enabled():
        return checkpoint(_steps, *tensors, heads, use_reentrant=False, preserve_rng_state=False)
    return _steps(*tensors, heads)


def _steps(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    weight_qkv = weight_qkv.reshape(*weight_qkv.shape[:2], 1, 1)
    if residual is x:
        qkv, residual = norm_linear_beside(x, gain_in, weight_qkv)
    else:
        qkv = norm_linear(x, gain_in, weight_qkv)
    return linear_attention(qkv, mem_kv, weight, bias, gain, heads=heads, residual=residual)
