"""Samplers as tables: each is one function, registered under the name that the API and the command line take.

A step of every sampler is

    x0 = clip(p·x + q·out);  x ← r·x0 + s·x + u·x0_previous + u2·x0_previous2 + u3·x0_previous3 + σ·ε

The process gives p and q; a sampler gives r, s, u and σ for each of its steps, in float64. A new sampler is one
decorated function:

    @sampler("euler")
    def euler(walk: Walk) -> Rows:
        now, after = walk.now, walk.after
        ...
        return Rows(now, r, s, u, sigma)
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion import spacings
from ddpm_fast.diffusion.levels import Levels, NoiseScale, Target, prediction
from ddpm_fast.runtime.plain import as_number, shown

# The default where few network calls are wanted: see the table of docs/samplers.md.
FEW_STEPS = "dpmpp_2m"


@dataclass(frozen=True, eq=False)
class Walk:
    """The levels of noise that a sampler goes along.

    Args:
        scale: the process.
        now: S levels before each step, from most noise to least.
        after: S levels after each step: those of the next, and at last the data itself, a = 1 and b = 0.
    """

    scale: NoiseScale
    now: Levels
    after: Levels

    def between(self, half_log_snr: torch.Tensor) -> Levels:
        """Levels of given λ, for samplers that call the network between two of theirs.

        Where the process is discrete their times may be fractions.
        """
        times = self.scale.times_of(half_log_snr)
        if self.scale.is_discrete:  # the inverse rounds
            times = torch.where((times - times.round()).abs() < 1e-6, times.round(), times)
        return self.scale.at(times)

    @property
    def is_flow(self) -> bool:
        """True if the levels lie on a + b = 1, so that b is a flow's time (Liu et al. 2023)."""
        return bool(((self.now.a + self.now.b - 1).abs() < 1e-9).all())


def walk_along(scale: NoiseScale, times: torch.Tensor) -> Walk:
    """A walk through levels at these times, (S,) float64 from most noise to least, and then onto the data."""
    now = scale.at(times)
    ends = {"times": float("nan"), "a": 1.0, "b": 0.0}
    after = Levels(*(F.pad(getattr(now, name)[1:], (0, 1), value=end) for name, end in ends.items()))
    return Walk(scale, now, after)


class Rows(NamedTuple):
    """What a sampler does at each of its steps: one network call and one update per row.

    Args:
        levels: where the network is called; N of them. A sampler of higher order may visit one more than once.
        r, s, sigma: (N,) float64, the factors of x0, x and ε.
        u: (N,) or (N, H), H up to 3: the factors of the x0 of the rows before, newest first.
        first_scale: what the first state is multiplied with, besides the process's own `first_scale`.
        log_spread: (N,) log of the largest σ that a learned variance may choose over the σ here; None: it chooses none.
        kept: (N, 2), e and f of e·x + f·x0: later rows read this by u2 and u3 where it is not 0, in place of an x0.
    """

    levels: Levels
    r: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor
    sigma: torch.Tensor
    first_scale: float = 1.0
    log_spread: torch.Tensor | None = None
    kept: torch.Tensor | None = None


MakeRows = Callable[..., Rows]


