"""The chain of a variational bound: levels of noise from least to most, and the table of the bound along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion.levels import Levels, NoiseScale, Target, prediction
from ddpm_fast.runtime.plain import as_number, shown

VARIANCES = ("small", "large", "learned")

# Steps of a chain of a process in continuous time, where none are asked for.
CONTINUOUS_STEPS = 1000

BITS = 1 / math.log(2)  # of a nat

_LEAST_VARIANCE = 1e-20  # of the learned range's lower end, as upstream clips the posterior's


@dataclass(frozen=True, eq=False)
class Chain:
    """Levels of noise from least to most, and the tables of the bound along them, float64 on the CPU.

    Args:
        levels: S of them.
        table: (S, 14) of `variational_bound`, whose bound lacks `constant`.
        error_table: (S, 14), with which that bound is the squared error of x̂0, divided by ln 2.
        constant: (S,) nats of every dimension, which depend on no image.
        first_scale: the standard deviation of p(x_T).
        num_timesteps: T where the network takes timesteps, None where it takes real times.
        is_learned: the network gives the variance.
    """

    levels: Levels
    table: torch.Tensor
    error_table: torch.Tensor
    constant: torch.Tensor
    first_scale: float
    num_timesteps: int | None
    is_learned: bool

    @property
    def min_probability(self) -> float:
        """Of a bin: Ho et al.'s code has 1e-12, upstream's learned variance 1e-15."""
        return 1e-15 if self.is_learned else 1e-12

    def prior(self, x_start: torch.Tensor) -> torch.Tensor:
        """(B,) KL(q(x_T | x0) ‖ N(0, first_scale²)) in bits per dimension."""
        a, b = self.levels.a[-1].item(), self.levels.b[-1].item()
        variance = (b / self.first_scale) ** 2
        mean_squared = (x_start.double().flatten(1) * (a / self.first_scale)).square().mean(dim=1)
        return 0.5 * BITS * (mean_squared + variance - 1 - math.log(variance)).cpu()


def posterior(now: Levels, after: Levels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q(x_s | x_t, x0), s being `after` and t `now` (Kingma et al. 2021, appendix A; Ho et al. 2020, eq. 7).

    Returns:
        Four (S,): the factors of x0 and of x_t in the mean, the variance β̃, and that of q(x_t | x_s) over a²_t/a²_s's
        rest, β.
    """
    ratio = now.a / after.a
    beta = now.b**2 - (ratio * after.b) ** 2
    return after.a * beta / now.b**2, ratio * after.b**2 / now.b**2, beta * after.b**2 / now.b**2, beta


def make_chain(scale: NoiseScale, target: Target, times: torch.Tensor, variance: str) -> Chain:
    """The chain along some times of a process.

    Args:
        times: (S,) float64, from least noise to most.
        variance: of p(x_{i−1} | x_i): "small" is the posterior's β̃, "large" is β (Ho et al. 2020, section 3.2), and
            "learned" between both, as the network says (Nichol & Dhariwal 2021, eq. 15).
    """
    now = scale.at(times)
    ends = {"times": float("nan"), "a": 1.0, "b": 0.0}  # the data itself
    after = Levels(*(F.pad(getattr(now, name)[:-1], (1, 0), value=end) for name, end in ends.items()))
    m1, m2, least, most = posterior(now, after)
    true = least.clamp(min=_LEAST_VARIANCE).log()
    if variance == "learned":
        low, high, constant, shown = true, most.log(), torch.zeros_like(true), true
    else:
        low = true if variance == "small" else most.log()
        # At the least noise β̃ is 0, and the decoder has that of the next level, as in Ho et al.'s code.
        low = torch.cat((true[1:2] if len(true) > 1 else most[:1].log(), low[1:]))
        difference = true - low
        constant = 0.5 * (torch.expm1(difference) - difference)
        constant[0] = 0.0
        high, shown = low, low  # the rest of the divergence is that of equal variances
    nothing, one = torch.zeros_like(m1), torch.ones_like(m1)
    is_decoder = nothing.clone()
    is_decoder[0] = 1.0
    common = (now.a, now.b, *target(now), one, *prediction(now, target))
    return Chain(
        levels=now,
        table=torch.stack((*common, m1, m2, low, high, shown, is_decoder, one), dim=1),
        error_table=torch.stack((*common, math.sqrt(2) * one, *(nothing,) * 5, one), dim=1),
        constant=constant,
        first_scale=scale.first_scale(Levels(*(column[-1:] for column in now))),
        num_timesteps=int(scale.first) + 1 if scale.is_discrete else None,
        is_learned=variance == "learned",
    )


def chain_times(scale: NoiseScale, timesteps: int | Sequence[float] | None) -> torch.Tensor:
    """(S,) float64, the times of a chain, from least noise to most.

    Args:
        timesteps: S of them, evenly spaced where the process is discrete and else in its own spacing; or the times; or
            None, all T where it is discrete, else `CONTINUOUS_STEPS`.

    Raises:
        TypeError, ValueError: they are no such times.
    """
    if timesteps is None and not scale.is_discrete:
        timesteps = CONTINUOUS_STEPS
    numbers: Any = timesteps
    given = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if given is None or isinstance(given, int):
        return _counted_times(scale, given)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise TypeError(f"timesteps must be how many, or a sequence of times, got {shown(timesteps)}")
    times = torch.tensor([as_number("each of timesteps", time) for time in given], dtype=torch.float64, device="cpu")
    low, high = sorted((scale.first, scale.last))
    if times.ndim != 1 or len(times) == 0 or not bool(((times >= low) & (times <= high)).all()):
        raise ValueError(f"timesteps must be one or more times in [{low:g}, {high:g}], got {timesteps!r}")
    if scale.is_discrete and bool((times != times.round()).any()):
        raise ValueError(f"timesteps must be integers for a process in discrete time, got {timesteps!r}")
    times = times.sort(descending=scale.last > scale.first).values
    if bool((times[1:] == times[:-1]).any()):
        raise ValueError(f"timesteps must differ from each other, got {timesteps!r}")
    return times


def _counted_times(scale: NoiseScale, count: int | None) -> torch.Tensor:
    if count is not None and (isinstance(count, bool) or count < 1):
        raise ValueError(f"timesteps must be at least 1, got {count!r}")
    if not scale.is_discrete:
        assert count is not None
        return scale.own_times(count).flip(0)
    num_timesteps = int(scale.first) + 1
    if count is not None and count > num_timesteps:
        raise ValueError(f"timesteps must be at most the process's {num_timesteps}, got {count}")
    if count == 1:
        return torch.tensor([scale.first], dtype=torch.float64, device="cpu")
    everything = num_timesteps if count is None else count
    return torch.linspace(0, num_timesteps - 1, everything, dtype=torch.float64, device="cpu").round()
