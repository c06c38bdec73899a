"""Spacings: at which times a sampler calls the network. Each is one function, registered under its name.

@spacing("uniform")
def uniform(scale: NoiseScale, steps: int) -> torch.Tensor:
    return torch.linspace(scale.first, scale.last, steps, dtype=torch.float64)
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ddpm_fast.diffusion.levels import NoiseScale
from ddpm_fast.runtime.plain import as_number, shown

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


def spaced_times(
    scale: NoiseScale, name: str, steps: int | None, options: dict[str, Any] | None = None
) -> torch.Tensor:
    """The times of a spacing.

    Args:
        name: of a registered spacing, with options where it has some ("karras:rho=5"); or OpenAI's notation for a
            discrete process, which says the steps itself: "ddim50" takes every k-th timestep so that there are 50,
            "10,10,20" so many of each third, "50" so many of all (improved-diffusion's `space_timesteps`).
        steps: how many; None where the name says it.

    Returns:
        (steps,) float64, from most noise to least; different integers where the process is discrete.
    """
    check_spacing(name)
    if says_steps(name):
        if not scale.is_discrete:
            raise ValueError(f"spacing must be a name where the process has no timesteps, got {name!r}")
        return _respaced(name, int(scale.first) + 1)
    plain_name, own_options = _parse(name)
    if steps is None:
        raise ValueError(f"steps must be given for the spacing {name!r}, got None")
    times = SPACINGS[plain_name](scale, steps, **own_options, **(options or {}))
    return _different_integers(times, int(scale.first)) if scale.is_discrete else times


def as_times(given: Any) -> tuple[float, ...]:
    """Times that are given instead of a spacing's name, as numbers.

    Raises:
        TypeError, ValueError: it is no sequence of numbers.
    """
    times = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(times, Sequence) or isinstance(times, (str, bytes)):
        raise TypeError(f"spacing must be a name or a sequence of times, got {shown(given)}")
    return tuple(as_number("each time of spacing", time) for time in times)


def says_steps(name: str) -> bool:
    """True if the name of a spacing is in OpenAI's notation, which says the number of steps."""
    return re.fullmatch(r"ddim\d+|\d+(,\d+)*", name.replace(" ", "")) is not None


def _respaced(text: str, num_timesteps: int) -> torch.Tensor:
    """The timesteps that improved-diffusion's `space_timesteps` takes (Nichol & Dhariwal 2021, section 4)."""
    text = text.replace(" ", "")
    if text.startswith("ddim"):
        wanted = int(text[4:])
        strides = [stride for stride in range(1, num_timesteps) if len(range(0, num_timesteps, stride)) == wanted]
        if not strides:
            raise ValueError(f"spacing must name a number of steps that a whole stride gives, got {text!r}")
        taken = list(range(0, num_timesteps, strides[0]))
    else:
        counts = [int(count) for count in text.split(",")]
        size, more = divmod(num_timesteps, len(counts))
        taken, start = [], 0
        for i, count in enumerate(counts):
            length = size + (i < more)
            if not 1 <= count <= length:
                raise ValueError(f"spacing must take 1 to {length} timesteps of a section of so many, got {count}")
            stride = (length - 1) / (count - 1) if count > 1 else 1.0
            taken += [start + round(k * stride) for k in range(count)]
            start += length
    return torch.tensor(taken[::-1], dtype=torch.float64, device="cpu")


def _parse(text: str) -> tuple[str, dict[str, float]]:
    """ "karras:rho=5,low=-4" → ("karras", {"rho": 5.0, "low": -4.0})."""
    name, _, rest = text.partition(":")
    options = {}
    for entry in filter(None, rest.split(",")):
        key, _, value = entry.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError:
            raise ValueError(f"spacing must have options like {name}:rho=5, got {text!r}") from None
    return name, options


def _different_integers(times: torch.Tensor, last: int) -> torch.Tensor:
    """Descending times rounded to integers in [0, last], of which no two are equal."""
    rounded = [int(t) for t in times.round().tolist()]
    for i in range(len(rounded)):  # not above what is left by those before
        rounded[i] = min(rounded[i], (rounded[i - 1] if i else last + 1) - 1)
    for i in reversed(range(len(rounded))):  # nor below what those after it need
        rounded[i] = max(rounded[i], (rounded[i + 1] if i + 1 < len(rounded) else -1) + 1)
    return torch.tensor(rounded, dtype=torch.float64, device="cpu")


def check_spacing(name: str) -> None:
    """Raise ValueError unless there is a spacing of this name, with these options."""
    if says_steps(name):
        return
    plain_name, options = _parse(name)
    if plain_name not in SPACINGS:
        raise ValueError(
            f"spacing must be one of {', '.join(SPACINGS)}, or like ddim50 or 10,10,20, got {plain_name!r}"
        )
    known = list(inspect.signature(SPACINGS[plain_name]).parameters)[2:]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"spacing {plain_name!r} has no option {option!r}; {takes}")


