"""The convolution in plain torch: the specification and the oracle; it runs on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def stem_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, beside: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """See `ddpm_fast.ops.stem_conv.op.stem_conv`."""
    x = torch.cat((x, *beside), dim=1) if beside else x
    with no_autocast(x.device.type):
        bias = None if bias is None else bias.to(x.dtype)
        side = int(weight.shape[2])  # a tensor where torch 2.9 traces
        return F.conv2d(x, weight.to(x.dtype), bias, padding=side // 2)
