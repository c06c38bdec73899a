"""Spacings: at which times a sampler calls the network. Each is one function, registered under its name.

@spacing("uniform")
def uniform(scale: NoiseScale, steps: int) -> torch.Tensor:
    return torch.linspace(scale.first, scale.last, steps, dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.diffusion.levels import NoiseScale

# (scale, steps, **options) -> (steps,) float64, from most noise to least.
MakeTimes = Callable[..., torch.Tensor]

SPACINGS: dict[str, MakeTimes] = {}


def spacing(name: str) -> Callable[[MakeTimes], MakeTimes]:
    """Register a function (scale, steps, **options) -> times as the spacing `name`.

    For a process of discrete timesteps the times are rounded to different integers afterwards.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: MakeTimes) -> MakeTimes:
        if name in SPACINGS:
            raise ValueError(f"a spacing of the name {name!r} is registered already")
        SPACINGS[name] = function
        return function

    return register


def spaced_times(scale: NoiseScale, name: str, steps: int, options: dict[str, Any] | None = None) -> torch.Tensor:
    """The times of a registered spacing.

    Returns:
        (steps,) float64, from most noise to least; different integers where the process is discrete.
    """
    check_spacing(name)
    times = SPACINGS[name](scale, steps, **(options or {}))
    return _different_integers(times, int(scale.first)) if scale.is_discrete else times


def _different_integers(times: torch.Tensor, last: int) -> torch.Tensor:
    """Descending times rounded to integers in [0, last], of which no two are equal."""
    rounded = [int(t) for t in times.round().tolist()]
    for i in range(len(rounded)):  # not above what is left by those before
        rounded[i] = min(rounded[i], (rounded[i - 1] if i else last + 1) - 1)
    for i in reversed(range(len(rounded))):  # nor below what those after it need
        rounded[i] = max(rounded[i], (rounded[i + 1] if i + 1 < len(rounded) else -1) + 1)
    return torch.tensor(rounded, dtype=torch.float64, device="cpu")


def check_spacing(name: str) -> None:
    """Raise ValueError unless a spacing of this name is registered."""
    if name not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {name!r}")


@spacing("own")
def own(scale: NoiseScale, steps: int) -> torch.Tensor:
    """The process's own: of `GaussianDiffusion` upstream's, from T − 1 on and uniform."""
    return scale.own_times(steps)


@spacing("log_snr")
def log_snr(scale: NoiseScale, steps: int) -> torch.Tensor:
    """Uniform in λ = log(a/b) between the process's ends (Lu et al. 2022, section 4)."""
    first, last = scale.at(torch.tensor([scale.first, scale.last], dtype=torch.float64)).half_log_snr.tolist()
    times = scale.times_of(torch.linspace(first, last, steps, dtype=torch.float64, device="cpu"))
    times[0] = scale.first
    return times
