"""Diffusion in continuous time (Kingma et al. 2021, variational diffusion models) on the ops' tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.diffusion.continuous_process import ContinuousProcess
from ddpm_fast.diffusion.diffusion_process import TrainingRows, process
from ddpm_fast.diffusion.levels import TARGETS, Levels, NoiseScale, Target, prediction
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling_run import Conditioning, SamplingRun
from ddpm_fast.diffusion.weightings import Weighting
from ddpm_fast.noise import Noise
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_int, as_number

# Noise over signal, e = b²/a² = 1/SNR, as a function of time in [0, 1].
NoiseRatio = Callable[[torch.Tensor], torch.Tensor]

_COSINE_SHIFT = 0.008
_LARGEST_RATIO = 4.371139e-08**-2 - 1  # the cosine of π/2 in float32


def linear_noise_ratio(t: torch.Tensor) -> torch.Tensor:
    """Of a log-SNR that approximates the linear schedule of betas (Kingma et al. 2021, appendix)."""
    return torch.expm1(t * t * 10 + 1e-4)


def cosine_noise_ratio(t: torch.Tensor) -> torch.Tensor:
    """Of ᾱ = cos²(π/2·(t + s)/(1 + s)) (Nichol & Dhariwal 2021, eq. 17), within what float32 gives upstream."""
    s = _COSINE_SHIFT
    angle = t * (math.pi / 2 / (1 + s)) + math.pi / 2 * s / (1 + s)
    return angle.tan().square().clamp(1e-5, _LARGEST_RATIO)


@dataclass(frozen=True, eq=False)
class ContinuousScale(NoiseScale):
    """Levels a² = 1/(1 + e), b² = e/(1 + e) at times in [0, 1]; the network is told the log-SNR, −log e.

    Args:
        noise_ratio: e as an increasing function of time.
    """

    noise_ratio: NoiseRatio

    first = 1.0
    last = 0.0

    def at(self, times: torch.Tensor) -> Levels:
        ratio = self.noise_ratio(times)
        a = torch.rsqrt(ratio + 1)
        return Levels(-ratio.log(), a, a * ratio.sqrt())

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        """By halving [0, 1]: e has no inverse that every schedule could give."""
        wanted = torch.exp(-2 * half_log_snr)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            is_below = self.noise_ratio(middle) < wanted
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2

    def own_times(self, steps: int) -> torch.Tensor:
        """Uniform in time."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]


class _MonotonicLinear(nn.Module):
    """A linear layer of the weights' absolute values."""

    def __init__(self, features_in: int, features_out: int):
        super().__init__()
        self.net = nn.Linear(features_in, features_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.net.weight.abs(), self.net.bias.abs())


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fn(x)


class LearnedNoiseSchedule(nn.Module):
    """A monotonic network from time to log-SNR (Kingma et al. 2021, appendix H); upstream's names of weights.

    Args:
        log_snr_max, log_snr_min: at times 0 and 1.
        hidden_dim: its width.
        frac_gradient: the share of the gradient that reaches it.
    """

    def __init__(self, *, log_snr_max: float, log_snr_min: float, hidden_dim: int, frac_gradient: float):
        super().__init__()
        self.slope, self.intercept, self.frac_gradient = log_snr_min - log_snr_max, log_snr_max, frac_gradient
        hidden = nn.Sequential(_MonotonicLinear(1, hidden_dim), nn.Sigmoid(), _MonotonicLinear(hidden_dim, 1))
        self.net = nn.Sequential(nn.Identity(), _MonotonicLinear(1, 1), _Residual(hidden), nn.Identity())

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) times → (B,) log-SNR, in float32 at least."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        t = t.to(self.net[1].net.weight.dtype)  # type: ignore[union-attr, arg-type]
        at = [self.net(time[..., None])[..., 0] for time in (torch.zeros_like(t), torch.ones_like(t), t)]
        at = [value.to(dtype) for value in at]
        log_snr = self.slope * ((at[2] - at[0]) / (at[1] - at[0])) + self.intercept
        return log_snr * self.frac_gradient + log_snr.detach() * (1 - self.frac_gradient)


