"""Embeddings of the timestep, and their projections for the residual blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ddpm_fast.models.stock import parameter
from ddpm_fast.ops.norm_linear.op import linears
from ddpm_fast.runtime.autocast import to_autocast_dtype


class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5): (B,) → (B, dim), float32."""

    def __init__(self, dim: int, theta: float = 10000):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4 for a sinusoidal embedding, got {dim}")
        self.dim = dim
        self.theta = theta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half_dim = self.dim // 2
        exponent = math.log(self.theta) / (half_dim - 1)
        frequencies = torch.exp(torch.arange(half_dim, device=x.device) * -exponent)
        angles = x[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RandomOrLearnedSinusoidalPosEmb(nn.Module):
    """Fourier features with random or learned frequencies (Tancik et al. 2020): (B,) → (B, dim + 1)."""

    def __init__(self, dim: int, is_random: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"learned_sinusoidal_dim must be even and at least 2, got {dim}")
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=not is_random)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        angles = x * self.weights[None, :] * 2 * math.pi
        return torch.cat((x, angles.sin(), angles.cos()), dim=-1)


def linears_of_one_input(x: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """The outputs of linear layers with bias side by side, (B, D) → (B, sum of their out_features), as one product."""
    weights = [parameter(layer, "weight") for layer in layers]
    return linears(*to_autocast_dtype(x), weights, [parameter(layer, "bias") for layer in layers])