@dataclass(frozen=True)
class Sampler:
    """A registered sampler: its function, and the spacing that it uses unless another is asked for."""

    make_rows: MakeRows
    spacing: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that it takes, with their defaults."""
        parameters = list(inspect.signature(self.make_rows).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


SAMPLERS: dict[str, Sampler] = {}


def sampler(name: str, *, spacing: str = "own") -> Callable[[MakeRows], MakeRows]:
    """Register a function (walk, *, option=default, ...) -> Rows as the sampler `name`.

    Args:
        spacing: the spacing that is best for it, by the measurements of docs/samplers.md.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: MakeRows) -> MakeRows:
        if name in SAMPLERS:
            raise ValueError(f"a sampler of the name {name!r} is registered already")
        SAMPLERS[name] = Sampler(function, spacing)
        return function

    return register


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler as numbers.

    Args:
        times: what the network is told at each of the N rows; integers where the process is discrete, unless the
            sampler calls the network between two timesteps.
        table: (N, 6) float64, columns p, q, r, s, u, σ, one row per network call; (N, 10), and u2, u3, lo, hi, for
            samplers of higher order or a learned variance; (N, 12), and e, f, for those that keep noise; (N, 25) with
            the columns of `guidance`.
        sampler: the name of the sampler.
        first_scale: standard deviation of the state at the beginning.
        num_timesteps: T, where the process is discrete.
        num_previous: how many x0 of earlier steps the rows read, 0 to 3.
        levels: of noise, where each row calls the network; None where nobody needs them.
    """

    times: tuple[float, ...]
    table: torch.Tensor
    sampler: str
    first_scale: float = 1.0
    num_timesteps: int | None = None
    num_previous: int = 0
    levels: Levels | None = None

    @property
    def uses_x_start_previous(self) -> bool:
        """True if any step reads the x0 of the step before it."""
        return self.num_previous > 0

    @functools.cached_property
    def ends_on_x_start(self) -> bool:
        """True if the last state is the last estimate of x0."""
        return self.table[-1, 2:6].tolist() == [1, 0, 0, 0]

    @property
    def has_integer_times(self) -> bool:
        return all(isinstance(time, int) for time in self.times)


def sampler_table(
    scale: NoiseScale,
    target: Target,
    sampler: str,
    steps: int | None,
    *,
    spacing: str | Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    learned_variance: bool = False,
    resampling: Callable[[Walk, Rows], Rows] | None = None,
) -> SamplerTable:
    """The table of a sampler over `steps` of a process's times.

    Args:
        scale: the process, such as a `Schedule`.
        target: what the network's output means, such as one of `levels.TARGETS`.
        sampler: a name in `SAMPLERS`.
        steps: how many steps; None where the spacing says it.
        spacing: a spacing by its name, as `spacings.spaced_times` takes it, or the times themselves, from most noise to
            least; None is the sampler's own.
        options: of the sampler, such as `eta` of DDIM.
        learned_variance: the network gives a variance, too; samplers that know none leave it out.
        resampling: makes other rows of the sampler's, such as `inpainting.Resampling`.

    Raises:
        TypeError, ValueError: an unknown name or option, a number of steps or times outside the process.
    """
    check_sampler(sampler)
    given = as_options(sampler, options or {})
    walk = walk_along(scale, _times(scale, SAMPLERS[sampler].spacing if spacing is None else spacing, steps))
    rows = SAMPLERS[sampler].make_rows(walk, **given)
    if resampling is not None:
        rows = resampling(walk, rows)
    times: tuple[float, ...] = tuple(rows.levels.times.tolist())
    if scale.is_discrete and all(time == int(time) for time in times):
        times = tuple(int(time) for time in times)
    history = rows.u if rows.u.dim() == 2 else rows.u[:, None]  # (N, H)
    p, q = prediction(rows.levels, target)
    if not (p.isfinite().all() and q.isfinite().all()):
        raise ValueError(
            "objective must determine x0 at every level of noise; without signal (a = 0) the noise does not: "
            "use pred_v or pred_x0"
        )
    columns = [p, q, rows.r, rows.s, history[:, 0], rows.sigma]
    if history.shape[1] > 1 or learned_variance or rows.kept is not None:
        nothing = torch.zeros_like(rows.r)
        spread = rows.log_spread if learned_variance and rows.log_spread is not None else nothing
        columns += [*F.pad(history, (0, 3 - history.shape[1])).unbind(1)[1:], nothing, spread]
    if rows.kept is not None:
        columns += rows.kept.unbind(1)
    num_previous = max((i + 1 for i in range(history.shape[1]) if bool((history[:, i] != 0).any())), default=0)
    first_scale = scale.first_scale(walk.now) * rows.first_scale
    num_timesteps = int(scale.first) + 1 if scale.is_discrete else None
    table = torch.stack(columns, dim=1)
    return SamplerTable(times, table, sampler, first_scale, num_timesteps, num_previous, rows.levels)


def as_options(sampler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as floats, and as text where the sampler's default is text.

    Raises:
        TypeError, ValueError: the sampler does not take them.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"sampler_options must be a dictionary, got {shown(options)}")
    known = SAMPLERS[sampler].options
    given = {
        name: value if name not in known or isinstance(known[name], str) else float(as_number(name, value))
        for name, value in options.items()
    }
    check_options(sampler, given)
    return given


def _times(scale: NoiseScale, spacing: str | Sequence[float], steps: int | None) -> torch.Tensor:
    if isinstance(spacing, str):
        if not spacings.says_steps(spacing):
            check_steps(scale, steps)
        return spacings.spaced_times(scale, spacing, steps)
    times = torch.tensor(spacings.as_times(spacing), dtype=torch.float64, device="cpu")
    low, high = sorted((scale.first, scale.last))
    sign = 1.0 if scale.first > scale.last else -1.0
    if not len(times) or not bool(((times >= low) & (times <= high)).all()) or bool((sign * times.diff() >= 0).any()):
        raise ValueError(
            f"spacing must name a spacing or give times from most noise ({scale.first:g}) to least ({scale.last:g}), "
            f"got {list(spacing)}"
        )
    return times


def check_steps(scale: NoiseScale, steps: int | None) -> None:
    """Raise ValueError unless a walk over the process can have so many steps."""
    limit = int(scale.first) + 1 if scale.is_discrete else None
    if limit is not None and not (steps is not None and 1 <= steps <= limit):
        raise ValueError(f"sampling_timesteps must be in [1, timesteps = {limit}], got {steps}")
    if steps is None or steps < 1:
        raise ValueError(f"sampling_timesteps must be at least 1, got {steps}")


def check_options(sampler: str, options: Mapping[str, Any]) -> None:
    """Raise unless the sampler takes these options: finite numbers of at least 0, or one of its words."""
    known = SAMPLERS[sampler].options
    for name, value in options.items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"sampler {sampler!r} has no option {name!r}; {takes}")
        if isinstance(known[name], str):  # the sampler knows its words
            if not isinstance(value, str):
                raise TypeError(f"{name} must be text, got {shown(value)}")
            continue
        if not (value >= 0 and (math.isfinite(value) or known[name] == math.inf)):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")


# Samplers. Every one is finite where the first level has no signal (a = 0): its step there is of first order.


def to_level(now: Levels, after: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """r and s of x ← r·x0 + s·x from level to level along x0 and ε = (x − a·x0)/b, the step of all of first order."""
    s = after.b / now.b
    return after.a - s * now.a, s


def kept_variance(walk: Walk) -> torch.Tensor:
    """(S,) σ²_after/σ², the part of the noise's variance, relative to the signal, that a step leaves."""
    (_, a, b), (_, a_after, b_after) = walk.now, walk.after
    return (b_after * a / (b * a_after)) ** 2


