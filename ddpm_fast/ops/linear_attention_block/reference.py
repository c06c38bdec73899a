"""A block of linear attention in plain torch: the specification and the oracle."""

from __future__ import annotations

import torch

from ddpm_fast.ops.common.reference import norm_linear
from ddpm_fast.ops.linear_attention.reference import linear_attention


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
    """See `ddpm_fast.ops.linear_attention_block.op.linear_attention_block`."""
    qkv = norm_linear(x, gain_in, weight_qkv)
    return linear_attention(qkv, mem_kv, weight, bias, gain, heads=heads, residual=residual)
