"""Samplers as tables: each is one function, registered under the name that the API and the command line take.

A step of every sampler is x0 = clip(p·x + q·out); x ← r·x0 + s·x + u·x0_previous + σ·ε. The objective gives p and q; a
sampler gives r, s, u and σ for each of its steps, in float64. A new sampler is one decorated function:

    @sampler("euler")
    def euler(schedule: Schedule, times: tuple[int, ...], eta: float) -> Rows:
        now, after = alphas_cumprod_of_steps(schedule, times)
        ...
        return Rows(times, r, s, u, sigma)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion.schedules import Schedule, prediction_table


class Rows(NamedTuple):
    """What a sampler does at each of its S steps: one network call and one update per row.

    Args:
        times: the timestep that the network sees; S of them. A sampler of higher order may visit one more than once.
        r, s, u, sigma: (S,) float64, the factors of x0, x, x0 of the row before, and ε.
    """

    times: tuple[int, ...]
    r: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor
    sigma: torch.Tensor


MakeRows = Callable[[Schedule, tuple[int, ...], float], Rows]

SAMPLERS: dict[str, MakeRows] = {}


def sampler(name: str) -> Callable[[MakeRows], MakeRows]:
    """Register a function (schedule, times, eta) -> Rows as the sampler `name`.

    Args of the function:
        schedule: the process.
        times: the timesteps to visit, descending, as `sampling_times` spaces them.
        eta: `ddim_sampling_eta`; samplers without such a parameter ignore it.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: MakeRows) -> MakeRows:
        if name in SAMPLERS:
            raise ValueError(f"a sampler of the name {name!r} is registered already")
        SAMPLERS[name] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler as numbers.

    Args:
        times: the timestep that the network sees at each of the S steps.
        table: (S, 6) float64, columns p, q, r, s, u, σ, one row per step.
        sampler: the name of the sampler.
    """

    times: tuple[int, ...]
    table: torch.Tensor
    sampler: str

    @property
    def uses_x_start_previous(self) -> bool:
        """True if any step reads the x0 of the step before it (u ≠ 0)."""
        return bool((self.table[:, 4] != 0).any())


def sampling_times(num_timesteps: int, sampling_timesteps: int) -> tuple[int, ...]:
    """The timesteps visited, descending; with all of them T−1 … 0, with fewer upstream's spacing.

    Raises:
        ValueError: `sampling_timesteps` is not in [1, num_timesteps].
    """
    if not 1 <= sampling_timesteps <= num_timesteps:
        raise ValueError(f"sampling_timesteps must be in [1, timesteps = {num_timesteps}], got {sampling_timesteps}")
    # Upstream's numbers, float32 truncation included; the last of them is −1, which means the data itself.
    times = torch.linspace(-1, num_timesteps - 1, steps=sampling_timesteps + 1, device="cpu").int().tolist()
    return tuple(reversed(times[1:]))


def sampler_table(
    schedule: Schedule, objective: str, sampler: str, sampling_timesteps: int, eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler over `sampling_timesteps` of the schedule's timesteps.

    Args:
        objective: "pred_noise", "pred_x0" or "pred_v".
        sampler: a name in `SAMPLERS`.
        eta: DDIM's noise: 0 is deterministic, 1 has the variance of ancestral sampling. Others ignore it.

    Raises:
        ValueError: an unknown name, a number of steps outside the schedule, a negative or non-finite eta.
    """
    check_sampler(sampler)
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"ddim_sampling_eta must be finite and at least 0, got {eta}")
    rows = SAMPLERS[sampler](schedule, sampling_times(schedule.num_timesteps, sampling_timesteps), eta)
    prediction = prediction_table(schedule, objective)[torch.tensor(rows.times, device="cpu")]  # (S, 2)
    columns = torch.stack([rows.r, rows.s, rows.u, rows.sigma], dim=1)
    return SamplerTable(rows.times, torch.cat([prediction, columns], dim=1), sampler)


def alphas_cumprod_of_steps(schedule: Schedule, times: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """ᾱ before and after each step from one of `times` to the next, and from the last onto the data, where ᾱ is 1.

    Returns:
        Two (S,) float64.
    """
    now = schedule.alphas_cumprod[torch.tensor(times, device="cpu")]
    return now, F.pad(now[1:], (0, 1), value=1.0)


@sampler("ddpm")
def ddpm(schedule: Schedule, times: tuple[int, ...], eta: float) -> Rows:
    """Ancestral sampling: the posterior q(x_next | x, x0) (Ho et al. 2020, eq. 7), with β = 1 − ᾱ/ᾱ_next of the step.

    On fewer than T timesteps it is the respaced posterior (Nichol & Dhariwal 2021, section 4).
    """
    now, after = alphas_cumprod_of_steps(schedule, times)
    alpha = now / after
    beta = 1 - alpha
    r = beta * after.sqrt() / (1 - now)
    s = (1 - after) * alpha.sqrt() / (1 - now)
    sigma = (beta * (1 - after) / (1 - now)).sqrt()
    return Rows(times, r, s, torch.zeros_like(r), sigma)


@sampler("ddim")
def ddim(schedule: Schedule, times: tuple[int, ...], eta: float) -> Rows:
    """DDIM (Song et al. 2021, eq. 12, σ of eq. 16), with ε = (x − √ᾱ x0) / √(1 − ᾱ) put in."""
    now, after = alphas_cumprod_of_steps(schedule, times)
    sigma = eta * ((1 - now / after) * (1 - after) / (1 - now)).sqrt()
    direction = (1 - after - sigma**2).clamp(min=0).sqrt()  # of ε
    s = direction / (1 - now).sqrt()
    r = after.sqrt() - s * now.sqrt()
    return Rows(times, r, s, torch.zeros_like(r), sigma)


@sampler("dpmpp_2m")
def dpmpp_2m(schedule: Schedule, times: tuple[int, ...], eta: float) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); its first and last step are of first order.

    x ← (σ_after/σ_now)·x − α_after·(e^(−h) − 1)·D with D = (1 + 1/(2ρ))·x0 − 1/(2ρ)·x0_previous, ρ = h_previous/h and
    h the step in λ = log(α/σ). The last step ends on σ = 0 (h = ∞), where x is x0.
    """
    now, after = alphas_cumprod_of_steps(schedule, times)
    half_log_snr = 0.5 * (torch.log(now) - torch.log1p(-now))  # λ
    half_log_snr_after = 0.5 * (torch.log(after) - torch.log1p(-after))
    h = half_log_snr_after - half_log_snr
    s = ((1 - after) / (1 - now)).sqrt()
    x_start_factor = -after.sqrt() * torch.expm1(-h)
    correction = torch.zeros_like(h)
    correction[1:] = h[1:] / (2 * h[:-1])
    correction[-1] = 0
    return Rows(times, x_start_factor * (1 + correction), s, -x_start_factor * correction, torch.zeros_like(h))


def check_sampler(name: str) -> None:
    """Raise ValueError unless a sampler of this name is registered."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
