"""3×3 convolutions in plain torch: the specification and the oracle; it runs on CUDA and in other
layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    skip: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    upsampled: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.conv3x3.op.conv3x3`."""
    with no_autocast(x.device.type):
        dtype = x.dtype
        h = x if skip is None else torch.cat((x, skip.to(dtype)), dim=1)
        if upsampled:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        out = F.conv2d(h, weight.to(dtype), None if bias is None else bias.to(dtype), padding=1)
        return out if residual is None else (out + residual).to(dtype)