def steps_in_half_log_snr(walk: Walk) -> torch.Tensor:
    """(S,) h, by which λ grows in each step; infinite from no signal and to no noise."""
    return walk.after.half_log_snr - walk.now.half_log_snr


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


@sampler("dpmpp_2m", spacing="log_snr")
def dpmpp_2m(walk: Walk) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); its first and last step are of first order.

    x ← (b_after/b)·x − a_after·(e^(−h) − 1)·D with D = (1 + 1/(2ρ))·x0 − 1/(2ρ)·x0_previous, ρ = h_previous/h and h the
    step in λ. The last step ends on the data (h = ∞), where x is x0.
    """
    now, after = walk.now, walk.after
    h = steps_in_half_log_snr(walk)
    s = after.b / now.b
    x_start_factor = -after.a * torch.expm1(-h)
    correction = torch.zeros_like(h)
    correction[1:] = h[1:] / (2 * h[:-1])
    correction[-1] = 0
    return Rows(now, x_start_factor * (1 + correction), s, -x_start_factor * correction, torch.zeros_like(h))


class _SdeStep(NamedTuple):
    """x ← s·x + r·x0 + σ·ε of first order, and the ratios to the steps before, of DPM-Solver++ for the SDE."""

    h: torch.Tensor  # (S,) in λ, times 1 + η
    r: torch.Tensor
    s: torch.Tensor
    sigma: torch.Tensor
    ratio: torch.Tensor  # (S,) h of the step before over h of this; infinite where there is none to use


def _sde_step(walk: Walk, eta: float, s_noise: float) -> _SdeStep:
    """The exact solution for a constant x0 (Lu et al. 2022, appendix; k-diffusion's `sample_dpmpp_2m_sde`)."""
    now, after = walk.now, walk.after
    h = steps_in_half_log_snr(walk)
    decay = (-eta * h).exp() if eta else torch.ones_like(h)
    noise = (-torch.expm1(-2 * eta * h)).sqrt() if eta else torch.zeros_like(h)
    ratio = torch.full_like(h, math.inf)
    ratio[1:] = h[:-1] / h[1:]
    ratio[-1] = math.inf  # to the data: first order
    return _SdeStep(
        h=(1 + eta) * h,
        r=-after.a * torch.expm1(-(1 + eta) * h),
        s=after.b / now.b * decay,
        sigma=s_noise * after.b * noise,
        ratio=ratio,
    )


@sampler("dpmpp_2m_sde", spacing="log_snr")
def dpmpp_2m_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0, solver: str = "midpoint") -> Rows:
    """DPM-Solver++(2M) for the SDE (k-diffusion's `sample_dpmpp_2m_sde`); its first and last step are of first order.

    Args:
        eta: the noise; 0 is deterministic.
        s_noise: what the noise is multiplied with.
        solver: "midpoint" or "heun", how the slope of x0 enters.
    """
    _check_word("solver", solver, ("midpoint", "heun"))
    step = _sde_step(walk, eta, s_noise)
    slope = 0.5 * step.r if solver == "midpoint" else walk.after.a * _phi_2(step.h)
    correction = slope / step.ratio
    return Rows(walk.now, step.r + correction, step.s, -correction, step.sigma)


