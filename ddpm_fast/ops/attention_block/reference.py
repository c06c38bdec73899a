"""Blocks of softmax attention in plain torch: the specification and the oracle.

It computes in the dtype of x and ignores autocast, as the kernels do; float64 tensors give the truth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.ops.attention.reference import attention
from ddpm_fast.ops.common.norm import group_norm_silu
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


def group_norm_attention_block(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    weight_qkv: torch.Tensor,
    bias_qkv: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    groups: int,
    heads: int,
    eps: float = 1e-5,
    order: str = "3hd",
    residual: bool = True,
    output_scale: float = 1.0,
) -> torch.Tensor:
    """See `ddpm_fast.ops.attention_block.op.group_norm_attention_block`."""
    B, C, h, w = x.shape
    hidden, letters = weight.shape[1], dict(zip("3hd", (3, heads, weight.shape[1] // heads), strict=True))
    with no_autocast(x.device.type):
        normed = x
        if gain is not None and offset is not None:
            normed = group_norm_silu(x, gain, offset, groups=groups, eps=eps, activation=False)
        qkv = _convolution(normed, weight_qkv, bias_qkv).reshape(B, *(letters[letter] for letter in order), h * w)
        q, k, v = qkv.permute(1 + order.index("3"), 0, 1 + order.index("h"), 4, 1 + order.index("d"))  # (B, h, N, D)
        shares = ((q * letters["d"] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)  # (B, heads, N, N)
        out = (shares @ v).transpose(-1, -2).reshape(B, hidden, h, w)
        out = _convolution(out, weight, bias)
        out = (out + x if residual else out) * output_scale
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = weight.reshape(*weight.shape[:2], 1, 1)
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
