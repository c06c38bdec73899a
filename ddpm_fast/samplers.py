"""The one sampling loop: a model, a table, and a seed.

DDPM, DDIM and DPM-Solver++ differ only in the numbers of the table (schedules.py); nothing here knows which one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ddpm_fast.ops.sampler_step.op import sampler_step_
from ddpm_fast.schedules import SamplerTable


def progress_bar(steps: Iterable, *, desc: str, total: int, enabled: bool) -> Iterable:
    """The peer's progress bar over `steps`, or the bare iterable."""
    if not enabled:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=desc, total=total)


@torch.inference_mode()
def sample_loop(
    model: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    plan: SamplerTable,
    seed: torch.Tensor,
    *,
    start_index: int = 0,
    first_step: int = 0,
    self_condition: bool = False,
    noise_for_step: Callable[[int], torch.Tensor] | None = None,
    on_step: Callable[[torch.Tensor], None] | None = None,
    progress: bool = False,
    desc: str = "sampling loop time step",
) -> torch.Tensor:
    """Denoise x in place, one row of the table after another.

    Args:
        model: takes (x, t, x_self_cond), returns the objective's output, shape of x.
        x: (B, C, H, W) float32 contiguous, the state at `plan.times[first_step]`; overwritten.
        seed: one-element int64 tensor on x's device.
        start_index: index of the first sample, for the noise.
        first_step: row of the table to start with.
        self_condition: give the model the previous estimate of x0.
        noise_for_step: ε of a step by its row, instead of the noise function.
        on_step: called with x after every step.

    Returns:
        x.
    """
    batch, device = x.shape[0], x.device
    num_steps = len(plan.times)
    table = plan.table.to(device=device, dtype=torch.float32)
    times = torch.tensor(plan.times, dtype=torch.int64, device=device)
    step = torch.full((1,), first_step, dtype=torch.int64, device=device)
    x_start = torch.empty_like(x) if self_condition or plan.uses_x_start_previous else None

    rows = range(first_step, num_steps)
    for row in progress_bar(rows, desc=desc, total=len(rows), enabled=progress):
        x_self_cond = x_start if self_condition and row > first_step else None
        model_output = model(x, times[row].expand(batch), x_self_cond)
        noise = None if noise_for_step is None else noise_for_step(row)
        sampler_step_(x, model_output, table, step, seed, x_start=x_start, noise=noise, start_index=start_index)
        step += 1
        if on_step is not None:
            on_step(x)
    return x
