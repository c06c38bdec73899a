"""Inpainting by RePaint (Lugmayr et al. 2022) as rows of a sampler's table.

A row arrives at a level of noise x = a·x0 + b·ε, and the step puts a·known + b·ε there where the mask says so. A jump
back from a level (a', b') to one with more noise (a, b) is the forward process between the two,

    x ← (a/a')·x + √(b² − (a·b'/a')²)·ε,

which belongs to the row before it: r, s are multiplied by a/a', and σ² is (σ·a/a')² and the jump's variance.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ddpm_fast.diffusion.guidance import column, widened
from ddpm_fast.diffusion.levels import Levels
from ddpm_fast.diffusion.samplers import Rows, SamplerTable, Walk
from ddpm_fast.runtime.plain import as_int


def as_mask(mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The mask of known pixels as float32 on the image's device.

    Raises:
        TypeError, ValueError: it is no mask of the image (B, C, H, W), named in one sentence.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating point, 1 where the image is known, got {mask.dtype}")
    batch, channels, *size = image.shape
    shape = tuple(mask.shape)
    if mask.ndim != 4 or shape[0] not in (1, batch) or shape[1] not in (1, channels) or shape[2:] != tuple(size):
        expected = f"({batch} or 1, {channels} or 1, {size[0]}, {size[1]})"
        raise ValueError(f"mask must have shape {expected}, got {shape}")
    if mask.device != image.device:
        raise ValueError(f"mask must be on the device of image, {image.device}, got {mask.device}")
    if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must be in [0, 1], got other values")
    return mask.to(torch.float32).contiguous()


@dataclass(frozen=True)
class Resampling:
    """How often the known and the unknown pixels are harmonised (Lugmayr et al. 2022, section 4.2).

    Args:
        num_resamples: how often each stretch of the walk is taken; 1 jumps nowhere.
        jump_length: steps of a stretch, by which a jump goes back.
    """

    num_resamples: int
    jump_length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, as_int(field.name, getattr(self, field.name), 1))

    def visits(self, steps: int) -> list[int]:
        """The levels at which the network is called, in their order; 0 is that of the most noise.

        Every `jump_length` steps the walk jumps back by as many, `num_resamples` − 1 times (Lugmayr et al. 2022,
        appendix B).

        Raises:
            ValueError: no stretch of this length fits into the walk.
        """
        if self.num_resamples > 1 and self.jump_length >= steps:
            raise ValueError(
                f"jump_length must be less than the number of steps, {steps}, where num_resamples > 1, got "
                f"{self.jump_length}"
            )
        left = dict.fromkeys(range(0, steps - self.jump_length, self.jump_length), self.num_resamples - 1)
        visits = []
        remaining = steps - 1  # steps after the next one
        while remaining >= 0:
            visits.append(steps - 1 - remaining)
            remaining -= 1
            if left.get(remaining, 0) > 0:
                left[remaining] -= 1
                remaining += self.jump_length
        return visits

    def __call__(self, walk: Walk, rows: Rows) -> Rows:
        """A sampler's rows, in the order of the visits and with their jumps.

        Raises:
            ValueError: the sampler's rows do not go from level to level, each by its own estimate of x0 alone.
        """
        steps = len(walk.now.times)
        if len(rows.r) != steps or rows.kept is not None or bool((rows.u != 0).any()):
            raise ValueError(
                "sampler must take each step by one network call and its x0 alone for inpainting, as ddpm, ddim, "
                "euler and euler_ancestral do"
            )
        visits = self.visits(steps)
        now = torch.tensor(visits, device="cpu")
        arrival = Levels(
            *(F.pad(column, (0, 1), value=end) for column, end in zip(rows.levels, (math.nan, 1.0, 0.0), strict=True))
        )
        following = torch.tensor([*visits[1:], steps], device="cpu")
        jumps = following != now + 1
        (_, a, b), (_, a_next, b_next) = (Levels(*(column[at] for column in arrival)) for at in (now + 1, following))
        factor = torch.where(jumps, a_next / a, 1.0)
        variance = torch.where(jumps, b_next**2 - (factor * b) ** 2, 0.0)
        r, s, sigma = (column[now] for column in (rows.r, rows.s, rows.sigma))
        with_jump = ((factor * sigma) ** 2 + variance).sqrt()
        spread = rows.log_spread
        if spread is not None:
            spread = spread[now]
            # The learned σ lies between σ and σ·e^spread; the sum with the jump's variance is exact at both ends.
            largest = ((factor * sigma * spread.exp()) ** 2 + variance).sqrt()
            spread = torch.where(with_jump > 0, (largest / with_jump).log(), 0.0)
        return rows._replace(
            levels=Levels(*(column[now] for column in rows.levels)),
            r=factor * r,
            s=factor * s,
            u=torch.zeros_like(r),
            sigma=with_jump,
            log_spread=spread,
        )


def with_known(plan: SamplerTable) -> SamplerTable:
    """A table whose rows insert known pixels, A·known + B·ε: at the level of the next row, at last the data's."""
    assert plan.levels is not None
    table = widened(plan.table)
    table[:, column("A")] = F.pad(plan.levels.a[1:], (0, 1), value=1.0)
    table[:, column("B")] = F.pad(plan.levels.b[1:], (0, 1))
    return replace(plan, table=table)
