"""Softmax attention with memory in plain torch: the specification and the oracle, and torch's own fused kernel.

Both compute in the dtype of qkv and ignore autocast, as the kernels do; float64 tensors give the truth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def attention(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> torch.Tensor:
    """See `ddpm_fast.ops.attention.op.attention`."""
    with no_autocast(qkv.device.type):
        q, k, v = _split(qkv, mem_kv, heads)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)  # (B, heads, N, M + N)
        return _as_map(weights @ v, qkv)


def sdpa_attention(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> torch.Tensor:
    """The same by torch's scaled_dot_product_attention, which picks its kernel by device and dtype."""
    with no_autocast(qkv.device.type):
        return _as_map(F.scaled_dot_product_attention(*_split(qkv, mem_kv, heads)), qkv)


def _memory_format(qkv: torch.Tensor) -> torch.memory_format:
    channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _split(qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, heads, N, D), and k and v (B, heads, M + N, D) with the memory in front."""
    B, _, h, w = qkv.shape
    D = mem_kv.shape[3]
    if _memory_format(qkv) is torch.channels_last:  # in backward one copy puts the three gradients side by side
        parts = qkv.permute(0, 2, 3, 1).reshape(B, h * w, 3, heads, D).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
    else:
        q, k, v = qkv.reshape(B, 3, heads, D, h * w).transpose(-1, -2).unbind(1)
    if mem_kv.shape[2] == 0 and not mem_kv.requires_grad:
        return q, k, v
    mem_k, mem_v = mem_kv.to(qkv.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, M, D)
    return q, torch.cat((mem_k, k), dim=-2), torch.cat((mem_v, v), dim=-2)


def _as_map(out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:  # (B, heads, N, D) -> (B, heads·D, h, w)
    B, channels, h, w = qkv.shape
    out = out.transpose(-1, -2).reshape(B, channels // 3, h, w)
    return out.contiguous(memory_format=_memory_format(qkv))
