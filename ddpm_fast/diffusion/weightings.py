"""Loss weights as functions of the signal-to-noise ratio, each registered under its name.

A weight is that of the squared error of x0; what the network gives instead, noise or v, has the weight that makes its
loss the same: an error of out is q times as large in x0 (`levels.prediction`), so w = weight(SNR)·q².

    @weighting("snr")
    def snr(snr):
        return snr
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.levels import Levels, Target, prediction
from ddpm_fast.runtime.plain import as_number

# (snr, **options) -> weight of x0's squared error, both (N,).
Weighting = Callable[..., torch.Tensor]

WEIGHTINGS: dict[str, Weighting] = {}

# What a checkpoint records of a function of the user's own.
OWN_FUNCTION = "a function of the user's"


def weighting(name: str) -> Callable[[Weighting], Weighting]:
    """Register a function (snr, *, option=default, ...) -> weight as the loss weighting `name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Weighting) -> Weighting:
        if name in WEIGHTINGS:
            raise ValueError(f"a loss weighting of the name {name!r} is registered already")
        WEIGHTINGS[name] = function
        return function

    return register


def recorded_weighting(given: str | Weighting | None) -> str | None:
    """A weighting as a file records it."""
    return given if given is None or isinstance(given, str) else OWN_FUNCTION


def find_weighting(given: str | Weighting, options: Mapping[str, Any] | None = None) -> Weighting:
    """A function of the SNR from its name and options, or a function of the user's own.

    Raises:
        TypeError, ValueError: an unknown name or option.
    """
    if callable(given):
        if options:
            raise TypeError("loss_weighting_options must be None where loss_weighting is a function")
        return given
    if given == OWN_FUNCTION:
        warnings.warn(
            "the loss was weighted by a function, which a file does not hold: loss_weighting='snr' is used, and "
            "training on needs loss_weighting=",
            stacklevel=3,
        )
        return snr
    if given not in WEIGHTINGS:
        raise ValueError(f"loss_weighting must be a function or one of {', '.join(WEIGHTINGS)}, got {given!r}")
    known = list(inspect.signature(WEIGHTINGS[given]).parameters)[1:]
    numbers = {name: as_number(name, value) for name, value in (options or {}).items()}
    for name in numbers:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"loss_weighting {given!r} has no option {name!r}; {takes}")
    return partial(WEIGHTINGS[given], **numbers) if numbers else WEIGHTINGS[given]


def weight_of_output(levels: Levels, target: Target, weight: Weighting) -> torch.Tensor:
    """w of w·mean((out − target)²) at each level, (N,)."""
    if weight is uniform:
        return torch.ones_like(levels.a)
    _, q = prediction(levels, target)
    return weight(levels.snr) * q**2


@weighting("snr")
def snr(snr: torch.Tensor) -> torch.Tensor:
    """The SNR: that of an unweighted error of the noise (Ho et al. 2020, eq. 14)."""
    return snr


@weighting("min_snr")
def min_snr(snr: torch.Tensor, *, gamma: float = 5.0) -> torch.Tensor:
    """The SNR, at most gamma (Hang et al. 2023, section 3.4)."""
    return snr.clamp(max=gamma)


@weighting("truncated_snr")
def truncated_snr(snr: torch.Tensor) -> torch.Tensor:
    """The SNR, at least 1 (Salimans & Ho 2022, section 4)."""
    return snr.clamp(min=1)


@weighting("p2")
def p2(snr: torch.Tensor, *, gamma: float = 1.0, k: float = 1.0) -> torch.Tensor:
    """SNR/(k + SNR)^gamma (Choi et al. 2022, eq. 8): less weight where there is little noise."""
    return snr / (k + snr) ** gamma


@weighting("edm")
def edm(snr: torch.Tensor, *, sigma_data: float = 0.5) -> torch.Tensor:
    """SNR + 1/sigma_data² (Karras et al. 2022, table 1, λ)."""
    return snr + sigma_data**-2


@weighting("x0")
def x0(snr: torch.Tensor) -> torch.Tensor:
    """One: an unweighted error of x0."""
    return torch.ones_like(snr)


@weighting("uniform")
def uniform(snr: torch.Tensor) -> torch.Tensor:
    """An unweighted error of the network's output, whatever it is; the weight of x0 follows from it."""
    raise NotImplementedError("weight_of_output knows this one")


_PURE = 20.0  # log(b/a) beyond this is noise or signal alone in float32


class UncertaintyWeight(nn.Module):
    """A learned weight per level of noise (Karras et al. 2024, EDM2, eq. 14): loss·e^(−u) + u.

    u is a linear function of Fourier features of log(b/a)/4 and begins with 0. Sampling does not use it.

    Args:
        features: Fourier features.
    """

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, features: int = 128):
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(features))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(features))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, loss: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Weigh losses.

        Args:
            loss: (B,), weighted already.
            log_noise: (B,) log(b/a); infinite where there is no signal or no noise.

        Returns:
            (B,).
        """
        log_noise = log_noise.to(self.phases).clamp(-_PURE, _PURE)
        angles = log_noise[:, None] / 4 * self.frequencies + self.phases
        u = (2**0.5 * angles.cos()) @ self.weight / len(self.weight) ** 0.5
        return loss * torch.exp(-u) + u
