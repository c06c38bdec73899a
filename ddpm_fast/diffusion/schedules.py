"""Beta schedules and everything that follows from them, in float64.

A diffusion process is a handful of numbers per timestep. This file computes them once; what runs per step or per image
reads columns of the tables made here and knows no schedule, no objective and no sampler by name:

    forward diffusion   x_t = a·x0 + b·ε                                       columns a, b
    loss                w · mean((out − (c·ε + d·x0))²) per sample             columns c, d, w
    sampler step        x0 = clip(p·x + q·out);  x ← r·x0 + s·x + u·x0_previous + σ·ε    columns p, q, r, s, u, σ
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


def linear_beta_schedule(timesteps: int) -> torch.Tensor:
    """Linear schedule (Ho et al. 2020, section 4), stretched to any number of timesteps.

    Returns:
        (T,) float64.
    """
    scale = 1000 / timesteps
    return torch.linspace(scale * 0.0001, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> torch.Tensor:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17).

    Returns:
        (T,) float64, clipped to [0, 0.999].
    """
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    return _betas_from_alphas_cumprod(torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2)


def sigmoid_beta_schedule(
    timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5
) -> torch.Tensor:
    """Sigmoid schedule (Jabri et al. 2022, arXiv 2212.11972, algorithm 1); good for images larger than 64×64.

    `clamp_min` is accepted and not used, as in the peer.

    Returns:
        (T,) float64, clipped to [0, 0.999].
    """
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    # The two ends are float32 in the peer, and its buffers and checkpoints carry that rounding.
    v_start = torch.tensor(start / tau, dtype=torch.float32).sigmoid()
    v_end = torch.tensor(end / tau, dtype=torch.float32).sigmoid()
    return _betas_from_alphas_cumprod((-((t * (end - start) + start) / tau).sigmoid() + v_end) / (v_end - v_start))


def _betas_from_alphas_cumprod(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """(T + 1,) values proportional to ᾱ from t = −1 on → (T,) betas."""
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    return torch.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


BETA_SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule, "sigmoid": sigmoid_beta_schedule}


def make_betas(beta_schedule: str, timesteps: int, **kwargs) -> torch.Tensor:
    """Betas of a named schedule, checked.

    Raises:
        ValueError: unknown schedule, or fewer than one timestep.
    """
    if beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {beta_schedule!r}")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a positive int, got {timesteps!r}")
    return BETA_SCHEDULES[beta_schedule](timesteps, **kwargs)


