"""Attention blocks: one op with the weights of their modules, or their modules one after another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast.models.narrow_weights import Group, narrow
from ddpm_fast.models.norm import RMSNorm, is_rms_norm
from ddpm_fast.models.stock import calls_every_module, is_convolution, is_instance, parameter, stock, why_by_modules
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import unchecked_attention_block
from ddpm_fast.ops.linear_attention_block.op import unchecked_linear_attention_block
from ddpm_fast.runtime.autocast import to_autocast_dtype


@stock
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
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)

    def compute(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """Attention of x plus `residual`; a network calls it where the module itself is unmodified.

        Args:
            norm: the norm of x where the module has none of its own; the caller has asked `is_fused`.
        """
        modules: dict[str, Any] = self._modules  # see `parameter`
        if norm is None:
            norm = modules["norm"]
            if not self.is_fused():
                out = self._by_modules(x)
                return out if residual is None else out + residual
        conv, norm_out = modules["to_out"]._modules.values()
        return unchecked_linear_attention_block(
            *to_autocast_dtype(x), parameter(norm, "g"), parameter(modules["to_qkv"], "weight"),
            parameter(self, "mem_kv"), parameter(conv, "weight"), parameter(conv, "bias"), parameter(norm_out, "g"),
            heads=self.heads, residual=residual, recompute=self.low_memory,
        )  # fmt: skip

    def is_fused(self, norm: nn.Module | None = None) -> bool:
        """True if norm and modules may be computed from their weights as one op; None is the module's own norm."""
        if calls_every_module() or not is_rms_norm(self._modules["norm"] if norm is None else norm):
            return False
        return self._fits_the_op()

    def _fits_the_op(self) -> bool:
        modules: dict[str, Any] = self._modules
        to_out = modules["to_out"]
        if not is_instance(to_out, nn.Sequential) or len(to_out) != 2:
            return False
        conv, norm_out = to_out._modules.values()
        return (
            is_convolution(modules["to_qkv"], 1, bias=False)
            and is_convolution(conv, 1)
            and is_rms_norm(norm_out)
            and self.scale == parameter(self, "mem_kv").shape[2] ** -0.5
        )

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_qkv(self.norm(x))

    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self._steps, x, use_reentrant=False, preserve_rng_state=False)
        return self._steps(x)

    def _steps(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        q, k, v = self._qkv(x).reshape(B, 3, self.heads, -1, H * W).unbind(1)  # (B, heads, D, N)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
        k, v = torch.cat((mem_k, k), dim=-1).softmax(dim=-1), torch.cat((mem_v, v), dim=-1)
        context = (k @ v.transpose(-1, -2)) * self.scale  # (B, heads, D, E)
        return self.to_out((context.transpose(-1, -2) @ q.softmax(dim=-2)).reshape(B, -1, H, W))

    def why_by_modules(self) -> str | None:
        """Why the module calls its modules one after another, in one clause; None where it is one op."""
        return None if self.is_fused() else why_by_modules(self)


@stock
class Attend(nn.Module):
    """softmax(q·kᵀ·scale)·v with dropout of the weights (Vaswani et al. 2017, eq. 1); scale is D^−½ if None.

    Shapes: q (B, heads, N, D), k and v (B, heads, M + N, D) → (B, heads, N, D). `Attention` calls it only where it was
    changed; `flash` is kept for upstream's signature.
    """

    def __init__(self, dropout: float = 0.0, flash: bool = False, scale: float | None = None):
        super().__init__()
        self.dropout = dropout
        self.scale = scale
        self.attn_dropout = nn.Dropout(dropout)
        self.flash = flash

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if is_instance(self.attn_dropout, nn.Dropout) and not _is_active(self.attn_dropout):
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return self.attn_dropout(((q @ k.transpose(-1, -2)) * scale).softmax(dim=-1)) @ v


def _is_active(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


@stock
class Attention(nn.Module):
    """Softmax attention over all positions, with learned memory keys and values (Vaswani et al. 2017, eq. 1).

    `flash` is kept for upstream's signature: which kernel runs does not depend on it. Shapes: (B, C, H, W) →
    (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, flash: bool = False):
        super().__init__()
        self.heads = heads
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.attend = Attend(flash=flash)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)

    def compute(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """See `LinearAttention.compute`."""
        modules: dict[str, Any] = self._modules  # see `parameter`
        if norm is None:
            norm = modules["norm"]
            if not self.is_fused():
                out = self._by_modules(x)
                return out if residual is None else out + residual
        to_out = modules["to_out"]
        return unchecked_attention_block(
            *to_autocast_dtype(x), parameter(norm, "g"), parameter(modules["to_qkv"], "weight"),
            parameter(self, "mem_kv"), narrow(to_out, "weight"), narrow(to_out, "bias"),
            heads=self.heads, residual=residual,
        )  # fmt: skip

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`; the other weights' products read float32 and round it once, with the gain."""
        to_out: Any = self._modules["to_out"]
        return [(parameter(to_out, "weight"),), (parameter(to_out, "bias"),)] if self._fits_the_op() else []

    def is_fused(self, norm: nn.Module | None = None) -> bool:
        """See `LinearAttention.is_fused`."""
        if calls_every_module() or not is_rms_norm(self._modules["norm"] if norm is None else norm):
            return False
        return self._fits_the_op()

    def _fits_the_op(self) -> bool:
        modules: dict[str, Any] = self._modules
        return (
            is_convolution(modules["to_qkv"], 1, bias=False)
            and is_convolution(modules["to_out"], 1)
            and self._attends_as_the_op()
        )

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_qkv(self.norm(x))

    def _attends_as_the_op(self) -> bool:
        attend: Any = self._modules["attend"]
        if not is_instance(attend, Attend) or attend.scale is not None:
            return False
        dropout: Any = attend._modules["attn_dropout"]
        return is_instance(dropout, nn.Dropout) and not _is_active(dropout)

    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self._qkv(x)
        if self._attends_as_the_op() and not calls_every_module():
            return self.to_out(attention(qkv, self.mem_kv, heads=self.heads))
        B, _, H, W = x.shape
        q, k, v = qkv.reshape(B, 3, self.heads, -1, H * W).transpose(-1, -2).unbind(1)  # (B, heads, N, D)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, M, D)
        out = self._attend(q, torch.cat((mem_k, k), dim=-2), torch.cat((mem_v, v), dim=-2))
        return self.to_out(out.transpose(-1, -2).reshape(B, -1, H, W))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, v)

    def why_by_modules(self) -> str | None:
        """Why the module calls its modules one after another, in one clause; None where it is one op."""
        return None if self.is_fused() else why_by_modules(self)
