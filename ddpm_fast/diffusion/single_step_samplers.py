"""Samplers whose steps read nothing of the steps before: DDPM, DDIM, Euler, Heun, DPM-Solver++(2S).

Every one is finite where the first level has no signal (a = 0): its step there is of first order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ddpm_fast.diffusion.levels import Levels
from ddpm_fast.diffusion.samplers import Rows, Walk, kept_variance, sampler, to_level


@sampler("ddpm")
def ddpm(walk: Walk, *, large: float = 0.0) -> Rows:
    """Ancestral sampling: the posterior q(x_next | x, x0) (Ho et al. 2020, eq. 7).

    On fewer than T timesteps it is the respaced posterior (Nichol & Dhariwal 2021, section 4).

    Args:
        large: where the log variance lies between the posterior's, 0, and that of the forward step, 1 (Nichol &
            Dhariwal 2021, eq. 15). A learned variance takes the place of this number.
    """
    (_, a, b), (_, a_after, b_after) = walk.now, walk.after
    kept = kept_variance(walk)
    r = a_after * (1 - kept)
    s = (b_after / b) ** 2 * (a / a_after)
    spread = torch.where(b_after > 0, (b / b_after).log(), 0.0)
    sigma = b_after * (1 - kept).sqrt()
    if large:
        return Rows(walk.now, r, s, torch.zeros_like(r), sigma * (large * spread).exp())
    return Rows(walk.now, r, s, torch.zeros_like(r), sigma, log_spread=spread)


@sampler("ddim")
def ddim(walk: Walk, *, eta: float = 0.0) -> Rows:
    """DDIM (Song et al. 2021, eq. 12, σ of eq. 16), with ε = (x − a·x0)/b put in.

    Args:
        eta: the noise: 0 is deterministic, 1 has the variance of ancestral sampling.
    """
    (_, a, b), (_, a_after, b_after) = walk.now, walk.after
    sigma = eta * b_after * (1 - kept_variance(walk)).sqrt()
    s = (b_after**2 - sigma**2).clamp(min=0).sqrt() / b  # of ε, over b
    return Rows(walk.now, a_after - s * a, s, torch.zeros_like(s), sigma)


@sampler("euler_ancestral", spacing="log_snr")
def euler_ancestral(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Euler's method to a lower σ, then noise up to the next one (k-diffusion's `sample_euler_ancestral`).

    Args:
        eta: how much of the next σ is new noise, as in DDIM, and at most all of it.
        s_noise: what the new noise is multiplied with.
    """
    after = walk.after
    up = _sigma_up(walk, eta)
    r, s = to_level(walk.now, Levels(after.times, after.a, after.b * (1 - up**2).sqrt()))
    return Rows(walk.now, r, s, torch.zeros_like(r), s_noise * after.b * up)


def _sigma_up(walk: Walk, eta: float) -> torch.Tensor:
    """(S,) the σ of new noise over σ_after: η·√(1 − σ²_after/σ²), at most 1 (k-diffusion's `get_ancestral_step`)."""
    return (eta * (1 - kept_variance(walk)).sqrt()).clamp(max=1)


@dataclass
class _Row:
    """One row, in plain numbers."""

    level: tuple[float, float, float]  # time, a, b
    r: float
    s: float
    u: float = 0.0
    sigma: float = 0.0

    def then(self, factor: float, sigma: float) -> None:
        """Multiply what the row makes, and add noise to it."""
        self.r, self.s, self.u, self.sigma = factor * self.r, factor * self.s, factor * self.u, sigma


def _as_rows(rows: list[_Row], first_scale: float = 1.0) -> Rows:
    times, a, b, r, s, u, sigma = torch.tensor(
        [[*row.level, row.r, row.s, row.u, row.sigma] for row in rows], dtype=torch.float64, device="cpu"
    ).unbind(1)
    return Rows(Levels(times, a, b), r, s, u, sigma, first_scale)


def _each(levels: Levels) -> list[tuple[float, float, float]]:
    return list(zip(*(column.tolist() for column in levels), strict=True))


def _euler_row(level: tuple[float, float, float], after: tuple[float, float, float]) -> _Row:
    s = after[2] / level[2]
    return _Row(level, after[1] - s * level[1], s)


def _churned(walk: Walk, s_churn: float, s_tmin: float, s_tmax: float) -> Levels:
    """The levels σ̂ = (1 + γ)·σ from which the steps start (Karras et al. 2022, algorithm 2, lines 4 to 6)."""
    sigma = walk.now.sigma
    gamma = min(s_churn / len(sigma), math.sqrt(2) - 1)
    is_churned = (gamma > 0) & (sigma >= s_tmin) & (sigma <= s_tmax) & sigma.isfinite()
    higher = walk.between(walk.now.half_log_snr - math.log1p(gamma))
    return Levels(*(torch.where(is_churned, one, other) for one, other in zip(higher, walk.now, strict=True)))


