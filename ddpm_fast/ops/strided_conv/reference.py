"""3×3 convolutions of stride 2 in plain torch: the specification and the oracle; it runs on CUDA and in other
layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def strided_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, padding: int = 1
) -> torch.Tensor:
    """See `ddpm_fast.ops.strided_conv.op.strided_conv`."""
    with no_autocast(x.device.type):
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, stride=2, padding=padding)
