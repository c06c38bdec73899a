"""Beta schedules and everything that follows from them, in float64.

A diffusion process is a handful of numbers per timestep. This file computes them once. The kernels read columns of the
tables made here and in samplers.py, and know no schedule, objective or sampler by name:

    forward diffusion   x_t = a·x0 + b·ε                                       columns a, b
    loss                w · mean((out − (c·ε + d·x0))²) per sample             columns c, d, w
    sampler step        x0 = clip(p·x + q·out);  x ← r·x0 + s·x + u·x0_previous + σ·ε    columns p, q, r, s, u, σ
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion.levels import TARGETS, Levels, NoiseScale, prediction
from ddpm_fast.diffusion.weightings import Weighting, find_weighting
from ddpm_fast.diffusion.weightings import snr as snr_weighting
from ddpm_fast.diffusion.weightings import uniform as uniform_weighting

OBJECTIVES = tuple(TARGETS)
_LARGEST = torch.finfo(torch.float32).max


def linear_beta_schedule(timesteps: int) -> torch.Tensor:
    """Linear schedule (Ho et al. 2020, section 4), stretched to any number of timesteps.

    Returns:
        (T,) float64.
    """
    scale = 1000 / timesteps
    return torch.linspace(scale * 0.0001, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> torch.Tensor:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17).

    Returns:
        (T,) float64, clipped to [0, 0.999].
    """
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    return _betas_from_alphas_cumprod(torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2)


def sigmoid_beta_schedule(
    timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5
) -> torch.Tensor:
    """Sigmoid schedule (Jabri et al. 2022, arXiv 2212.11972, algorithm 1); good for images larger than 64×64.

    `clamp_min` is accepted and not used, as in upstream.

    Returns:
        (T,) float64, clipped to [0, 0.999].
    """
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    # The two ends are float32 in upstream, and its buffers and checkpoints carry that rounding.
    v_start = torch.tensor(start / tau, dtype=torch.float32, device="cpu").sigmoid()
    v_end = torch.tensor(end / tau, dtype=torch.float32, device="cpu").sigmoid()
    return _betas_from_alphas_cumprod((-((t * (end - start) + start) / tau).sigmoid() + v_end) / (v_end - v_start))


def given_betas(timesteps: int, betas: Sequence[float]) -> torch.Tensor:
    """Betas as they are given.

    Returns:
        (T,) float64.

    Raises:
        ValueError: there are not T of them.
    """
    given = torch.tensor([float(beta) for beta in betas], dtype=torch.float64, device="cpu")
    if given.shape != (timesteps,):
        raise ValueError(f"betas must be timesteps = {timesteps} numbers, got {len(given)}")
    return given


def _betas_from_alphas_cumprod(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """(T + 1,) values proportional to ᾱ from t = −1 on → (T,) betas."""
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    return torch.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


BETA_SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule, "sigmoid": sigmoid_beta_schedule}
GIVEN = "given"  # the schedule whose betas are an argument


def make_betas(beta_schedule: str, timesteps: int, **kwargs: Any) -> torch.Tensor:
    """Betas of a named schedule, or of "given" the keyword `betas`, checked.

    Raises:
        ValueError: unknown schedule, or fewer than one timestep.
    """
    functions: dict[str, Any] = {**BETA_SCHEDULES, GIVEN: given_betas}
    if beta_schedule not in functions:
        raise ValueError(f"beta_schedule must be one of {', '.join(functions)}, got {beta_schedule!r}")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a positive int, got {timesteps!r}")
    return functions[beta_schedule](timesteps, **kwargs)


