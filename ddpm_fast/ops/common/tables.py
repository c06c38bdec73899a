"""Rows of per-timestep tables, and the dtype that plain torch computes with them in."""

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


def columns(table: torch.Tensor, t: torch.Tensor, ndim: int) -> tuple[torch.Tensor, ...]:
    """Each column of the rows at t, shaped (B, 1, ..., 1) to broadcast over `ndim` dimensions."""
    return tuple(column.reshape(-1, *(1,) * (ndim - 1)) for column in lookup(table, t).unbind(1))


def widest_dtype(table: torch.Tensor, *others: torch.Tensor | None) -> torch.dtype:
    """The widest dtype of the table and those others that are floating point."""
    dtype = table.dtype
    for tensor in others:
        if tensor is not None and tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
