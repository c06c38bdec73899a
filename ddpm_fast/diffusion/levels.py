"""Levels of noise, x = a·x0 + b·ε: what a process says of itself to its loss, to samplers and to spacings.

Everything else follows from a and b and from what the network's output means, out = c·ε + d·x0, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Levels(NamedTuple):
    """Levels of noise, x = a·x0 + b·ε at each.

    Args:
        times: (N,) float64, what the network is told of each.
        a, b: (N,) float64, the factors of signal and noise; at least 0, and not both 0.
    """

    times: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    @property
    def sigma(self) -> torch.Tensor:
        """(N,) noise over signal, b/a; infinite where there is no signal."""
        return self.b / self.a

    @property
    def half_log_snr(self) -> torch.Tensor:
        """(N,) λ = log(a/b) (Lu et al. 2022, section 2)."""
        return torch.log(self.a) - torch.log(self.b)

    @property
    def snr(self) -> torch.Tensor:
        """(N,) a²/b² (Kingma et al. 2021, eq. 3)."""
        return self.a**2 / self.b**2


# c and d of what the network gives, out = c·ε + d·x0, at each level.
Target = Callable[[Levels], tuple[torch.Tensor, torch.Tensor]]

TARGETS: dict[str, Target] = {
    # ε (Ho et al. 2020, eq. 14).
    "pred_noise": lambda levels: (torch.ones_like(levels.a), torch.zeros_like(levels.a)),
    "pred_x0": lambda levels: (torch.zeros_like(levels.a), torch.ones_like(levels.a)),
    # v = a·ε − b·x0 (Salimans & Ho 2022, appendix D), for a² + b² = 1.
    "pred_v": lambda levels: (levels.a, -levels.b),
}


def prediction(levels: Levels, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """p and q of x0 = p·x + q·out: x = a·x0 + b·ε and out = c·ε + d·x0, solved for x0.

    Returns:
        Two (N,); infinite or NaN where out does not determine x0, as noise does not where there is no signal.
    """
    c, d = target(levels)
    determinant = levels.a * c - levels.b * d
    return c / determinant, -levels.b / determinant


class NoiseScale:
    """A process as samplers and spacings see it: its levels of noise as functions of time.

    Attributes:
        is_discrete: the network was trained at integer times; spacings then give such times.
        first, last: the times of the most and of the least noise.
    """

    is_discrete = False
    first: float
    last: float

    def at(self, times: torch.Tensor) -> Levels:
        """The levels at times between `first` and `last`, (N,) float64."""
        raise NotImplementedError

    def times_of(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        """The times of given λ, (N,) float64; the inverse of `at`. Beyond the ends it is the end."""
        raise NotImplementedError

    def own_times(self, steps: int) -> torch.Tensor:
        """The process's own spacing: (steps,) float64, from most noise to least."""
        raise NotImplementedError

    def first_scale(self, levels: Levels) -> float:
        """The standard deviation of the first state of a walk along these levels."""
        return 1.0


class TrainingRows(NamedTuple):
    """What a training step reads of a process.

    Args:
        of_images: (B,) int64, the rows of the images in the tables.
        forward_table: (N, 2), columns a, b of x_t = a·x0 + b·ε.
        loss_table: (N, 3), columns c, d, w of w · mean((out − (c·ε + d·x0))²).
        times: (B,), what the network is told.
    """

    of_images: torch.Tensor
    forward_table: torch.Tensor
    loss_table: torch.Tensor
    times: torch.Tensor
