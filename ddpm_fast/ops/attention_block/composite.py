"""Blocks of softmax attention made of the ops of its steps, each with its own backend."""

from __future__ import annotations

import torch

from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, norm_linear, norm_linear_beside
from ddpm_fast.ops.norm_silu.op import group_norm_silu_beside
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
    eps: float,
    order: str,
    residual: bool,
    output_scale: float,
) -> torch.Tensor:
    """See `ddpm_fast.ops.attention_block.op.group_norm_attention_block`."""
    with no_autocast(x.device.type):
        normed = x
        if gain is not None and offset is not None:
            normed, x = group_norm_silu_beside(x, gain, offset, groups=groups, eps=eps, activation=False)
        D = weight.shape[1] // heads
        weight_qkv = as_3hd(weight_qkv, heads, D, order).reshape(*weight_qkv.shape[:2], 1, 1)
        qkv = linear(normed, weight_qkv, None if bias_qkv is None else as_3hd(bias_qkv, heads, D, order))
        out = attention(qkv, x.new_empty(2, heads, 0, D), heads=heads)
        weight = weight.reshape(*weight.shape[:2], 1, 1)
        if residual and bias is not None:
            return linear_residual(out, weight, bias, x, scale=output_scale)
        out = linear(out, weight, bias)
        out = out + x if residual else out
        return out if output_scale == 1 else out * output_scale


def as_3hd(rows: torch.Tensor, heads: int, D: int, order: str) -> torch.Tensor:
    """Rows of the qkv convolution that are ordered as `order` says, in the order (3, heads, D)."""
    if order == "3hd":
        return rows
    sizes = {"3": 3, "h": heads, "d": D}
    cut = rows.reshape(*(sizes[letter] for letter in order), -1)
    return cut.permute(*(order.index(letter) for letter in "3hd"), 3).reshape(rows.shape)
