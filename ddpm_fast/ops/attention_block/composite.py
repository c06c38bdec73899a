"""A block of softmax attention made of the ops of its steps, each with its own backend."""

from __future__ import annotations

import torch

from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, norm_linear, norm_linear_beside
from ddpm_fast.runtime.autocast import no_autocast


def attention_block(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.attention_block.op.attention_block`."""
    with no_autocast(x.device.type):
        weight_qkv = weight_qkv.reshape(*weight_qkv.shape[:2], 1, 1)
        if residual is x:
            qkv, residual = norm_linear_beside(x, gain_in, weight_qkv)
        else:
            qkv = norm_linear(x, gain_in, weight_qkv)
        out = attention(qkv, mem_kv, heads=heads)
        weight = weight.reshape(*weight.shape[:2], 1, 1)
        return linear(out, weight, bias) if residual is None else linear_residual(out, weight, bias, residual)
