"""Linear attention's tail in plain torch: the specification and the oracle; it runs on the CPU without native code.

Products are in the dtype of qkv and ignore autocast; the norm computes in float32 or float64. float64 tensors give the
truth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.ops.linear_attention.launch import has_channels_last_output
from ddpm_fast.runtime.autocast import no_autocast


def context_and_queries(qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of linear attention (Shen et al. 2021, eq. 4), in the dtype of qkv.

    Returns:
        The context of keys and values, scaled, (B, heads, D, E), and softmax of the queries, (B, heads, D, N).
    """
    B, channels, H, W = qkv.shape
    D = channels // (3 * heads)
    q, k, v = qkv.reshape(B, 3, heads, D, H * W).unbind(1)  # (B, heads, D, N)
    mem_k, mem_v = mem_kv.to(qkv.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
    k = torch.cat((mem_k, k), dim=-1).softmax(dim=-1)
    v = torch.cat((mem_v, v), dim=-1)
    # The scale belongs to q, but the context is small: scaling it keeps one map less for backward.
    return (k @ v.transpose(-1, -2)) * D**-0.5, q.softmax(dim=-2)


def linear_attention(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.linear_attention.op.linear_attention`."""
    with no_autocast(qkv.device.type):
        B, _, H, W = qkv.shape
        C, dtype = weight.shape[0], qkv.dtype
        context, q = context_and_queries(qkv, mem_kv, heads)
        # The output projection is folded into the context: the map between the two never exists.
        weight = weight.to(dtype).reshape(C, heads, -1).permute(1, 2, 0)  # (heads, E, C)
        projection = (context @ weight).flatten(1, 2)  # (B, HD, C)
        q = q.flatten(1, 2)  # (B, HD, N)
        if has_channels_last_output(qkv):
            y = torch.baddbmm(bias.to(projection.dtype), q.transpose(1, 2), projection).transpose(1, 2)
        else:
            y = torch.baddbmm(bias.to(projection.dtype)[:, None], projection.transpose(1, 2), q)
        y = y.reshape(B, C, H, W)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        out = F.normalize(y, dim=1) * (gain.to(y.dtype).reshape(1, C, 1, 1) * C**0.5)
        return (out if residual is None else out + residual.to(y.dtype)).to(dtype)
