"""Attention blocks: one op with the weights of their modules, or their modules one after another."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast.models.norm import RMSNorm
from ddpm_fast.models.stock import is_unmodified, parameter
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import unchecked_attention_block
from ddpm_fast.ops.linear_attention_block.op import unchecked_linear_attention_block
from ddpm_fast.runtime.autocast import to_autocast_dtype


class LinearAttention(nn.Module):
    """Linear attention with learned memory keys and values (Shen et al. 2021, "Efficient Attention").

    Softmax over the head dimension for q and over positions for k. Shapes: (B, C, H, W) → (B, C, H, W). With
    `low_memory` no map but x is kept for backward, which runs the forward again.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, low_memory: bool = False):
        super().__init__()
        self.low_memory = low_memory
        self.scale = dim_head**-0.5
        self.heads = heads
        self.dim_head = dim_head
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        modules = self._modules  # see `parameter`
        norm, to_qkv, to_out = modules["norm"], modules["to_qkv"], modules["to_out"]
        projection = tuple(to_out._modules.values())
        if len(projection) != 2 or not is_unmodified(norm, to_qkv, to_out, *projection):
            out = self._by_modules(x)
            return out if residual is None else out + residual
        conv, norm_out = projection
        return unchecked_linear_attention_block(
            *to_autocast_dtype(x), parameter(norm, "g"), parameter(to_qkv, "weight"), parameter(self, "mem_kv"),
            parameter(conv, "weight"), parameter(conv, "bias"), parameter(norm_out, "g"),
            heads=self.heads, residual=residual, recompute=self.low_memory,
        )  # fmt: skip

    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self._steps, x, use_reentrant=False, preserve_rng_state=False)
        return self._steps(x)

    def _steps(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, self.dim_head, H * W).unbind(1)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
        k, v = torch.cat((mem_k, k), dim=-1).softmax(dim=-1), torch.cat((mem_v, v), dim=-1)
        context = (k @ v.transpose(-1, -2)) * self.scale  # (B, heads, D, E)
        return self.to_out((context.transpose(-1, -2) @ q.softmax(dim=-2)).reshape(B, -1, H, W))


class Attention(nn.Module):
    """Softmax attention over all positions, with learned memory keys and values (Vaswani et al. 2017, eq. 1).

    `flash` is kept for upstream's signature: which kernel runs does not depend on it. Shapes: (B, C, H, W) →
    (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, flash: bool = False):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.flash = flash
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        modules = self._modules  # see `parameter`
        norm, to_qkv, to_out = modules["norm"], modules["to_qkv"], modules["to_out"]
        if not is_unmodified(norm, to_qkv, to_out):
            out = self.to_out(attention(self.to_qkv(self.norm(x)), self.mem_kv, heads=self.heads))
            return out if residual is None else out + residual
        return unchecked_attention_block(
            *to_autocast_dtype(x), parameter(norm, "g"), parameter(to_qkv, "weight"), parameter(self, "mem_kv"),
            parameter(to_out, "weight"), parameter(to_out, "bias"), heads=self.heads, residual=residual,
        )  # fmt: skip
