"""A pre-activation block made of the ops of its steps, each with its own backend; it runs if no native block does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_linear.op import linear, linear_residual
from ddpm_fast.ops.norm_silu.op import group_norm_silu, group_norm_silu_beside
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.autocast import no_autocast


def preactivation_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    gain1: torch.Tensor,
    offset1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    gain2: torch.Tensor,
    offset2: torch.Tensor,
    *,
    groups1: int,
    groups2: int,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    skip: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None,
    res_bias: torch.Tensor | None = None,
    resample: str | None = None,
    output_scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.preactivation_block.op.preactivation_block`."""
    with no_autocast(x.device.type):
        x = x if skip is None else torch.cat((x, skip.to(x.dtype)), dim=1)
        h, x = group_norm_silu_beside(x, gain1, offset1, groups=groups1, eps=eps1)
        up = resample == "up"
        by_triton = triton_launch.why_not_triton(x.device) is None
        y = conv3x3(h if up else _resampled(h, resample), weight1, upsampled=up)
        if embedding is not None and not by_triton:
            y, embedding = y + embedding.to(y.dtype)[:, :, None, None], None
        options: dict[str, Any] = {
            "bias": _added(bias1, embedding),
            "scale": scale,
            "shift": shift,
            "dropout_p": dropout_p,
            "seed": seed,
        }
        h = group_norm_silu(y, gain2, offset2, groups=groups2, eps=eps2, **options)
        if by_triton and not up and res_weight is not None and res_weight.shape[2] == 1 and res_bias is not None:
            x = _resampled(x, resample)
            return linear_residual(x, res_weight, res_bias, conv3x3(h, weight2, bias2), scale=output_scale)
        out = conv3x3(h, weight2, bias2, residual=_residual(x, res_weight, res_bias, resample))
        return out if output_scale == 1.0 else out * output_scale


def _added(bias: torch.Tensor | None, embedding: torch.Tensor | None) -> torch.Tensor | None:
    """What the norm adds to the first convolution: (K,), or (B, K) where an embedding is part of it."""
    if bias is None or embedding is None:
        return embedding if bias is None else bias
    return embedding + bias


def _residual(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, resample: str | None
) -> torch.Tensor:
    """A 1×1 convolution is the same before nearest upsampling as after it, and cheaper."""
    if weight is None:
        return _resampled(x, resample)
    if weight.shape[2] == 1:
        if resample == "up":
            return _resampled(linear(x, weight, bias), resample)
        return linear(_resampled(x, resample), weight, bias)
    up = resample == "up"
    return conv3x3(x if up else _resampled(x, resample), weight, bias, upsampled=up)


def _resampled(x: torch.Tensor, resample: str | None) -> torch.Tensor:
    """The map at the block's output size."""
    if resample is None:
        return x
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else F.avg_pool2d(x, 2)
