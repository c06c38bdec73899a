"""Forward diffusion and its loss in plain torch: the specification.

It computes in the widest of its inputs' dtypes, so that float64 tables and images give a truth to measure float32
against.
"""

from __future__ import annotations

import torch

from ddpm_fast.noise import epsilon
from ddpm_fast.ops.common.tables import lookup, widest_dtype


def _columns(table: torch.Tensor, t: torch.Tensor, ndim: int) -> tuple[torch.Tensor, ...]:
    """Each column of the rows at t, shaped (B, 1, ..., 1) to broadcast over `ndim` dimensions."""
    return tuple(column.reshape(-1, *(1,) * (ndim - 1)) for column in lookup(table, t).unbind(1))


def prepared_images(
    x_start: torch.Tensor, normalize: bool, flip: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x0 as the model sees it: 8-bit images divided by 255, mapped from [0, 1] to [−1, 1], flipped, each where asked.

    Args:
        x_start: (B, ...) uint8 or floating point.
        dtype: of the result where x_start is uint8 or `normalize` computes; else x_start stays as it is.
    """
    x = x_start
    if x.dtype == torch.uint8:
        x = x.to(dtype) / 255
    if normalize:
        x = x.to(dtype) * 2 - 1
    if flip is not None:
        x = torch.where((flip != 0).reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1), x)
    return x


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
    a, b = _columns(table, t, x_start.ndim)
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
    c, d, w = _columns(table, t, x_start.ndim)
    x = prepared_images(x_start, normalize, flip, wide)
    target = c * epsilon(x_start, noise, seed, offset_noise_strength, wide) + d * x
    error = model_output.to(torch.promote_types(model_output.dtype, torch.float32)) - target
    return w.reshape(-1) * error.square().flatten(1).mean(dim=1)
