"""The universal sampler update in torch only: the specification and the oracle.

It computes in the dtype of x, so that float64 tensors give a truth to measure float32 against. Nothing here reads a
value on the host: a step outside the table gives NaN, and what a zero coefficient multiplies cannot spoil the result.
"""

from __future__ import annotations

import torch

from ddpm_fast import noise as noise_function
from ddpm_fast.noise import STREAM_STEP


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start_previous: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ddpm_fast.ops.sampler_step.op.sampler_step`."""
    p, q, r, s, u, sigma = table_row(table, step).to(x.dtype)
    x_start = p * x + q * model_output.to(x.dtype)
    if clip_x_start:
        x_start = x_start.clamp(-1, 1)
    if x_start_previous is None:
        x_start_previous = torch.full_like(x, float("nan"))
    if noise is None:
        noise = noise_function.normal(
            x.shape, seed=seed, stream=stream, step=step, start_index=start_index, device=x.device, dtype=x.dtype
        )
    x_next = r * x_start + s * x + scaled(u, x_start_previous) + scaled(sigma, noise)
    return x_next, x_start


def sampler_step_(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
) -> torch.Tensor:
    """See `ddpm_fast.ops.sampler_step.op.sampler_step_`."""
    x_next, new_x_start = sampler_step(
        x,
        model_output,
        table,
        step,
        seed,
        x_start_previous=x_start,
        noise=noise,
        clip_x_start=clip_x_start,
        start_index=start_index,
        stream=stream,
    )
    if x_start is not None:
        x_start.copy_(new_x_start)
    return x.copy_(x_next)


def table_row(table: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Row `step` of the table, NaN where it has none.

    Returns:
        (6,) in the table's dtype.
    """
    rows = table.shape[0]
    step = step.reshape(1)
    row = table.index_select(0, step.clamp(0, rows - 1))[0]  # (6,)
    return torch.where((step >= 0) & (step < rows), row, float("nan"))


def scaled(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """coefficient · tensor, and 0 if the coefficient is 0, even if the tensor holds NaN."""
    return torch.where(coefficient == 0, 0.0, coefficient * tensor)
