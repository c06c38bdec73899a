"""A pre-activation residual block in plain torch: the specification and the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.ops.common.norm import group_norm_silu
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
        given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)

        def conv(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            bias = None if bias is None else bias.to(dtype)
            return F.conv2d(h, weight.to(dtype), bias, padding=weight.shape[2] // 2)

        x = x.to(dtype) if skip is None else torch.cat((x.to(dtype), skip.to(dtype)), dim=1)
        h = group_norm_silu(x, gain1, offset1, groups=groups1, eps=eps1)
        y = conv(_resampled(h, resample), weight1, bias1)
        if embedding is not None:
            y = y + embedding.to(dtype)[:, :, None, None]
        options: dict[str, Any] = {"scale": scale, "shift": shift, "dropout_p": dropout_p, "seed": seed}
        h = group_norm_silu(y, gain2, offset2, groups=groups2, eps=eps2, **options)
        residual = _resampled(x, resample)
        residual = residual if res_weight is None else conv(residual, res_weight, res_bias)
        return ((residual + conv(h, weight2, bias2)) * output_scale).to(given)


def _resampled(x: torch.Tensor, resample: str | None) -> torch.Tensor:
    """Each pixel as 2×2 ("up"), means of 2×2 ("down", an odd last row or column is left out), or x itself."""
    if resample is None:
        return x
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else F.avg_pool2d(x, 2)
