"""Norms over the channels of a map."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_fast.models.stock import is_instance, parameter, stock
from ddpm_fast.ops.norm_silu.op import rms_norm_silu


@stock
class RMSNorm(nn.Module):
    """x / max(‖x‖₂, 1e-12) · g · √C over the channels (Zhang & Sennrich 2019, in upstream's form).

    Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = rms_norm_silu(x, self.g, activation=False)  # with the factor √C
        return out if self.scale == x.shape[1] ** 0.5 else out * (self.scale / x.shape[1] ** 0.5)


def is_rms_norm(module: object) -> bool:
    """True for an unmodified `RMSNorm` whose factor is √C."""
    return is_instance(module, RMSNorm) and module.scale == parameter(module, "g").numel() ** 0.5


def is_group_norm(module: object) -> bool:
    """True for an unmodified `nn.GroupNorm` with gain and offset."""
    return (
        is_instance(module, nn.GroupNorm)
        and parameter(module, "weight") is not None  # `None in (a tensor, …)` compares elements
        and parameter(module, "bias") is not None
    )


def make_norm(norm: str, dim: int, groups: int) -> nn.Module:
    """The norm of a residual block: "rms" is upstream's 2.x network, "group" its 1.x network."""
    return RMSNorm(dim) if norm == "rms" else nn.GroupNorm(groups, dim)