@spacing("own")
def own(scale: NoiseScale, steps: int) -> torch.Tensor:
    """The process's own: of `GaussianDiffusion` upstream's, from T − 1 on and uniform."""
    return scale.own_times(steps)


@spacing("uniform")
def uniform(scale: NoiseScale, steps: int) -> torch.Tensor:
    """Uniform in time, both ends included."""
    return _line(scale.first, scale.last, steps)


@spacing("trailing")
def trailing(scale: NoiseScale, steps: int) -> torch.Tensor:
    """Uniform from the most noise on, the end left out (Lin et al. 2023, table 2): T·(1 − k/S) − 1."""
    k = torch.arange(steps, dtype=torch.float64, device="cpu")
    count = scale.first + 1 if scale.is_discrete else scale.first - scale.last
    return scale.first - k * count / steps


@spacing("leading")
def leading(scale: NoiseScale, steps: int) -> torch.Tensor:
    """Uniform up from the least noise, the most left out: (S − 1 − k)·⌊T/S⌋ (Song et al. 2021, appendix D.2)."""
    k = torch.arange(steps - 1, -1, -1, dtype=torch.float64, device="cpu")
    if scale.is_discrete:
        return k * (int(scale.first + 1) // steps)
    return scale.last + k * (scale.first - scale.last) / steps


@spacing("quadratic")
def quadratic(scale: NoiseScale, steps: int) -> torch.Tensor:
    """Uniform in the root of time, so dense where the noise is least (Song et al. 2021, appendix D.2)."""
    return scale.last + (scale.first - scale.last) * _line(1.0, 0.0, steps) ** 2


@spacing("log_snr")
def log_snr(scale: NoiseScale, steps: int, *, low: float = -5.1, high: float = 5.1) -> torch.Tensor:
    """Uniform in λ = log(a/b) between the process's ends (Lu et al. 2022, section 4).

    Args:
        low, high: bounds of λ. At ±5.1 (Lu et al. 2022, appendix D) all but 4e-5 of the variance is noise, or signal.
    """
    return _times_between(scale, low, high, lambda first, last: _line(first, last, steps))


@spacing("karras")
def karras(
    scale: NoiseScale, steps: int, *, rho: float = 7.0, low: float = -5.1, high: float = math.inf
) -> torch.Tensor:
    """Uniform in σ^(1/ρ) between the process's ends (Karras et al. 2022, eq. 5).

    Args:
        rho: 1 is uniform in σ, the larger the closer to uniform in log σ.
        low, high: bounds of λ = −log σ.
    """

    def half_log_snr(first: float, last: float) -> torch.Tensor:
        return -rho * _line(math.exp(-first / rho), math.exp(-last / rho), steps).log()

    return _times_between(scale, low, high, half_log_snr)


def _times_between(
    scale: NoiseScale, low: float, high: float, half_log_snr: Callable[[float, float], torch.Tensor]
) -> torch.Tensor:
    """Times of λ between the process's ends and the bounds; a process without signal at its first time starts there."""
    ends = scale.at(torch.tensor([scale.first, scale.last], dtype=torch.float64, device="cpu")).half_log_snr.tolist()
    first, last = (min(max(end, low), high) for end in ends)
    times = scale.times_of(half_log_snr(first, last))
    if first == ends[0] or ends[0] == -math.inf:
        times[0] = scale.first  # the inverse rounds
    if last == ends[1] and len(times) > 1:
        times[-1] = scale.last
    return times


def _line(first: float, last: float, steps: int) -> torch.Tensor:
    return torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")


def evenly_spaced(num_rows: int, num_columns: int) -> list[int]:
    """Evenly spaced rows, the first and the last among them; all where there are fewer."""
    return torch.linspace(0, num_rows - 1, min(num_rows, num_columns)).round().int().tolist()