@process("continuous")
class ContinuousTimeGaussianDiffusion(ContinuousProcess):
    """Variational diffusion (Kingma et al. 2021) that predicts noise; upstream's arguments and methods.

    Args:
        model: takes (x, t, x_self_cond), t being the log-SNR.
        image_size: one int, or (height, width).
        channels: of the images; the model's where it has `channels`.
        noise_schedule: "linear", "cosine" or "learned".
        num_sample_steps: steps of `sample`.
        clip_sample_denoised: clip estimates of x0 to [−1, 1].
        learned_schedule_net_hidden_dim, learned_noise_schedule_frac_gradient: of the learned schedule. Its gradient
            goes through x_t, so that plain torch makes x_t and the loss.
        min_snr_loss_weight, min_snr_gamma: clip the SNR in the loss weight (Hang et al. 2023).
        others: see `DiffusionProcess`.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    default_sampler = "ddpm"
    constant_target: tuple[float, float] | None = (1.0, 0.0)

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        channels: int | None = None,
        noise_schedule: str = "linear",
        num_sample_steps: int = 500,
        clip_sample_denoised: bool = True,
        learned_schedule_net_hidden_dim: int = 1024,
        learned_noise_schedule_frac_gradient: float = 1.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        loss_weighting: str | Weighting | None = None,
        loss_weighting_options: Mapping[str, float] | None = None,
        **others: Any,
    ):
        ContinuousTimeGaussianDiffusion._check_others(others)
        if noise_schedule not in ("linear", "cosine", "learned"):
            raise ValueError(f"noise_schedule must be linear, cosine or learned, got {noise_schedule!r}")
        steps = as_int("num_sample_steps", num_sample_steps, 1)
        fraction = as_number("learned_noise_schedule_frac_gradient", learned_noise_schedule_frac_gradient, 0, 1)
        hidden_dim = as_int("learned_schedule_net_hidden_dim", learned_schedule_net_hidden_dim, 1)
        config = dict(noise_schedule=noise_schedule, num_sample_steps=steps, clip_sample_denoised=clip_sample_denoised)
        if noise_schedule == "learned":
            config |= dict(learned_schedule_net_hidden_dim=hidden_dim, learned_noise_schedule_frac_gradient=fraction)
        if min_snr_loss_weight:
            if loss_weighting is not None:
                raise ValueError("loss_weighting must be None with min_snr_loss_weight=True, which is 'min_snr'")
            loss_weighting, loss_weighting_options = "min_snr", {"gamma": as_number("min_snr_gamma", min_snr_gamma)}
        super().__init__(
            model,
            image_size=image_size,
            channels=channels,
            sampling_timesteps=steps,
            clip_x_start=clip_sample_denoised,
            loss_weighting=loss_weighting or "uniform",
            loss_weighting_options=loss_weighting_options,
            config=config,
            **others,
        )
        self.noise_schedule = noise_schedule
        if noise_schedule == "learned":
            ends = [-linear_noise_ratio(torch.tensor(t, dtype=torch.float64)).log().item() for t in (0.0, 1.0)]
            self.log_snr: Any = LearnedNoiseSchedule(
                log_snr_max=ends[0], log_snr_min=ends[1], hidden_dim=hidden_dim, frac_gradient=fraction
            )
        else:
            self.log_snr = partial(_log_snr, noise_schedule)

    model: nn.Module

    def current_config(self) -> dict[str, Any]:
        return {**super().current_config(), "clip_sample_denoised": bool(self.clip_x_start)}

    @property
    def num_sample_steps(self) -> int:
        return self.sampling_timesteps

    @num_sample_steps.setter
    def num_sample_steps(self, value: int) -> None:
        self.sampling_timesteps = value

    @property
    def noise_scale(self) -> ContinuousScale:
        if self.noise_schedule != "learned":
            return ContinuousScale(_RATIOS[self.noise_schedule])
        # As numbers on the host: its weights change, so that no table of it is kept.
        with torch.no_grad():
            log_snr = copy.deepcopy(self.log_snr).cpu().double()
        return ContinuousScale(lambda t: torch.exp(-log_snr(t.double())).detach())

    def _plan_key(self) -> tuple:
        if self.noise_schedule == "learned":
            self._plans.clear()
        return ()

    def _make_plan(
        self,
        sampler: str,
        steps: int,
        spacing: str | Sequence[float] | None,
        options: Mapping[str, float],
        **others: Any,
    ) -> SamplerTable:
        plan = super()._make_plan(sampler, steps, spacing, options, **others)
        if sampler == "ddpm" and spacing in (None, "own"):
            # Upstream's last step ends at time 0, which has noise left, on the mean of the posterior.
            now, end = (self.noise_scale.at(torch.tensor([t], dtype=torch.float64)) for t in (1 / steps, 0.0))
            kept = (end.sigma / now.sigma) ** 2
            plan.table[-1, 2:4] = torch.cat((end.a * (1 - kept), kept * end.a / now.a))
        return plan

    @property
    def clip_sample_denoised(self) -> bool:
        return self.clip_x_start

    @clip_sample_denoised.setter
    def clip_sample_denoised(self, value: bool) -> None:
        self.clip_x_start = value

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) float32 uniform in [0, 1)."""
        return torch.rand((batch_size,), device=self.device)

    # upstream's methods

    def p_mean_variance(
        self, x: torch.Tensor, time: torch.Tensor, time_next: torch.Tensor, **conditions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, C, H, W) and variance () of the step from time to time_next (Kingma et al. 2021, eq. 32 to 34).

        Args:
            x: (B, C, H, W) at `time`.
            time, time_next: scalars in [0, 1].
            conditions: the model's keywords.
        """
        log_snr, log_snr_next = self.log_snr(time), self.log_snr(time_next)
        c = -torch.expm1(log_snr - log_snr_next)
        alpha, alpha_next = (value.sigmoid().sqrt() for value in (log_snr, log_snr_next))
        p, q = prediction(Levels(log_snr, alpha, (-log_snr).sigmoid().sqrt()), self.target)
        x_start = p * x + q * call_model(self.model, x, log_snr.expand(x.shape[0]), **conditions)
        if self.clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        return alpha_next * (x * (1 - c) / alpha + c * x_start), (-log_snr_next).sigmoid() * c

    @torch.no_grad()
    def p_sample(self, x: torch.Tensor, time: torch.Tensor, time_next: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """A step of ancestral sampling with fresh noise; arguments as of `p_mean_variance`."""
        mean, variance = self.p_mean_variance(x=x, time=time, time_next=time_next, **conditions)
        return mean if time_next == 0 else mean + variance.sqrt() * torch.randn_like(x)

    def p_sample_loop(self, shape: Sequence[int], **options: Any) -> torch.Tensor:
        """Ancestral sampling over `num_sample_steps`; options as in `sample`, such as `seed`."""
        return self._sample(self._plan("ddpm", spacing="own"), shape, **options)

    def q_sample(  # type: ignore[override]
        self, x_start: torch.Tensor, times: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """x_t and its log-SNR, (B, ...) and (B,); arguments as of `ContinuousProcess.q_sample`."""
        return super().q_sample(x_start, times, noise), self.log_snr(times)

    def _own_methods(self) -> list[str]:
        return [name for name in ("p_sample", "p_mean_variance") if self._has_own(name)]

    def _why_not_recorded(
        self, sampler: str, x: torch.Tensor, any_module: bool, given: Conditioning | None = None
    ) -> str | None:
        if self._own_methods():
            return f"{type(self).__name__} has its own {', '.join(self._own_methods())}"
        return super()._why_not_recorded(sampler, x, any_module, given)

    def _denoise(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """Walk along the run's table; through the public methods where a subclass has its own."""
        own = self._own_methods()
        if not own:
            return super()._denoise(x, run)
        self._check_recording(x, run)
        run.conditioning.check_unguided(f"{type(self).__name__} has its own {', '.join(own)}")
        if run.on_x_start is not None:
            raise ValueError(f"{type(self).__name__} has its own {', '.join(own)}, which give no estimate of x0")
        if run.plan.ends_on_x_start or run.plan.sampler != "ddpm":
            raise ValueError(
                f"sampler must be 'ddpm' with the spacing 'own' where {type(self).__name__} has its own "
                f"{', '.join(own)}"
            )
        times = torch.linspace(1.0, 0.0, len(run.plan.times) + 1, device=x.device)
        with run.progress_bar(x.device) as bar:
            for row in run.rows:
                x = self.p_sample(x, times[row], times[row + 1], **run.conditioning.arguments)
                run.step_done(x, bar, None)
        return x

    # the learned schedule: gradients of x_t and of the loss in plain torch

    def _can_fuse_noise(self) -> bool:
        return self.noise_schedule != "learned" and not self._has_own("q_sample") and super()._can_fuse_noise()

    def _shows_images(self) -> bool:
        return self.noise_schedule == "learned" or self._has_own("q_sample") or super()._shows_images()

    def _rows(self, t: torch.Tensor) -> TrainingRows:
        if self.noise_schedule != "learned":
            return super()._rows(t)
        log_snr = self.log_snr(t)
        a, b = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        weight = torch.ones_like(a) if self.constant_row is not None else self._weighting(log_snr.exp()) * (b / a) ** 2
        loss_table = torch.stack((*self.target(Levels(t, a, b)), weight), dim=1)
        of_images = torch.arange(t.shape[0], device=t.device)
        return TrainingRows(of_images, torch.stack((a, b), dim=1), loss_table, log_snr)

    def _noised(
        self, x_start: torch.Tensor, t: torch.Tensor, rows: TrainingRows, drawn: Noise, options: dict[str, Any]
    ) -> torch.Tensor:
        if self._has_own("q_sample"):
            return self.q_sample(x_start=x_start, times=t, noise=drawn.tensor)[0]
        if self.noise_schedule != "learned":
            return super()._noised(x_start, t, rows, drawn, options)
        assert drawn.tensor is not None  # `_can_fuse_noise` is False
        a, b = (factor.reshape(-1, 1, 1, 1) for factor in rows.forward_table.unbind(1))
        return a * x_start + b * drawn.tensor

    def _errors(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        rows: TrainingRows,
        drawn: Noise,
        options: dict[str, Any],
    ) -> torch.Tensor:
        if self.noise_schedule != "learned":
            return super()._errors(model_output, x_start, x, t, rows, drawn, options)
        assert drawn.tensor is not None
        c, d, weight = (factor.reshape(-1, 1, 1, 1) for factor in rows.loss_table.unbind(1))
        errors = (model_output.float() - (c * drawn.tensor + d * x_start)) ** 2
        return (weight * errors).flatten(1).mean(1)