@sampler("dpmpp_3m_sde", spacing="log_snr")
def dpmpp_3m_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """DPM-Solver++(3M) for the SDE (k-diffusion's `sample_dpmpp_3m_sde`); its last step is of first order.

    Args:
        eta: the noise; 0 is deterministic.
        s_noise: what the noise is multiplied with.
    """
    step = _sde_step(walk, eta, s_noise)
    a, h, ratio = walk.after.a, step.h, step.ratio
    phi_2 = a * _phi_2(h)
    phi_3 = a * torch.where(h.isinf(), -0.5, (1 + torch.expm1(-h) / h) / h - 0.5)
    before = torch.full_like(ratio, math.inf)  # h of the step before the last over h
    before[2:] = ratio[1:-1] * ratio[2:]
    before[-1] = math.inf
    is_third = before.isfinite() & ratio.isfinite()
    r0, r1 = torch.where(is_third, ratio, 1.0), torch.where(is_third, before, 1.0)
    bend = torch.where(is_third, (phi_2 * r0 - phi_3) / (r0 + r1), 0.0)
    newest = (phi_2 + bend) / ratio  # of x0 − x0_previous
    oldest = -bend / r1  # of x0_previous − x0_previous2
    u = torch.stack([oldest - newest, -oldest], dim=1)
    return Rows(walk.now, step.r + newest, step.s, u, step.sigma)


def _phi_2(h: torch.Tensor) -> torch.Tensor:
    """1 + (e^(−h) − 1)/h, the weight of the slope of x0 in λ; 1 for an infinite h."""
    return torch.where(h.isinf(), 1.0, 1 + torch.expm1(-h) / h)


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