@dataclass(frozen=True, eq=False)
class Schedule:
    """All per-timestep numbers of a diffusion process.

    Args:
        betas: (T,) float64, each in (0, 1).

    Raises:
        ValueError: a beta is outside (0, 1), as the linear schedule makes them with too few timesteps.

    Every property is (T,) float64 on the CPU. ᾱ is `alphas_cumprod`, q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) (Ho et al.
    2020, eq. 4).
    """

    betas: torch.Tensor

    def __post_init__(self):
        inside = (self.betas > 0) & (self.betas < 1)
        if not inside.all():
            t = int((~inside).nonzero()[0])
            raise ValueError(
                f"beta_schedule must give betas in (0, 1), got {self.betas[t].item():.4g} at t = {t} of "
                f"{self.num_timesteps} timesteps; the linear schedule needs at least 21 timesteps"
            )

    @property
    def num_timesteps(self) -> int:
        return self.betas.shape[0]

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        return torch.cumprod(1.0 - self.betas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> torch.Tensor:
        return F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)

    @cached_property
    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ) (Kingma et al. 2021, eq. 3)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> torch.Tensor:
        """β̃ (Ho et al. 2020, eq. 7); zero at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The peer's buffers by name, float64, in the peer's order (the loss weight aside)."""
        betas, alphas_cumprod, alphas_cumprod_prev = self.betas, self.alphas_cumprod, self.alphas_cumprod_prev
        return {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": torch.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": torch.sqrt(1.0 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": torch.log(1.0 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod - 1),
            "posterior_variance": self.posterior_variance,
            # Clipped because the posterior variance is 0 at the start of the chain.
            "posterior_log_variance_clipped": torch.log(self.posterior_variance.clamp(min=1e-20)),
            # x0's and x_t's coefficients in the posterior mean (Ho et al. 2020, eq. 7).
            "posterior_mean_coef1": betas * torch.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * torch.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        }


def loss_weight(schedule: Schedule, objective: str, min_snr_gamma: float | None = None) -> torch.Tensor:
    """w of the loss table: the weight of each timestep's squared error.

    Args:
        min_snr_gamma: clip the SNR there (Hang et al. 2023, section 3.4); None does not clip.

    Returns:
        (T,) float64.
    """
    check_objective(objective)
    snr = schedule.snr
    clipped = snr if min_snr_gamma is None else snr.clamp(max=min_snr_gamma)
    return {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}[objective]


def forward_table(schedule: Schedule) -> torch.Tensor:
    """Columns a, b of x_t = a·x0 + b·ε (Ho et al. 2020, eq. 4).

    Returns:
        (T, 2) float64.
    """
    return torch.stack([schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()], dim=1)


def loss_table(schedule: Schedule, objective: str, weight: torch.Tensor) -> torch.Tensor:
    """Columns c, d, w of w · mean((out − (c·ε + d·x0))²).

    The target is ε (Ho et al. 2020, eq. 14), x0, or v = √ᾱ ε − √(1 − ᾱ) x0 (Salimans & Ho 2022, appendix D).

    Args:
        weight: (T,), as `loss_weight` makes it.

    Returns:
        (T, 3) float64.
    """
    check_objective(objective)
    a, b = forward_table(schedule).unbind(1)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    c, d = {"pred_noise": (one, zero), "pred_x0": (zero, one), "pred_v": (a, -b)}[objective]
    return torch.stack([c, d, weight.double().cpu()], dim=1)


def prediction_table(schedule: Schedule, objective: str) -> torch.Tensor:
    """Columns p, q of x0 = p·x_t + q·out: how each objective's output is read as x0.

    Returns:
        (T, 2) float64.
    """
    check_objective(objective)
    a, b = forward_table(schedule).unbind(1)
    p, q = {
        "pred_noise": (1 / a, -torch.sqrt(1 / a**2 - 1)),
        "pred_x0": (torch.zeros_like(a), torch.ones_like(a)),
        "pred_v": (a, -b),
    }[objective]
    return torch.stack([p, q], dim=1)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler as numbers.

    Args:
        times: the timestep that the model sees at each of the S steps, descending.
        table: (S, 6) float64, columns p, q, r, s, u, σ, one row per step.
    """

    times: tuple[int, ...]
    table: torch.Tensor

    @property
    def uses_x_start_previous(self) -> bool:
        """Whether any step reads the x0 of the step before it (u ≠ 0)."""
        return bool((self.table[:, 4] != 0).any())


def sampling_times(num_timesteps: int, sampling_timesteps: int) -> tuple[int, ...]:
    """The timesteps visited, descending; with all of them T−1 … 0, with fewer the peer's spacing.

    Raises:
        ValueError: `sampling_timesteps` is not in [1, num_timesteps].
    """
    if not 1 <= sampling_timesteps <= num_timesteps:
        raise ValueError(f"sampling_timesteps must be in [1, timesteps = {num_timesteps}], got {sampling_timesteps}")
    # The peer's numbers, float32 truncation included; the last of them is −1, which stands for the data itself.
    times = torch.linspace(-1, num_timesteps - 1, steps=sampling_timesteps + 1).int().tolist()
    return tuple(reversed(times[1:]))


def sampler_table(
    schedule: Schedule, objective: str, sampler: str, sampling_timesteps: int, eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler over `sampling_timesteps` of the schedule's timesteps.

    Args:
        sampler: "ddpm", ancestral sampling, on fewer timesteps with the respaced posterior (Nichol & Dhariwal 2021,
            section 4); "ddim" with `eta` (Song et al. 2021, eq. 12 and 16), ε derived again from the clipped x0;
            "dpmpp_2m", the multistep DPM-Solver++ of second order (Lu et al. 2022, algorithm 2), which takes its first
            step, and its last, onto the data, with first order.
        eta: DDIM's noise: 0 is deterministic, 1 has the variance of ancestral sampling. Others ignore it.

    Raises:
        ValueError: an unknown name, a number of steps outside the schedule, a negative or non-finite eta.
    """
    check_sampler(sampler)
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"ddim_sampling_eta must be finite and at least 0, got {eta}")
    times = sampling_times(schedule.num_timesteps, sampling_timesteps)
    index = torch.tensor(times)
    alphas_cumprod = schedule.alphas_cumprod[index]  # (S,) ᾱ now
    alphas_cumprod_next = F.pad(alphas_cumprod[1:], (0, 1), value=1.0)  # (S,) ᾱ after the step; 1 is the data
    columns = {
        "ddpm": _ddpm_columns,
        "ddim": lambda now, after: _ddim_columns(now, after, eta),
        "dpmpp_2m": _dpmpp_2m_columns,
    }[sampler](alphas_cumprod, alphas_cumprod_next)
    prediction = prediction_table(schedule, objective)[index]  # (S, 2)
    return SamplerTable(times, torch.cat([prediction, torch.stack(columns, dim=1)], dim=1))