@dataclass(frozen=True, eq=False)
class Schedule(NoiseScale):
    """All per-timestep numbers of a diffusion process in T discrete steps.

    Args:
        betas: (T,) float64, each in (0, 1).

    Raises:
        ValueError: a beta is outside (0, 1), as the linear schedule makes them with too few timesteps.

    Every property is (T,) float64 on the CPU. ᾱ is `alphas_cumprod`, q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) (Ho et al.
    2020, eq. 4).
    """

    betas: torch.Tensor

    is_discrete = True
    last = 0.0
    # No signal is left at T − 1 (Lin et al. 2023).
    has_zero_terminal_snr: ClassVar[bool]

    def __post_init__(self) -> None:
        inside = (self.betas > 0) & (self.betas < 1)
        object.__setattr__(self, "has_zero_terminal_snr", self.betas[-1].item() == 1)
        inside[-1] |= self.has_zero_terminal_snr
        if not inside.all():
            t = int((~inside).nonzero()[0])
            raise ValueError(
                f"beta_schedule must give betas in (0, 1), got {self.betas[t].item():.4g} at t = {t} of "
                f"{self.num_timesteps} timesteps; the linear schedule needs at least 21 timesteps"
            )

    def with_zero_terminal_snr(self) -> Schedule:
        """The schedule with √ᾱ shifted and scaled so that no signal is left at T − 1 (Lin et al. 2023, algorithm 1)."""
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
        return Schedule(1 - alphas_cumprod / F.pad(alphas_cumprod[:-1], (1, 0), value=1.0))

    @property
    def num_timesteps(self) -> int:
        return self.betas.shape[0]

    @property
    def first(self) -> float:  # type: ignore[override]  # it follows from the betas
        return self.num_timesteps - 1.0

    @cached_property
    def levels(self) -> Levels:
        """All T levels, by timestep."""
        a, b = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return Levels(torch.arange(self.num_timesteps, dtype=torch.float64, device="cpu"), a, b)

    def at(self, times: torch.Tensor) -> Levels:
        """The levels at any times in [0, T − 1]; between integers λ is linear, as in k-diffusion."""
        everywhere = self.levels
        below = times.floor().long()
        fraction = times - below
        if not fraction.any():
            return Levels(times, everywhere.a[below], everywhere.b[below])
        half_log_snr = everywhere.half_log_snr
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        between = half_log_snr[below] + fraction * (half_log_snr[above] - half_log_snr[below])
        is_integer = fraction == 0
        a = torch.where(is_integer, everywhere.a[below], (2 * between).sigmoid().sqrt())
        b = torch.where(is_integer, everywhere.b[below], (-2 * between).sigmoid().sqrt())
        return Levels(times, a, b)

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        ascending = self.levels.half_log_snr.flip(0)  # by t from T − 1 down to 0
        if ascending[0].isinf():  # no signal at T − 1: nothing lies between it and T − 2
            ascending = ascending[1:]
        given = half_log_snr.clamp(ascending[0], ascending[-1])
        above = torch.searchsorted(ascending, given.contiguous()).clamp(1, max(1, len(ascending) - 1))
        above = above.clamp(max=len(ascending) - 1)
        below = (above - 1).clamp(min=0)
        width = (ascending[above] - ascending[below]).clamp(min=1e-300)
        times = len(ascending) - 1 - below - (given - ascending[below]) / width
        return torch.where(half_log_snr == -math.inf, self.first, times)

    def own_times(self, steps: int) -> torch.Tensor:
        """Upstream's spacing, float32 truncation included; with all of them T − 1 … 0."""
        # The last of the numbers is −1, which means the data itself.
        times = torch.linspace(-1, self.num_timesteps - 1, steps=steps + 1, device="cpu").int()
        return times[1:].flip(0).double()

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
        """Upstream's buffers by name, float64, in upstream's order (except the loss weight)."""
        betas, alphas_cumprod, alphas_cumprod_prev = self.betas, self.alphas_cumprod, self.alphas_cumprod_prev
        return {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": torch.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": torch.sqrt(1.0 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": torch.log(1.0 - alphas_cumprod),
            # Finite where there is no signal: an average of weights would make NaN of two infinities.
            "sqrt_recip_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod).clamp(max=_LARGEST),
            "sqrt_recipm1_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod - 1).clamp(max=_LARGEST),
            "posterior_variance": self.posterior_variance,
            # Clipped because the posterior variance is 0 at the start of the chain.
            "posterior_log_variance_clipped": torch.log(self.posterior_variance.clamp(min=1e-20)),
            # x0's and x_t's coefficients in the posterior mean (Ho et al. 2020, eq. 7).
            "posterior_mean_coef1": betas * torch.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * torch.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        }


def choose_weighting(
    loss_weighting: str | Weighting | None, options: Mapping[str, Any] | None, min_snr_gamma: float | None
) -> Weighting:
    """The weight of x0's squared error as a function of the SNR, from a constructor's arguments.

    Raises:
        TypeError, ValueError: an unknown name or option, or two weightings.
    """
    if min_snr_gamma is not None:
        if loss_weighting is not None:
            raise ValueError("loss_weighting must be None with min_snr_loss_weight=True, which is 'min_snr'")
        return find_weighting("min_snr", {"gamma": min_snr_gamma})
    return find_weighting("snr" if loss_weighting is None else loss_weighting, options)


def loss_weight(schedule: Schedule, objective: str, weighting: Weighting = snr_weighting) -> torch.Tensor:
    """w of the loss table: the weight of each timestep's squared error.

    Args:
        weighting: the weight of x0's squared error as a function of the SNR.

    Returns:
        (T,) float64.
    """
    check_objective(objective)
    if weighting is uniform_weighting:
        return torch.ones_like(schedule.snr)
    snr = schedule.snr
    weight = weighting(snr)
    if not isinstance(weight, torch.Tensor) or weight.shape != snr.shape or not bool((weight >= 0).all()):
        raise ValueError("loss_weighting must give a weight of at least 0 for each of the SNRs, (N,)")
    return {"pred_noise": weight / snr, "pred_x0": weight, "pred_v": weight / (snr + 1)}[objective]


def forward_table(schedule: Schedule) -> torch.Tensor:
    """Columns a, b of x_t = a·x0 + b·ε (Ho et al. 2020, eq. 4).

    Returns:
        (T, 2) float64.
    """
    return torch.stack([schedule.levels.a, schedule.levels.b], dim=1)


def loss_table(schedule: Schedule, objective: str, weight: torch.Tensor) -> torch.Tensor:
    """Columns c, d, w of w · mean((out − (c·ε + d·x0))²).

    The target is ε (Ho et al. 2020, eq. 14), x0, or v = √ᾱ ε − √(1 − ᾱ) x0 (Salimans & Ho 2022, appendix D).

    Args:
        weight: (T,), as `loss_weight` makes it.

    Returns:
        (T, 3) float64.
    """
    check_objective(objective)
    return torch.stack([*TARGETS[objective](schedule.levels), weight.cpu().double()], dim=1)


def prediction_table(schedule: Schedule, objective: str) -> torch.Tensor:
    """Columns p, q of x0 = p·x_t + q·out: how each objective's output is read as x0.

    Returns:
        (T, 2) float64.
    """
    check_objective(objective)
    return torch.stack(prediction(schedule.levels, TARGETS[objective]), dim=1)


def variational_bound_table(
    schedule: Schedule, objective: str, weight: torch.Tensor, bound_weight: float, variance_at_zero: str = "clipped"
) -> torch.Tensor:
    """The table of `ops.variational_bound`: squared error with its weight, and the bound with one for all timesteps.

    The learned variance lies between the posterior's and β in logarithms (Nichol & Dhariwal 2021, eq. 15).

    Args:
        weight: (T,) of the squared error, as `loss_weight` makes it.
        bound_weight: of the bound, in bits.
        variance_at_zero: the least variance at t = 0, where the posterior's is 0: "clipped", 1e-20 as upstream's, or
            "next", that of t = 1 as OpenAI's.

    Returns:
        (T, 14) float64.
    """
    buffers, levels = schedule.buffers(), schedule.levels
    low = buffers["posterior_log_variance_clipped"].clone()
    if variance_at_zero == "next":
        low[0] = low[min(1, len(low) - 1)]
    is_decoder = torch.zeros_like(low)
    is_decoder[0] = 1
    columns = {
        "a": levels.a,
        "b": levels.b,
        "c": TARGETS[objective](levels)[0],
        "d": TARGETS[objective](levels)[1],
        "w": weight.cpu().double(),
        "p": prediction_table(schedule, objective)[:, 0],
        "q": prediction_table(schedule, objective)[:, 1],
        "m1": buffers["posterior_mean_coef1"],
        "m2": buffers["posterior_mean_coef2"],
        "low": low,
        "high": torch.log(schedule.betas),
        "log_var_true": low,
        "is_decoder": is_decoder,
        "weight": torch.full_like(low, bound_weight),
    }
    return torch.stack(list(columns.values()), dim=1)


def check_objective(objective: str) -> None:
    """Raise ValueError unless it is a known objective."""
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} (noise, image start, or v of the progressive "
            f"distillation paper), got {objective!r}"
        )
