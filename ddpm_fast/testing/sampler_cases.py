"""Processes small enough to know everything of, and walks along samplers' tables in float64: for tests and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch

from ddpm_fast.diffusion.levels import TARGETS, Levels, NoiseScale
from ddpm_fast.diffusion.samplers import SAMPLERS, SamplerTable, sampler_table
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.diffusion.spacings import karras
from ddpm_fast.ops.sampler_step import reference

# x0 of x = x0 + σ·ε: (X, σ) -> x0, both float64.
Denoise = Callable[[torch.Tensor, float], torch.Tensor]


class EdmScale(NoiseScale):
    """σ from 80 to 0.002 and z = x/√(σ² + σ_data²) (Karras et al. 2022, table 1); its times are log(σ)/4."""

    def __init__(self, sigma_max: float = 80.0, sigma_min: float = 0.002, sigma_data: float = 0.5):
        self.first, self.last = math.log(sigma_max) / 4, math.log(sigma_min) / 4
        self.sigma_data = sigma_data

    def at(self, times: torch.Tensor) -> Levels:
        sigma = (4 * times).exp()
        a = (sigma**2 + self.sigma_data**2).rsqrt()
        return Levels(times, a, a * sigma)

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        return (-half_log_snr / 4).clamp(self.last, self.first)

    def own_times(self, steps: int) -> torch.Tensor:
        return karras(self, steps)

    def first_scale(self, levels: Levels) -> float:
        return levels.b[0].item()


# Samplers of two network calls per step, but for the last.
TWO_CALLS = [name for name in SAMPLERS if len(sampler_table(EdmScale(), TARGETS["pred_x0"], name, 5).times) == 9]


class FlowScale(NoiseScale):
    """x = (1 − t)·x0 + t·ε with t from 1, where there is no signal."""

    first, last = 1.0, 1e-3

    def at(self, times: torch.Tensor) -> Levels:
        return Levels(times, 1 - times, times)

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        return torch.where(half_log_snr == -math.inf, 1.0, (-half_log_snr).sigmoid().clamp(self.last, self.first))

    def own_times(self, steps: int) -> torch.Tensor:
        return 1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps


class ZeroTerminalSchedule(Schedule):
    """A schedule rescaled so that its last timestep has no signal (Lin et al. 2023, algorithm 1)."""

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        a = torch.cumprod(1 - self.betas, dim=0).sqrt()
        return ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2


def scales() -> dict[str, NoiseScale]:
    """One process of each kind."""
    return {
        "discrete": Schedule(make_betas("linear", 1000)),
        "edm": EdmScale(),
        "flow": FlowScale(),
        "zero terminal snr": ZeroTerminalSchedule(make_betas("linear", 1000)),
    }


def levels_of(plan: SamplerTable, scale: NoiseScale) -> Levels:
    """The levels at which a table's rows call the network."""
    return scale.at(torch.tensor([float(time) for time in plan.times], dtype=torch.float64, device="cpu"))


def exact_moments(plan: SamplerTable, scale: NoiseScale, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation at which a table ends with the exact denoiser of N(mean, std²).

    The denoiser is m + v·a/(a²v + b²)·(x − a·m): each row is linear and Gaussian in (x, three earlier states).
    """
    levels = levels_of(plan, scale)
    moment = torch.zeros(4, dtype=torch.float64)
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    covariance[0, 0] = plan.first_scale**2
    for i, (a, b) in enumerate(zip(levels.a.tolist(), levels.b.tolist(), strict=True)):
        _, _, r, s, u, sigma, u2, u3, _, _, e, f, *_ = reference.table_row(plan.table, torch.tensor(i)).tolist()
        gain = std**2 * a / (a**2 * std**2 + b**2)
        offset = mean * (1 - gain * a)
        keeps = e != 0 or f != 0
        step = torch.tensor(
            [
                [r * gain + s, u, u2, u3],
                [gain, 0, 0, 0],
                [e + f * gain, 0, 0, 0] if keeps else [0, 1, 0, 0],
                [0, 0, 1, 0],
            ],
            dtype=torch.float64,
        )
        moment = step @ moment + offset * torch.tensor([r, 1, f if keeps else 0, 0], dtype=torch.float64)
        covariance = step @ covariance @ step.T
        covariance[0, 0] += sigma**2
    return moment[0].item(), covariance[0, 0].clamp(min=0).sqrt().item()


def walk(
    plan: SamplerTable,
    scale: NoiseScale,
    denoise: Denoise,
    x: torch.Tensor,
    noises: Iterable[torch.Tensor] = (),
    step: Callable[..., torch.Tensor] = reference.sampler_step_,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The states and the x0 along a table in x's dtype; the network of the table gives x0, which is not clipped.

    Args:
        x: the first state.
        noises: ε of the rows with σ ≠ 0, in their order.
        step: the reference, or the op.
    """
    noises = iter(noises)
    levels = levels_of(plan, scale)
    history = [torch.zeros_like(x) for _ in range(3)]
    table = plan.table.to(x.dtype)
    x = x.clone()
    states, starts = [], []
    for i, (a, b) in enumerate(zip(levels.a.tolist(), levels.b.tolist(), strict=True)):
        output = denoise(x / a, b / a) if a > 0 else denoise(x, math.inf)
        eps = next(noises).to(x.dtype) if table[i, 5] != 0 else torch.zeros_like(x)
        states_of_history = dict(zip(("x_start", "x_start2", "x_start3"), history, strict=True))
        options = {"noise": eps, "clip_x_start": False, **states_of_history}
        step(x, output.to(x.dtype), table, torch.tensor([i]), torch.tensor([0]), **options)
        states.append(x.clone())
        starts.append(history[0].clone())
    return states, starts
