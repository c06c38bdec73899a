"""Forward diffusion and its loss in plain torch: the specification."""

from __future__ import annotations

import torch


def lookup(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Rows of a per-timestep table: (T, K), (B,) int64 → (B, K).

    A t outside [0, T) gives NaN and reads nothing outside the table. On CUDA that costs no synchronisation and does not
    poison the process as a device-side assertion would; on the CPU callers check the values first.
    """
    num_timesteps = table.shape[0]
    inside = (t >= 0) & (t < num_timesteps)
    rows = table[t.clamp(0, num_timesteps - 1)]
    return torch.where(inside[:, None], rows, float("nan"))


def _columns(table: torch.Tensor, t: torch.Tensor, ndim: int) -> tuple[torch.Tensor, ...]:
    """Each column of the rows at t, shaped (B, 1, ..., 1) to broadcast over `ndim` dimensions."""
    return tuple(column.reshape(-1, *(1,) * (ndim - 1)) for column in lookup(table, t).unbind(1))


def q_sample(x_start: torch.Tensor, t: torch.Tensor, table: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t = a·x0 + b·ε (Ho et al. 2020, eq. 4).

    Args:
        x_start: (B, ...) floating point.
        t: (B,) int64.
        table: (T, 2), columns a, b.
        noise: ε, shape of x_start.

    Returns:
        x_t, shape of x_start.
    """
    a, b = _columns(table, t, x_start.ndim)
    return a * x_start + b * noise


def diffusion_loss(
    model_output: torch.Tensor, x_start: torch.Tensor, t: torch.Tensor, table: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """w · mean((out − (c·ε + d·x0))²) of each sample (Ho et al. 2020, eq. 14, for every objective).

    Args:
        model_output: (B, ...), any floating point dtype; the loss is computed in float32 at least.
        x_start, noise: shape of model_output.
        t: (B,) int64.
        table: (T, 3), columns c, d, w.

    Returns:
        (B,) losses.
    """
    c, d, w = _columns(table, t, x_start.ndim)
    target = c * noise + d * x_start
    error = model_output.to(torch.promote_types(model_output.dtype, torch.float32)) - target
    return w.reshape(-1) * error.square().flatten(1).mean(dim=1)
