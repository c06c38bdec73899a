"""Samplers as tables: the frame. The samplers are functions in single_step_samplers.py and multistep_samplers.py.

A step of every sampler is

    x0 = clip(p·x + q·out);  x ← r·x0 + s·x + u·x0_previous + u2·x0_previous2 + u3·x0_previous3 + σ·ε

The process gives p and q; a sampler gives r, s, u and σ for each of its steps, in float64. A new sampler is one
decorated function, registered under the name that the API and the command line take:

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


def __getattr__(name: str) -> MakeRows:
    """The function of a registered sampler: `samplers.heun`."""
    if name in SAMPLERS:
        return SAMPLERS[name].make_rows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_sampler(name: str) -> None:
    """Raise ValueError unless a sampler of this name is registered."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(sorted(SAMPLERS))}, got {name!r}")


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