@process("v-continuous")
class VParamContinuousTimeGaussianDiffusion(ContinuousTimeGaussianDiffusion):
    """Continuous time with the cosine schedule and v (Salimans & Ho 2022); upstream's arguments and methods.

    Args:
        model, image_size, channels, num_sample_steps, clip_sample_denoised: as of `ContinuousTimeGaussianDiffusion`.
        others: see `DiffusionProcess`.
    """

    constant_target = None
    fixed_arguments = ContinuousTimeGaussianDiffusion.fixed_arguments | {
        "noise_schedule",
        "learned_schedule_net_hidden_dim",
        "learned_noise_schedule_frac_gradient",
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        channels: int | None = None,
        num_sample_steps: int = 500,
        clip_sample_denoised: bool = True,
        **others: Any,
    ):
        VParamContinuousTimeGaussianDiffusion._check_others(others)
        super().__init__(
            model,
            image_size=image_size,
            channels=channels,
            noise_schedule="cosine",
            num_sample_steps=num_sample_steps,
            clip_sample_denoised=clip_sample_denoised,
            **others,
        )
        del self.config["noise_schedule"]

    @property
    def target(self) -> Target:
        return TARGETS["pred_v"]

    def q_sample(  # type: ignore[override]
        self, x_start: torch.Tensor, times: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """x_t, its log-SNR, and a and b as (B, 1, 1, 1); arguments as of `ContinuousProcess.q_sample`."""
        x, log_snr = super().q_sample(x_start, times, noise)
        rows = self._rows(times)
        a, b = (factor.reshape(-1, *(1,) * (x.ndim - 1)) for factor in rows.forward_table.unbind(1))
        return x, log_snr, a, b


def _log_snr(noise_schedule: str, t: torch.Tensor) -> torch.Tensor:
    return -_RATIOS[noise_schedule](t).log()


_RATIOS: dict[str, NoiseRatio] = {"linear": linear_noise_ratio, "cosine": cosine_noise_ratio}