def _ddpm_columns(now: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """r, s, u, σ of the posterior q(x_next | x, x0) (Ho et al. 2020, eq. 7), β = 1 − ᾱ/ᾱ_next of the step taken."""
    alpha = now / after
    beta = 1 - alpha
    r = beta * after.sqrt() / (1 - now)
    s = (1 - after) * alpha.sqrt() / (1 - now)
    sigma = (beta * (1 - after) / (1 - now)).sqrt()
    return r, s, torch.zeros_like(r), sigma


def _ddim_columns(now: torch.Tensor, after: torch.Tensor, eta: float) -> tuple[torch.Tensor, ...]:
    """r, s, u, σ of DDIM (Song et al. 2021, eq. 12, σ of eq. 16), with ε = (x − √ᾱ x0) / √(1 − ᾱ) put in."""
    sigma = eta * ((1 - now / after) * (1 - after) / (1 - now)).sqrt()
    direction = (1 - after - sigma**2).clamp(min=0).sqrt()  # of ε
    s = direction / (1 - now).sqrt()
    r = after.sqrt() - s * now.sqrt()
    return r, s, torch.zeros_like(r), sigma


def _dpmpp_2m_columns(now: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """r, s, u, σ of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    x ← (σ_after/σ_now)·x − α_after·(e^(−h) − 1)·D with D = (1 + 1/(2ρ))·x0 − 1/(2ρ)·x0_previous, ρ = h_previous/h and
    h the step in λ = log(α/σ). The last step ends on σ = 0 (h = ∞), where x is x0.
    """
    half_log_snr = 0.5 * (torch.log(now) - torch.log1p(-now))  # λ
    half_log_snr_after = 0.5 * (torch.log(after) - torch.log1p(-after))
    h = half_log_snr_after - half_log_snr
    s = ((1 - after) / (1 - now)).sqrt()
    gain = -after.sqrt() * torch.expm1(-h)
    correction = torch.zeros_like(h)
    correction[1:] = h[1:] / (2 * h[:-1])
    correction[-1] = 0
    return gain * (1 + correction), s, -gain * correction, torch.zeros_like(h)


def check_objective(objective: str) -> None:
    """Raise ValueError unless it is a known objective."""
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} (noise, image start, or v of the progressive "
            f"distillation paper), got {objective!r}"
        )


def check_sampler(sampler: str) -> None:
    """Raise ValueError unless it is a known sampler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
