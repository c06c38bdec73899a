"""Modules of torch itself, in any accelerated network."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.integrations.family import channels_last, fast, own_forward
from ddpm_fast.models.narrow_weights import narrow
from ddpm_fast.models.stock import keeps_size
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.runtime.autocast import to_autocast_dtype


def _why_not_conv3x3(module: Any) -> str | None:
    if not keeps_size(module, 3):
        return "it is no 3×3 convolution of stride 1 with zeros around"
    return "it has no bias" if module.bias is None else None


@fast("torch.nn.modules.conv.Conv2d", runs="conv3x3", refuses=_why_not_conv3x3)
def conv2d(module: Any, input: torch.Tensor) -> torch.Tensor:
    """`nn.Conv2d` of side 3 that keeps height and width: (B, C, H, W) → (B, K, H, W)."""
    if input.dim() != 4:
        return own_forward(module, input)
    (x,) = to_autocast_dtype(channels_last(input))
    return conv3x3(x, narrow(module, "weight"), narrow(module, "bias"))
