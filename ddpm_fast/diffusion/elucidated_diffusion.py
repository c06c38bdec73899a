"""EDM (Karras et al. 2022) on the ops' tables.

The state is z = c_in(σ)·x, of unit variance: the network reads it as it is. With it a = c_in, b = c_in·σ, and the
network gives c = −c_skip·σ/c_out of ε and d = (1 − c_skip)/c_out of x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.continuous_process import ContinuousProcess
from ddpm_fast.diffusion.diffusion_process import process
from ddpm_fast.diffusion.levels import Levels, NoiseScale, Target
from ddpm_fast.diffusion.weightings import Weighting
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_int, as_number


@dataclass(frozen=True)
class ElucidatedScale(NoiseScale):
    """The levels of EDM. Time is c_noise = log(σ)/4, which the network is told (Karras et al. 2022, table 1)."""

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float

    @property
    def first(self) -> float:  # type: ignore[override]
        return math.log(self.sigma_max) / 4

    @property
    def last(self) -> float:  # type: ignore[override]
        return math.log(self.sigma_min) / 4

    def at(self, times: torch.Tensor) -> Levels:
        sigma = torch.exp(4 * times)
        c_in = torch.rsqrt(sigma**2 + self.sigma_data**2)
        return Levels(times, c_in, c_in * sigma)

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        return (-half_log_snr / 4).clamp(self.last, self.first)

    def own_times(self, steps: int) -> torch.Tensor:
        """Karras et al. 2022, eq. 5: uniform in σ^(1/ρ)."""
        first, last = (sigma ** (1 / self.rho) for sigma in (self.sigma_max, self.sigma_min))
        return torch.linspace(first, last, steps, dtype=torch.float64, device="cpu").log() * (self.rho / 4)

    def first_scale(self, levels: Levels) -> float:
        """The first state is noise alone, x = σ·ε."""
        return levels.b[0].item()


@process("edm")
class ElucidatedDiffusion(ContinuousProcess):
    """EDM (Karras et al. 2022); upstream's arguments and methods, around any network.

    Args:
        net: takes (x, t, x_self_cond), t being log(σ)/4.
        image_size: one int, or (height, width).
        channels: of the images; the network's where it has `channels`.
        num_sample_steps: steps of `sample`.
        sigma_min, sigma_max, rho: the levels that it goes along.
        sigma_data: standard deviation of the data.
        P_mean, P_std: log σ of training is normal with these.
        S_churn, S_tmin, S_tmax, S_noise: of the sampler "heun" (Karras et al. 2022, algorithm 2, table 5).
        loss_weighting: "uniform" weighs the network's output alike at every level; of x0 that is λ(σ) (table 1).
        others: see `DiffusionProcess`.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    network_name = "net"
    default_sampler = "heun"
    default_spacing = "own"

    def __init__(
        self,
        net: nn.Module,
        *,
        image_size: int | Sequence[int],
        channels: int | None = None,
        num_sample_steps: int = 32,
        sigma_min: float = 0.002,
        sigma_max: float = 80,
        sigma_data: float = 0.5,
        rho: float = 7,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        S_churn: float = 80,
        S_tmin: float = 0.05,
        S_tmax: float = 50,
        S_noise: float = 1.003,
        loss_weighting: str | Weighting = "uniform",
        **others: Any,
    ):
        ElucidatedDiffusion._check_others(others)
        least = 1e-12
        numbers = dict(
            sigma_min=as_number("sigma_min", sigma_min, least, 1e12),
            sigma_max=as_number("sigma_max", sigma_max, least, 1e12),
            sigma_data=as_number("sigma_data", sigma_data, least, 1e12),
            rho=as_number("rho", rho, 1e-3, 1e3),
            P_mean=as_number("P_mean", P_mean, -1e3, 1e3),
            P_std=as_number("P_std", P_std, 0, 1e3),
            S_churn=as_number("S_churn", S_churn, 0, 1e12),
            S_tmin=as_number("S_tmin", S_tmin, 0),
            S_tmax=as_number("S_tmax", S_tmax, 0),
            S_noise=as_number("S_noise", S_noise, 0, 1e3),
        )
        if numbers["sigma_min"] >= numbers["sigma_max"]:
            raise ValueError(f"sigma_min must be less than sigma_max, got {sigma_min} and {sigma_max}")
        steps = as_int("num_sample_steps", num_sample_steps, 1)
        super().__init__(
            net,
            image_size=image_size,
            channels=channels,
            sampling_timesteps=steps,
            clip_x_start=True,
            loss_weighting=loss_weighting,
            config={**numbers, "num_sample_steps": steps},
            **others,
        )
        for name, value in numbers.items():
            setattr(self, name, value)

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    P_mean: float
    P_std: float
    S_churn: float
    S_tmin: float
    S_tmax: float
    S_noise: float

    @property
    def model(self) -> nn.Module:
        """The network, by the name that it has in other processes."""
        return self.net  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.network_name if name == "model" else name, value)

    @property
    def num_sample_steps(self) -> int:
        return self.sampling_timesteps

    @num_sample_steps.setter
    def num_sample_steps(self, value: int) -> None:
        self.sampling_timesteps = value

    @property
    def noise_scale(self) -> ElucidatedScale:
        return ElucidatedScale(self.sigma_min, self.sigma_max, self.sigma_data, self.rho)

    @property
    def target(self) -> Target:
        sigma_data = self.sigma_data
        return lambda levels: (-sigma_data * levels.a, levels.b / sigma_data)

    def _plan_key(self) -> tuple:
        return (self.noise_scale,)

    def _default_options(self, sampler: str) -> dict[str, float]:
        if sampler != "heun":
            return {}
        return {"s_churn": self.S_churn, "s_tmin": self.S_tmin, "s_tmax": self.S_tmax, "s_noise": self.S_noise}

    # upstream's methods

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.sigma_data * (self.sigma_data**2 + sigma**2) ** -0.5

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma**2 + self.sigma_data**2) ** -0.5

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.log(sigma.clamp(min=1e-20)) * 0.25

    def preconditioned_network_forward(
        self,
        noised_images: torch.Tensor,
        sigma: torch.Tensor | float,
        self_cond: torch.Tensor | None = None,
        clamp: bool = False,
        **conditions: Any,
    ) -> torch.Tensor:
        """D(x; σ), the estimate of x0 (Karras et al. 2022, eq. 7).

        Args:
            noised_images: (B, C, H, W), x = x0 + σ·ε.
            sigma: (B,), or one number for all.
            conditions: the network's keywords.
        """
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full((noised_images.shape[0],), float(sigma), device=noised_images.device)
        padded = sigma.reshape(-1, 1, 1, 1)
        output = call_model(
            self.network, self.c_in(padded) * noised_images, self.c_noise(sigma), self_cond, **conditions
        )
        out = self.c_skip(padded) * noised_images + self.c_out(padded) * output
        return out.clamp(-1.0, 1.0) if clamp else out

    def sample_schedule(self, num_sample_steps: int | None = None) -> torch.Tensor:
        """(N + 1,) float32, the levels σ of sampling (Karras et al. 2022, eq. 5), and 0."""
        steps = self.num_sample_steps if num_sample_steps is None else num_sample_steps
        sigmas = torch.exp(4 * self.noise_scale.own_times(steps))
        return nn.functional.pad(sigmas, (0, 1)).to(device=self.device, dtype=torch.float32)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """λ(σ) (Karras et al. 2022, table 1), of x0's squared error."""
        return (sigma**2 + self.sigma_data**2) * (sigma * self.sigma_data) ** -2

    def noise_distribution(self, batch_size: int) -> torch.Tensor:
        """(B,) σ of a training step."""
        return (self.P_mean + self.P_std * torch.randn((batch_size,), device=self.device)).exp()

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) log(σ)/4, normal (Karras et al. 2022, table 1)."""
        if self._has_own("noise_distribution"):
            return self.c_noise(self.noise_distribution(batch_size))
        return torch.randn((batch_size,), device=self.device) * (self.P_std / 4) + self.P_mean / 4

    def forward(self, img: torch.Tensor, *args: Any, sigma: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """The training loss; arguments as in `DiffusionProcess.forward`.

        Args:
            sigma: (B,), the levels of noise instead of `times`.
        """
        if sigma is not None:
            kwargs["times"] = self.c_noise(sigma)
        return super().forward(img, *args, **kwargs)

    def sample(  # type: ignore[override]
        self,
        batch_size: int | None = None,
        num_sample_steps: int | bool | None = None,
        clamp: bool | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images from noise; further arguments as in `DiffusionProcess.sample`.

        Args:
            num_sample_steps: steps; the constructor's if None.
            clamp: clip estimates of x0 to [−1, 1]; `clip_x_start` if None.
        """
        if isinstance(num_sample_steps, bool):  # as other processes' second argument
            options["return_all_timesteps"], num_sample_steps = num_sample_steps, None
        if num_sample_steps is not None:
            options["sampling_timesteps"] = num_sample_steps
        if clamp is not None:
            options["clip_x_start"] = clamp
        return super().sample(batch_size, **options)

    def sample_using_dpmpp(
        self, batch_size: int | None = None, num_sample_steps: int | None = None, **options: Any
    ) -> torch.Tensor:
        """DPM-Solver++(2M) over the process's own levels, without clipping, as upstream."""
        options = {"sampler": "dpmpp_2m", "spacing": "own", **options}
        return self.sample(batch_size, num_sample_steps, clamp=False, **options)
