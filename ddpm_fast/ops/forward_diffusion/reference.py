"""Forward diffusion and its loss in plain torch: the specification.

It computes in the widest of its inputs' dtypes, so that float64 tables and images give a truth to measure float32
against.
"""

from __future__ import annotations

import torch

from ddpm_fast.noise import epsilon
from ddpm_fast.ops.common.reference import prepared_images
from ddpm_fast.ops.common.tables import columns, widest_dtype


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.forward_diffusion.op.q_sample`."""
    wide = widest_dtype(table, x_start, noise)
    a, b = columns(table, t, x_start.ndim)
    x = prepared_images(x_start, normalize, flip, wide)
    x_t = (a * x + b * epsilon(x_start, noise, seed, offset_noise_strength, wide)).to(dtype or wide)
    return x_t if memory_format is None else x_t.contiguous(memory_format=memory_format)


def diffusion_loss(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
) -> torch.Tensor:
    """See `ddpm_fast.ops.forward_diffusion.op.diffusion_loss`."""
    wide = widest_dtype(table, x_start, noise)
    c, d, w = columns(table, t, x_start.ndim)
    x = prepared_images(x_start, normalize, flip, wide)
    target = c * epsilon(x_start, noise, seed, offset_noise_strength, wide) + d * x
    error = model_output.to(torch.promote_types(model_output.dtype, torch.float32)) - target
    return w.reshape(-1) * error.square().flatten(1).mean(dim=1)
