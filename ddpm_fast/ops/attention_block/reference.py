"""A block of softmax attention in plain torch: the specification and the oracle.

It computes in the dtype of x and ignores autocast, as the kernels do; float64 tensors give the truth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.ops.attention.reference import attention
from ddpm_fast.ops.common.reference import linear_residual, norm_linear
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
    out = attention(norm_linear(x, gain_in, weight_qkv), mem_kv, heads=heads)
    weight = weight.reshape(*weight.shape[:2], 1, 1)
    if residual is not None:
        return linear_residual(out, weight, bias, residual)
    with no_autocast(x.device.type):
        return F.conv2d(out, weight.to(x.dtype), bias.to(x.dtype))
