"""Flow matching along straight lines (Lipman et al. 2023; Liu et al. 2023, rectified flow) on the ops' tables.

x_t = (1 − t)·x0 + t·ε, and the network gives the velocity ε − x0: a = 1 − t, b = t, c = 1, d = −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.continuous_process import ContinuousProcess
from ddpm_fast.diffusion.diffusion_process import process
from ddpm_fast.diffusion.levels import Levels, NoiseScale
from ddpm_fast.diffusion.weightings import Weighting
from ddpm_fast.runtime.plain import as_int, as_number

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class FlowScale(NoiseScale):
    """a = 1 − t, b = t at times from 1, noise alone, to `last`; the network is told time_scale·t."""

    time_scale: float

    first = 1.0
    last = 1e-3

    def at(self, times: torch.Tensor) -> Levels:
        return Levels(times * self.time_scale, 1 - times, times)

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(-half_log_snr).clamp(self.last, self.first)

    def own_times(self, steps: int) -> torch.Tensor:
        """Uniform in time: 1, 1 − 1/S, …, 1/S."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]


@process("flow")
class RectifiedFlow(ContinuousProcess):
    """Flow matching (Lipman et al. 2023) along the lines from data to noise (Liu et al. 2023).

    Time runs from 0, the data, to 1, the noise.

    Args:
        model: takes (x, t, x_self_cond), t being time_scale·time.
        image_size: one int, or (height, width).
        channels: of the images; the model's where it has `channels`.
        num_sample_steps: steps of `sample`.
        time_distribution: of training, "uniform" or "logit_normal" (Esser et al. 2024, section 3.1).
        logit_mean, logit_std: of the logit of time where that is normal.
        time_scale: what the network is told is this times the time. None: 1000, as sinusoidal embeddings of timesteps
            want it, or 1 for a network with learned or random Fourier features.
        optimal_transport: match noise and images of a batch by smallest total squared distance (Tong et al. 2024).
        clip_x_start: clip estimates of x0 to [−1, 1].
        others: see `DiffusionProcess`.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    default_sampler = "euler"
    default_spacing = "own"
    constant_target = (1.0, -1.0)
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        channels: int | None = None,
        num_sample_steps: int = 50,
        time_distribution: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        time_scale: float | None = None,
        optimal_transport: bool = False,
        clip_x_start: bool = True,
        loss_weighting: str | Weighting = "uniform",
        **others: Any,
    ):
        RectifiedFlow._check_others(others)
        if time_distribution not in TIME_DISTRIBUTIONS:
            raise ValueError(
                f"time_distribution must be one of {', '.join(TIME_DISTRIBUTIONS)}, got {time_distribution!r}"
            )
        if time_scale is None:
            time_scale = 1.0 if getattr(model, "random_or_learned_sinusoidal_cond", False) else 1000.0
        if optimal_transport and others.get("immiscible"):
            raise ValueError("optimal_transport and immiscible both assign noise to images: use one of them")
        numbers = dict(
            logit_mean=as_number("logit_mean", logit_mean, -1e3, 1e3),
            logit_std=as_number("logit_std", logit_std, 0, 1e3),
            time_scale=as_number("time_scale", time_scale, 1e-12, 1e12),
        )
        steps = as_int("num_sample_steps", num_sample_steps, 1)
        config = {
            **numbers,
            "num_sample_steps": steps,
            "time_distribution": time_distribution,
            "optimal_transport": bool(optimal_transport),
            "clip_x_start": bool(clip_x_start),
        }
        super().__init__(
            model,
            image_size=image_size,
            channels=channels,
            sampling_timesteps=steps,
            clip_x_start=clip_x_start,
            loss_weighting=loss_weighting,
            config=config,
            **others,
        )
        self.time_distribution, self.optimal_transport = time_distribution, bool(optimal_transport)
        self.logit_mean, self.logit_std, self.time_scale = numbers.values()

    @property
    def num_sample_steps(self) -> int:
        return self.sampling_timesteps

    @num_sample_steps.setter
    def num_sample_steps(self, value: int) -> None:
        self.sampling_timesteps = value

    @property
    def noise_scale(self) -> FlowScale:
        return FlowScale(self.time_scale)

    def _plan_key(self) -> tuple:
        return (self.time_scale,)

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) float32 in (0, 1)."""
        if self.time_distribution == "uniform":
            return torch.rand((batch_size,), device=self.device)
        return torch.sigmoid(torch.randn((batch_size,), device=self.device) * self.logit_std + self.logit_mean)

    @property
    def assigns_noise(self) -> bool:
        return self.immiscible or self.optimal_transport

    def _distance(self, x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        distance = super()._distance(x_start, noise)
        return distance.square() if self.optimal_transport else distance