def _karras_rows(walk: Walk, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float, *, corrects: bool) -> Rows:
    """Karras et al. 2022, algorithm 2; without correction it is Euler's method.

    It is linear in X = x/n at c = b/n, dX/dc = (X − x0)/c. n = a gives c = σ, and n = a + b a flow's time. The noise
    that raises σ before a step belongs to the row before.
    """
    line = 1.0 if walk.is_flow else 0.0
    rows: list[_Row] = []
    first_scale = 1.0
    steps = zip(_each(walk.now), _each(_churned(walk, s_churn, s_tmin, s_tmax)), _each(walk.after), strict=True)
    for now, level, after in steps:
        (_, a_now, b_now), (_, a, b) = now, level
        if level != now:
            raised = a / a_now
            noise = s_noise * math.sqrt(max(b**2 - (raised * b_now) ** 2, 0.0))
            if rows:
                rows[-1].then(raised, noise)
            else:
                scale = walk.scale.first_scale(walk.now)
                first_scale = math.hypot(raised * scale, noise) / scale
        rows.append(_euler_row(level, after))
        if corrects and after[2] > 0 and a + line * b > 0:
            rows.append(_trapezoid_row(level, after, line))
    return _as_rows(rows, first_scale)


def _trapezoid_row(level: tuple[float, float, float], after: tuple[float, float, float], line: float) -> _Row:
    """Heun's second half: from Euler's X' and x0' at c' = ρ·c back over X = (X' − (1 − ρ)·x0)/ρ with the mean slope."""
    (_, a, b), (_, a_after, b_after) = level, after
    n, n_after = a + line * b, a_after + line * b_after
    rho = (b_after / n_after) / (b / n)
    half = (rho - 1) / 2  # (c' − c)/2 over c
    ahead = (1 - 1 / rho) / 2  # and over c'
    s = (1 + half) / rho + ahead
    u = n_after * (-(1 + half) * (1 - rho) / rho - half)
    return _Row(after, -n_after * ahead, s, u)


@sampler("euler", spacing="log_snr")
def euler(
    walk: Walk, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Rows:
    """Euler's method for the probability flow, with the churn of `heun` (k-diffusion's `sample_euler`).

    Without churn it is DDIM without noise, and a flow's Euler steps.
    """
    return _karras_rows(walk, s_churn, s_tmin, s_tmax, s_noise, corrects=False)


@sampler("heun", spacing="log_snr")
def heun(
    walk: Walk, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Rows:
    """Heun's method with churn (Karras et al. 2022, algorithm 2): S steps of two network calls, the last of one.

    For a flow it is Heun's method in the flow's time, else in σ.

    Args:
        s_churn: how much σ is raised before a step: by min(s_churn/S, √2 − 1) of it.
        s_tmin, s_tmax: between which σ.
        s_noise: what the noise that raises it is multiplied with.
    """
    return _karras_rows(walk, s_churn, s_tmin, s_tmax, s_noise, corrects=True)


@sampler("dpmpp_2s_a", spacing="log_snr")
def dpmpp_2s_a(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """DPM-Solver++(2S) with ancestral noise (k-diffusion's `sample_dpmpp_2s_ancestral`).

    A step is of two network calls, the second in the middle of λ; the last is of one. Where the process is discrete the
    times in the middle may be fractions.

    Args:
        eta, s_noise: as of `euler_ancestral`.
    """
    now, after = walk.now, walk.after
    up = _sigma_up(walk, eta)
    # σ to which the deterministic part of a step goes; 0 is of first order.
    down = torch.where((up < 1) & (now.a > 0), (1 - up**2).sqrt() * after.b / after.a, 0.0)
    middle = torch.where(down > 0, -(now.sigma.log() + down.log()) / 2, now.half_log_snr)
    is_after = (middle - after.half_log_snr).abs() < 1e-9  # as with η = 1
    middles = Levels(
        *(torch.where(is_after, other, one) for one, other in zip(walk.between(middle), after, strict=True))
    )
    rows: list[_Row] = []
    steps = zip(_each(now), _each(middles), _each(after), down.tolist(), up.tolist(), strict=True)
    for level, half_way, (time, a_after, b_after), sigma_down, share in steps:
        noise = s_noise * b_after * share
        (_, a, b), (_, a_middle, b_middle) = level, half_way
        if sigma_down == 0:
            rows.append(_euler_row(level, (time, a_after, b_after * math.sqrt(1 - share**2))))
            rows[-1].sigma = noise
            continue
        sigma, sigma_middle = b / a, b_middle / a_middle
        rows.append(_euler_row(level, half_way))
        s = a_after * sigma_down / b_middle
        u = -a_after * sigma_down / sigma_middle * (1 - sigma_middle / sigma)
        rows.append(_Row(half_way, a_after * (1 - sigma_down / sigma), s, u, noise))
    return _as_rows(rows)
