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
    x_start_previous2: torch.Tensor | None = None,
    x_start_previous3: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ddpm_fast.ops.sampler_step.op.sampler_step`."""
    p, q, r, s, u, sigma, u2, u3, lo, hi, *_ = table_row(table, step).to(x.dtype)
    output, variance = split_output(x, model_output.to(x.dtype))
    x_start = p * x + q * output
    if clip_x_start:
        x_start = x_start.clamp(-1, 1)
    if noise is None:
        noise = noise_function.normal(
            x.shape, seed=seed, stream=stream, step=step, start_index=start_index, device=x.device, dtype=x.dtype
        )
    if variance is not None:
        noise = noise * (lo + (hi - lo) * (variance + 1) / 2).exp()
    x_next = r * x_start + s * x + scaled(u, previous(x, x_start_previous)) + scaled(sigma, noise)
    if x_start_previous2 is not None or table.shape[1] > 6:
        x_next = x_next + scaled(u2, previous(x, x_start_previous2)) + scaled(u3, previous(x, x_start_previous3))
    return x_next, x_start


def sampler_step_(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start: torch.Tensor | None = None,
    x_start2: torch.Tensor | None = None,
    x_start3: torch.Tensor | None = None,
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
        x_start_previous2=x_start2,
        x_start_previous3=x_start3,
        noise=noise,
        clip_x_start=clip_x_start,
        start_index=start_index,
        stream=stream,
    )
    if x_start3 is not None and x_start2 is not None:
        x_start3.copy_(x_start2)
    if x_start2 is not None and x_start is not None:
        e, f = table_row(table, step).to(x.dtype)[-2:]
        x_start2.copy_(torch.where((e == 0) & (f == 0), x_start, e * x + f * new_x_start))
    if x_start is not None:
        x_start.copy_(new_x_start)
    return x.copy_(x_next)


def table_row(table: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Row `step` of the table, NaN where it has none, and zeros for the columns that the table does not have.

    Returns:
        (12,) in the table's dtype.
    """
    rows, columns = table.shape
    step = step.reshape(1)
    row = table.index_select(0, step.clamp(0, rows - 1))[0]  # (6,), (10,) or (12,)
    row = torch.where((step >= 0) & (step < rows), row, float("nan"))
    return torch.nn.functional.pad(row, (0, 12 - columns))


def split_output(x: torch.Tensor, model_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and, of twice the channels of x, its second half, the variance."""
    if model_output.shape == x.shape:
        return model_output, None
    return model_output[:, : x.shape[1]], model_output[:, x.shape[1] :]


def previous(x: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """A state of an earlier step, NaN where there is none."""
    return torch.full_like(x, float("nan")) if given is None else given


def scaled(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """coefficient · tensor, and 0 if the coefficient is 0, even if the tensor holds NaN."""
    return torch.where(coefficient == 0, 0.0, coefficient * tensor)