@sampler("unipc", spacing="log_snr")
def unipc(walk: Walk, *, order: float = 2.0, solver: str = "bh2") -> Rows:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6 for x0), as diffusers' `UniPCMultistepScheduler`.

    A row corrects the state by its own network call, and then predicts the next one. Its last steps are of lower order.

    Args:
        order: 1, 2 or 3 of the predictor; the corrector's is one more.
        solver: "bh1" or "bh2", the B(h) of the paper.
    """
    _check_word("solver", solver, ("bh1", "bh2"))
    _check_order(order, 3)
    lambdas = walk.now.half_log_snr.tolist()
    count = len(lambdas)
    base_r, base_s = (column.tolist() for column in to_level(walk.now, walk.after))
    a_after = walk.after.a.tolist()
    rows: list[list[float]] = []  # r, s, u, u2, u3
    predictor = [0.0, 0.0, 0.0]  # of the row before: the factors of its D1, see `_unipc_weights`
    for i in range(count):
        corrected = [0.0, 0.0, 0.0, 0.0]  # of this x0 and those before
        known = sum(math.isfinite(value) for value in lambdas[:i])
        if i > 0 and math.isfinite(lambdas[i - 1]):
            p = min(int(order), count - i + 1, sum(math.isfinite(value) for value in lambdas[: i - 1]) + 1)
            h = lambdas[i] - lambdas[i - 1]
            ratios = [(lambdas[i - 1 - k] - lambdas[i - 1]) / h for k in range(1, p)]
            *weights, own = _unipc_weights(h, [*ratios, 1.0], solver, corrects=True)
            change = [a_after[i - 1] * (w - v) / k for w, v, k in zip(weights, predictor, ratios, strict=False)]
            own *= a_after[i - 1]
            corrected = [own, -own - sum(change), *change, *[0.0] * (2 - len(change))]
        row = [base_s[i] * value for value in corrected]
        row[0] += base_r[i]
        p = min(int(order), count - i, known + 1)
        predictor = [0.0, 0.0, 0.0]
        if p > 1:
            h = (walk.after.half_log_snr[i] - walk.now.half_log_snr[i]).item()
            ratios = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, p)]
            predictor = _unipc_weights(h, ratios, solver, corrects=False)
            for k, (weight, ratio) in enumerate(zip(predictor, ratios, strict=True), 1):
                row[k] += a_after[i] * weight / ratio
                row[0] -= a_after[i] * weight / ratio
        rows.append([row[0], base_s[i], *row[1:]])
    r, s, *u = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    return Rows(walk.now, r, s, torch.stack(u, dim=1), torch.zeros_like(r))


def _unipc_weights(h: float, ratios: list[float], solver: str, *, corrects: bool) -> list[float]:
    """−B(h)·ρ of Zhao et al. 2023, eq. 11: the factors of (x0_k − x0_0)/ratio_k over a, for steps h in λ.

    A predictor of order 2 and a corrector of order 1 take ρ = ½ instead of the solution.
    """
    big_b = -h if solver == "bh1" else math.expm1(-h)
    if len(ratios) == 1:
        return [-big_b / 2]
    matrix, right = [], []
    phi, factorial = math.expm1(-h) / -h - 1, 1
    for i in range(1, len(ratios) + 1):
        matrix.append([ratio ** (i - 1) for ratio in ratios])
        right.append(phi * factorial / big_b)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    solution = torch.linalg.solve(*(torch.tensor(v, dtype=torch.float64, device="cpu") for v in (matrix, right)))
    return [-big_b * rho for rho in solution.tolist()]


@sampler("lms", spacing="log_snr")
def lms(walk: Walk, *, order: float = 3.0) -> Rows:
    """Adams–Bashforth in σ, or in a flow's time, of the slopes (k-diffusion's `sample_lms`, of order up to 3).

    Its last step is of first order.
    """
    n = walk.now.a + walk.now.b if walk.is_flow else walk.now.a
    c = walk.now.b / n
    return _adams_rows(walk, order, n, c.tolist(), c.tolist(), lambda value: 1.0)


@sampler("deis", spacing="log_snr")
def deis(walk: Walk, *, order: float = 3.0) -> Rows:
    """DEIS, tAB in log ρ (Zhang & Chen 2023, section 3), as diffusers' `DEISMultistepScheduler`, of order up to 3.

    Its last step is of first order, the one before of second at most.
    """
    sigma = walk.now.sigma
    return _adams_rows(walk, order, walk.now.a, sigma.tolist(), sigma.log().tolist(), math.exp, last_orders=(1, 2))


def _adams_rows(
    walk: Walk,
    order: float,
    n: torch.Tensor,
    c: list[float],
    variable: list[float],
    density: Callable[[float], float],
    last_orders: tuple[int, ...] = (1,),
) -> Rows:
    """Steps of X = x/n in c along the slopes d = (X − x0)/c, polynomials through the last of them in a variable of c.

    A row keeps d = x/b − (n/b)·x0. `density` is dc over d(variable).
    """
    _check_order(order, 3)
    now, after = walk.now, walk.after
    count = len(c)
    r, s = to_level(now, after)
    u = torch.zeros(count, 3, dtype=torch.float64, device="cpu")
    e, f = 1 / now.b, -n / now.b
    n_after = (n[1:] if count > 1 else n).tolist()
    for i in range(count - 1):
        known = sum(math.isfinite(value) for value in variable[:i])
        left = count - 1 - i
        p = min(int(order), known + 1, last_orders[left] if left < len(last_orders) else 3)
        if p == 1 or not math.isfinite(variable[i]):
            continue
        nodes = [variable[i - k] for k in range(p)]
        weights = _lagrange_integrals(nodes, variable[i + 1], density)
        # Euler's step has all of c' − c on the newest slope.
        change = n_after[i] * (weights[0] - (c[i + 1] - c[i]))
        s[i] += change * e[i]
        r[i] += change * f[i]
        u[i, 1:p] = n_after[i] * torch.tensor(weights[1:], dtype=torch.float64, device="cpu")
    return Rows(now, r, s, u, torch.zeros_like(r), kept=torch.stack([e, f], dim=1))


def _lagrange_integrals(nodes: list[float], end: float, density: Callable[[float], float]) -> list[float]:
    """∫ of each Lagrange polynomial over the nodes, times the density, from the first node to the end."""
    start = nodes[0]
    totals = [0.0] * len(nodes)
    for point, weight in _gauss_legendre(24):
        at = start + (end - start) * (point + 1) / 2
        for j, node in enumerate(nodes):
            value = math.prod((at - other) / (node - other) for k, other in enumerate(nodes) if k != j)
            totals[j] += weight / 2 * (end - start) * density(at) * value
    return totals


@functools.cache
def _gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Points and weights on [−1, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beta = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return list(zip(points.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))


def _check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")


def _check_order(order: float, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"order must be an integer from 1 to {most}, got {order:g}")


def check_sampler(name: str) -> None:
    """Raise ValueError unless a sampler of this name is registered."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
