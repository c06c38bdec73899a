"""Samplers as tables: each is one function, registered under the name that the API and the command line take.

A step of every sampler is x0 = clip(p·x + q·out); x ← r·x0 + s·x + u·x0_previous + σ·ε. The process gives p and q; a
sampler gives r, s, u and σ for each of its steps, in float64. A new sampler is one decorated function:

    @sampler("euler")
    def euler(walk: Walk) -> Rows:
        now, after = walk.now, walk.after
        ...
        return Rows(now, r, s, u, sigma)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion import spacings
from ddpm_fast.diffusion.levels import Levels, NoiseScale, Target, prediction
from ddpm_fast.runtime.plain import as_number


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
        """Levels of given λ, for samplers that call the network between two of theirs."""
        return self.scale.at(self.scale.times_of(half_log_snr))


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
        r, s, u, sigma: (N,) float64, the factors of x0, x, x0 of the row before, and ε.
        first_scale: what the first state is multiplied with, besides the process's own `first_scale`.
    """

    levels: Levels
    r: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor
    sigma: torch.Tensor
    first_scale: float = 1.0


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
        spacing: the spacing that is best for it.

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
        times: what the network is told at each of the N rows; integers where the process is discrete.
        table: (N, 6) float64, columns p, q, r, s, u, σ, one row per network call.
        sampler: the name of the sampler.
        first_scale: standard deviation of the state at the beginning.
        num_timesteps: T, where the process is discrete.
    """

    times: tuple[float, ...]
    table: torch.Tensor
    sampler: str
    first_scale: float = 1.0
    num_timesteps: int | None = None

    @property
    def uses_x_start_previous(self) -> bool:
        """True if any step reads the x0 of the step before it (u ≠ 0)."""
        return bool((self.table[:, 4] != 0).any())

    @property
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
    steps: int,
    *,
    spacing: str | Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> SamplerTable:
    """The table of a sampler over `steps` of a process's times.

    Args:
        scale: the process, such as a `Schedule`.
        target: what the network's output means, such as one of `levels.TARGETS`.
        sampler: a name in `SAMPLERS`.
        spacing: a name in `SPACINGS`, or the times themselves, from most noise to least; None is the sampler's own.
        options: of the sampler, such as `eta` of DDIM.

    Raises:
        TypeError, ValueError: an unknown name or option, a number of steps or times outside the process.
    """
    check_sampler(sampler)
    given = {name: as_number(name, value) for name, value in (options or {}).items()}
    check_options(sampler, given)
    walk = walk_along(scale, _times(scale, SAMPLERS[sampler].spacing if spacing is None else spacing, steps))
    rows = SAMPLERS[sampler].make_rows(walk, **given)
    p, q = prediction(rows.levels, target)
    if not (p.isfinite().all() and q.isfinite().all()):
        raise ValueError(
            "objective must determine x0 at every level of noise; without signal (a = 0) the noise does not: "
            "use pred_v or pred_x0"
        )
    columns = torch.stack([p, q, rows.r, rows.s, rows.u, rows.sigma], dim=1)
    times: tuple[float, ...] = tuple(rows.levels.times.tolist())
    if scale.is_discrete and all(time == int(time) for time in times):
        times = tuple(int(time) for time in times)
    first_scale = scale.first_scale(walk.now) * rows.first_scale
    return SamplerTable(times, columns, sampler, first_scale, int(scale.first) + 1 if scale.is_discrete else None)


def _times(scale: NoiseScale, spacing: str | Sequence[float], steps: int) -> torch.Tensor:
    if isinstance(spacing, str):
        check_steps(scale, steps)
        return spacings.spaced_times(scale, spacing, steps)
    times = torch.tensor([float(time) for time in spacing], dtype=torch.float64, device="cpu")
    low, high = sorted((scale.first, scale.last))
    sign = 1.0 if scale.first > scale.last else -1.0
    if not len(times) or not bool(((times >= low) & (times <= high)).all()) or bool((sign * times.diff() >= 0).any()):
        raise ValueError(
            f"spacing must name a spacing or give times from most noise ({scale.first:g}) to least ({scale.last:g}), "
            f"got {list(spacing)}"
        )
    return times


def check_steps(scale: NoiseScale, steps: int) -> None:
    """Raise ValueError unless a walk over the process can have so many steps."""
    limit = int(scale.first) + 1 if scale.is_discrete else None
    if limit is not None and not 1 <= steps <= limit:
        raise ValueError(f"sampling_timesteps must be in [1, timesteps = {limit}], got {steps}")
    if steps < 1:
        raise ValueError(f"sampling_timesteps must be at least 1, got {steps}")


def check_options(sampler: str, options: Mapping[str, Any]) -> None:
    """Raise unless the sampler takes these options, finite numbers of at least 0."""
    known = SAMPLERS[sampler].options
    for name, value in options.items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"sampler {sampler!r} has no option {name!r}; {takes}")
        if not (value >= 0 and (math.isfinite(value) or known[name] == math.inf)):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")


@sampler("ddpm")
def ddpm(walk: Walk) -> Rows:
    """Ancestral sampling: the posterior q(x_next | x, x0) (Ho et al. 2020, eq. 7).

    On fewer than T timesteps it is the respaced posterior (Nichol & Dhariwal 2021, section 4).
    """
    (_, a, b), (_, a_after, b_after) = walk.now, walk.after
    kept = (b_after * a / (b * a_after)) ** 2  # σ²_after/σ² with σ = b/a
    r = a_after * (1 - kept)
    s = (b_after / b) ** 2 * (a / a_after)
    return Rows(walk.now, r, s, torch.zeros_like(r), b_after * (1 - kept).sqrt())


@sampler("ddim")
def ddim(walk: Walk, *, eta: float = 0.0) -> Rows:
    """DDIM (Song et al. 2021, eq. 12, σ of eq. 16), with ε = (x − a·x0)/b put in.

    Args:
        eta: the noise: 0 is deterministic, 1 has the variance of ancestral sampling.
    """
    (_, a, b), (_, a_after, b_after) = walk.now, walk.after
    sigma = eta * b_after * (1 - (b_after * a / (b * a_after)) ** 2).sqrt()
    s = (b_after**2 - sigma**2).clamp(min=0).sqrt() / b  # of ε, over b
    return Rows(walk.now, a_after - s * a, s, torch.zeros_like(s), sigma)


@sampler("dpmpp_2m", spacing="log_snr")
def dpmpp_2m(walk: Walk) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); its first and last step are of first order.

    x ← (b_after/b)·x − a_after·(e^(−h) − 1)·D with D = (1 + 1/(2ρ))·x0 − 1/(2ρ)·x0_previous, ρ = h_previous/h and h the
    step in λ. The last step ends on the data (h = ∞), where x is x0.
    """
    now, after = walk.now, walk.after
    h = after.half_log_snr - now.half_log_snr
    s = after.b / now.b
    x_start_factor = -after.a * torch.expm1(-h)
    correction = torch.zeros_like(h)
    correction[1:] = h[1:] / (2 * h[:-1])
    correction[-1] = 0
    return Rows(now, x_start_factor * (1 + correction), s, -x_start_factor * correction, torch.zeros_like(h))


def check_sampler(name: str) -> None:
    """Raise ValueError unless a sampler of this name is registered."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
