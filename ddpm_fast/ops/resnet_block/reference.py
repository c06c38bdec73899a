"""A residual block in plain torch: the specification and the oracle."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from ddpm_fast.ops.common.norm import group_norm_silu, rms_norm_silu
from ddpm_fast.runtime.autocast import no_autocast


def resnet_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    gain1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain2: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    offset1: torch.Tensor | None = None,
    offset2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None,
    res_bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.resnet_block.op.resnet_block`."""
    with no_autocast(x.device.type):
        dtype = torch.promote_types(x.dtype, torch.float32)

        def wide(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype)

        def wide_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
            return None if bias is None else wide(bias)

        def norm(y: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor | None, **options: Any) -> torch.Tensor:
            if groups == 0:
                return rms_norm_silu(y, gain, **options)
            offset = cast("torch.Tensor", offset)  # GroupNorm has one
            return group_norm_silu(y, gain, offset, groups=groups, eps=eps, **options)

        h = wide(x) if x_bias is None else wide(x) + wide(x_bias)[:, None, None]
        h = h if skip is None else torch.cat((h, wide(skip)), dim=1)
        residual = h if res_weight is None else F.conv2d(h, wide(res_weight), wide_bias(res_bias))
        y = F.conv2d(h, wide(weight1), wide(bias1), padding=1)
        y = norm(y, gain1, offset1, scale=scale, shift=shift, dropout_p=dropout_p, seed=seed)
        y = F.conv2d(y, wide(weight2), wide(bias2), padding=1)
        out = norm(y, gain2, offset2, residual=residual)
        return (out if out_weight is None else F.conv2d(out, wide(out_weight), wide_bias(out_bias))).to(x.dtype)
