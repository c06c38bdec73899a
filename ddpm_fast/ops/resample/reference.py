"""Resampling by 2 in plain torch, in the form of upstream: the specification and the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, taps: torch.Tensor | None = None
) -> torch.Tensor:
    """See `ddpm_fast.ops.resample.op.upsample_conv`."""
    with no_autocast(x.device.type):
        h = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(h, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)


def downsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `ddpm_fast.ops.resample.op.downsample_conv`."""
    with no_autocast(x.device.type):
        h = F.pixel_unshuffle(x, 2)  # channels ordered (channel, row, column), as the weight's (C, 2, 2)
        weight = weight.to(x.dtype).reshape(weight.shape[0], -1, 1, 1)
        return F.conv2d(h, weight, None if bias is None else bias.to(x.dtype))
