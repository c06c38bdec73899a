"""Norm, scale and shift, SiLU, dropout and residual in plain torch, shared by the references.

It computes in float32 or float64: float64 tensors give the truth for float32, and half types round once, at the end, as
in the kernels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from ddpm_fast import noise
from ddpm_fast.noise import STREAM_DROPOUT


def rms_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_silu.op.rms_norm_silu`."""
    v = _with_bias(x, bias)
    y = F.normalize(v, dim=1) * (_per_channel(gain, v) * v.shape[1] ** 0.5)
    return _after_norm(y, scale, shift, residual, activation, dropout_p, seed).to(x.dtype)


def group_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_silu.op.group_norm_silu`."""
    v = _with_bias(x, bias)
    y = torch.group_norm(v, groups, gain.to(v.dtype).flatten(), offset.to(v.dtype), eps)
    if v.stride(1) == 1:
        # A copy on CUDA alone, and while torch.compile traces: torch's fake output is NCHW on every device.
        y = y.contiguous(memory_format=torch.channels_last)
    return _after_norm(y, scale, shift, residual, activation, dropout_p, seed).to(x.dtype)


def keep_mask(shape: torch.Size, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """Which elements dropout keeps, a function of the seed: bool of `shape`, (B, ...).

    Element 4k + i of sample b is kept where word i of Philox with counter (k, b, 0, STREAM_DROPOUT) is at least p·2³².
    """
    batch, elements = shape[0], shape[1:].numel()
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)  # (K,)
    sample = torch.arange(batch, dtype=torch.int64, device=seed.device)[:, None]  # (B, 1)
    stream = torch.full((), STREAM_DROPOUT, dtype=torch.int64, device=seed.device)
    mask32 = 2**32 - 1
    counter = (block, sample, torch.zeros_like(stream), stream)
    words = noise.philox4x32(counter, (seed & mask32, (seed >> 32) & mask32))
    drawn = torch.stack([word.expand(batch, block.numel()) for word in words], dim=-1)  # (B, K, 4)
    return (drawn.reshape(batch, -1)[:, :elements] >= round(dropout_p * 2**32)).reshape(shape)


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    v = x.to(torch.promote_types(x.dtype, torch.float32))
    return v if bias is None else v + _per_channel(bias, v)


def _per_channel(vector: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return vector.to(v.dtype).reshape(-1, v.shape[1], 1, 1)


def _after_norm(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    if scale is not None:
        y = y * (scale.to(y.dtype)[:, :, None, None] + 1)
    if shift is not None:
        y = y + shift.to(y.dtype)[:, :, None, None]
    if activation:
        y = F.silu(y)
    if dropout_p > 0:
        keep = keep_mask(y.shape, dropout_p, cast("torch.Tensor", seed))  # see `check_seed`
        y = torch.where(keep, y, 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return y if residual is None else y + residual.to(y.dtype)
