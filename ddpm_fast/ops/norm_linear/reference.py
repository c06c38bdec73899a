"""RMSNorm and 1×1 convolutions in plain torch; ops/common has the formulas that other ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ddpm_fast.ops.common.reference import linear_residual, norm_linear
from ddpm_fast.runtime.autocast import no_autocast

__all__ = ["linear", "linear_residual", "linears", "norm_linear"]


def linear(maps: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_linear.op.linear`."""
    x = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
    with no_autocast(x.device.type):
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_linear.op.linears`."""
    with no_autocast(x.device.type):
        return torch.addmm(torch.cat(tuple(biases)).to(x.dtype), x, torch.cat(tuple(weights)).to(x.dtype).t())
