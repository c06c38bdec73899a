"""Guidance as columns of a sampler's table: scale, interval and schedule, rescaling, projection, CFG++, a classifier's.

With y what the network gives with its condition and y' without, or what a weaker network gives, a step has

    u = (y − y') + μ·update;  u ← min(1, ρ/‖u‖)·u;  u ← u − (1 − η)·(⟨u, y⟩/⟨y, y⟩)·y
    g = y + (w − 1)·u;        g ← (φ·std(y)/std(g) + 1 − φ)·g

in place of y. A row of w = 1 is not guided, and its other numbers are those of no guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.runtime.plain import as_flag, as_number, plain, shown

# The columns of a table after e and f, with the numbers that leave a step as it is.
COLUMNS = {
    "A": 0.0, "B": 0.0, "w": 1.0, "phi": 0.0, "eta": 1.0, "rho": 0.0, "mu": 0.0, "space": 0.0,
    "kg": 0.0, "kn": 0.0, "kc": 0.0, "h": 0.0, "j": 0.0,
}  # fmt: skip
_FIRST = 12
WIDTH = _FIRST + len(COLUMNS)
SPACES = ("output", "x0")

# Of the fraction of a walk, 0 at its first network call and 1 at its last: the share of scale − 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    # Wang et al. 2024, section 4: guidance that grows along the walk.
    "linear": lambda fraction: fraction,
    "cosine": lambda fraction: (1 - math.cos(math.pi * fraction)) / 2,
}


@dataclass(frozen=True)
class Guidance:
    """How strongly a condition guides sampling, and how (Ho & Salimans 2022, classifier-free guidance).

    Args:
        scale: w of y' + w·(y − y'): 1 is no guidance, 0 is the null condition alone.
        interval: (σ_low, σ_high], the levels of noise σ = b/a that are guided (Kynkäänniemi et al. 2024). The network
            runs once, not twice, at the others.
        schedule: the share of scale − 1 along the walk: "constant", "linear" or "cosine", both growing from 0 to 1, a
            function of the fraction of the walk, or a sequence of one number per network call.
        rescale: φ, how far the standard deviation of g is brought back to that of y (Lin et al. 2023, section 3.4).
        eta: the share of the update's component along y that stays, 0 to 1 (Sadat et al. 2024, APG).
        norm_threshold: ρ, the largest norm of the update, per image; 0 is none (APG).
        momentum: μ, of the average of updates, negative in APG.
        space: what is combined, the network's "output" or its estimates of "x0"; None is "x0" with eta, norm_threshold
            or momentum, else "output".
        cfg_plus_plus: x0 is guided and the noise is that of the null condition (Chung et al. 2024); scale in [0, 1].
        network: gives y' instead of the null condition, a weaker network with the same conditions (Karras et al. 2024,
            autoguidance).
        classifier_scale: what the gradient of a `cond_fn` is multiplied with (Dhariwal & Nichol 2021).

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    schedule: str | Callable[[float], float] | tuple[float, ...] = "constant"
    rescale: float = 0.0
    eta: float = 1.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    space: str | None = None
    cfg_plus_plus: bool = False
    network: nn.Module | None = None
    classifier_scale: float = 1.0

    def __post_init__(self) -> None:
        checked = {
            "scale": as_number("guidance scale", self.scale, -1e6, 1e6),
            "interval": _as_interval(self.interval),
            "schedule": _as_schedule(self.schedule),
            "rescale": as_number("guidance rescale", self.rescale, 0, 1),
            "eta": as_number("guidance eta", self.eta, 0, 1),
            "norm_threshold": as_number("guidance norm_threshold", self.norm_threshold, 0, 1e12),
            "momentum": as_number("guidance momentum", self.momentum, -1, 1),
            "cfg_plus_plus": as_flag("guidance cfg_plus_plus", self.cfg_plus_plus),
            "classifier_scale": as_number("classifier_scale", self.classifier_scale, -1e6, 1e6),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not (self.space is None or (isinstance(self.space, str) and self.space in SPACES)):
            raise ValueError(f"guidance space must be one of {', '.join(SPACES)} or None, got {self.space!r}")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise TypeError(f"guidance network must be a module, got {type(self.network).__name__}")

    @property
    def is_on(self) -> bool:
        """True if a second output may be read."""
        return self.scale != 1 or self.cfg_plus_plus

    @property
    def key(self) -> tuple:
        """All that the columns depend on."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "network")

    def as_config(self) -> float | dict[str, Any]:
        """Plain values, for checkpoints.

        Raises:
            ValueError: it has a function or a network, which a checkpoint does not hold.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if "network" in given or callable(given.get("schedule")):
            raise ValueError(
                "guidance of a process must have no network and no function as its schedule, which checkpoints do not "
                "hold: give it to sample"
            )
        return self.scale if set(given) <= {"scale"} else plain("guidance", given)

    def with_numbers(self, rows: int) -> Guidance:
        """The same with the numbers of now for a schedule that is a function, which may have changed since."""
        return replace(self, schedule=self._shares(rows)) if callable(self.schedule) else self

    def scales(self, rows: int) -> torch.Tensor:
        """(N,) float64, w of each network call: 1 + (scale − 1)·schedule."""
        return 1 + (self.scale - 1) * torch.tensor(self._shares(rows), dtype=torch.float64, device="cpu")

    def _shares(self, rows: int) -> tuple[float, ...]:
        """The share of scale − 1 in each of so many network calls."""
        if isinstance(self.schedule, tuple):
            if len(self.schedule) != rows:
                raise ValueError(
                    f"guidance schedule must have one number per network call, {rows}, got {len(self.schedule)}"
                )
            return self.schedule
        function = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        given = [function(row / max(1, rows - 1)) for row in range(rows)]
        return tuple(as_number("guidance schedule's numbers", share, -1e6, 1e6) for share in given)


def as_guidance(given: float | Mapping[str, Any] | Guidance | None) -> Guidance | None:
    """Guidance of a number, its scale, or of a dictionary of arguments.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if given is None or isinstance(given, Guidance):
        return given
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {field.name for field in fields(Guidance)})
        if unknown:
            raise TypeError(f"guidance has no argument {unknown[0]!r}; it takes {', '.join(_names())}")
        return Guidance(**given)
    return Guidance(as_number("guidance", given, -1e6, 1e6))


def _names() -> list[str]:
    return [field.name for field in fields(Guidance)]


def _as_interval(given: Any) -> tuple[float, float]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or len(given) != 2:
        raise ValueError(f"guidance interval must be two levels of noise (low, high), got {shown(given)}")
    low, high = (as_number("guidance interval", level, 0) for level in given)
    if low >= high:
        raise ValueError(f"guidance interval must have low < high, got {low:g} and {high:g}")
    return low, high


def _as_schedule(given: Any) -> str | Callable[[float], float] | tuple[float, ...]:
    if isinstance(given, str):
        if given not in SCHEDULES:
            raise ValueError(f"guidance schedule must be one of {', '.join(SCHEDULES)}, got {given!r}")
        return given
    if callable(given):
        return given
    numbers = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(numbers, Sequence):
        raise TypeError(
            f"guidance schedule must be one of {', '.join(SCHEDULES)}, a function or a sequence, got {shown(given)}"
        )
    return tuple(as_number("guidance schedule's numbers", number, -1e6, 1e6) for number in numbers)


def widened(table: torch.Tensor) -> torch.Tensor:
    """A table of 25 columns whose further ones leave a step as it is."""
    rows, columns = table.shape
    neutral = torch.tensor(list(COLUMNS.values()), dtype=table.dtype, device=table.device)
    beyond = neutral[max(0, columns - _FIRST) :].expand(rows, -1)
    return torch.cat((table, table.new_zeros(rows, max(0, _FIRST - columns)), beyond), dim=1)


def empty_table(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) float32 zeros, and in the columns of guidance what guides nothing."""
    table = torch.zeros(rows, min(columns, _FIRST), dtype=torch.float32, device=device)
    return widened(table) if columns == WIDTH else table


def column(name: str) -> int:
    """The place of one of `COLUMNS` in a table."""
    return _FIRST + list(COLUMNS).index(name)


def guided(
    plan: SamplerTable, guidance: Guidance, *, has_gradient: bool = False, by_mean: bool = False
) -> SamplerTable:
    """A sampler's table with guidance in its columns; itself where nothing is guided.

    Args:
        has_gradient: a classifier's gradient is added.
        by_mean: it is added to the mean of the step (Dhariwal & Nichol 2021, algorithm 1), not to the noise (2).
    """
    if not (guidance.is_on or has_gradient):
        return plan
    assert plan.levels is not None
    table = widened(plan.table)
    low, high = guidance.interval
    inside = (plan.levels.sigma > low) & (plan.levels.sigma <= high)
    if guidance.is_on:
        _set_guidance(table, guidance, inside, plan)
    if has_gradient:
        _set_gradient(table, guidance.classifier_scale, inside, plan, by_mean)
    return replace(plan, table=table)


def _set_guidance(table: torch.Tensor, guidance: Guidance, inside: torch.Tensor, plan: SamplerTable) -> None:
    scales = torch.where(inside, guidance.scales(len(table)), 1.0)
    by_x_start = guidance.eta != 1 or guidance.norm_threshold or guidance.momentum
    space = guidance.space or ("x0" if by_x_start else "output")
    applied = scales != 1
    table[:, column("w")] = scales
    for name, value in (("phi", guidance.rescale), ("eta", guidance.eta), ("rho", guidance.norm_threshold)):
        table[applied, column(name)] = value
    # The average of updates goes on through rows of w = 1 in the interval.
    table[inside, column("mu")] = guidance.momentum
    table[inside, column("space")] = float(space == "x0")
    if guidance.cfg_plus_plus:
        split_noise(table, plan, "kc", inside)


def split_noise(table: torch.Tensor, plan: SamplerTable, name: str, rows: torch.Tensor) -> None:
    """Let the noise in a step, ε = (x − a·x0)/b, be that of another x0 (Chung et al. 2024, algorithm 2).

    r·x0 + s·x is (r + s·a)·x0 + s·b·ε, so that s·a moves from r to the other x0's column.

    Args:
        name: the column of the other x0: "kg", guided and unclipped; "kn", null and unclipped; "kc", null and clipped.
        rows: (N,) bool.
    """
    assert plan.levels is not None
    share = torch.where(rows, table[:, 3] * plan.levels.a, 0.0)
    table[:, 2] += share
    table[:, column(name)] -= share


def _set_gradient(table: torch.Tensor, scale: float, inside: torch.Tensor, plan: SamplerTable, by_mean: bool) -> None:
    """The weight of ∇ log p(y | x): in x0 b²/a, from ε̂ = ε − b·∇ (Dhariwal & Nichol 2021, alg. 2), in the mean σ²."""
    assert plan.levels is not None
    a, b = plan.levels.a, plan.levels.b
    of_x_start = torch.where(a > 0, b**2 / a, 0.0)  # without signal there is no gradient
    name, weight = ("j", table[:, 5] ** 2) if by_mean else ("h", of_x_start)
    table[:, column(name)] = torch.where(inside, scale * weight, 0.0)


def reads_second(table: torch.Tensor) -> list[bool]:
    """For each row, whether it reads a second output."""
    if table.shape[1] < WIDTH:
        return [False] * len(table)
    read = table[:, column("w")] != 1
    for name in ("mu", "kn", "kc"):
        read = read | (table[:, column(name)] != 0)
    return read.tolist()


def reduces(table: torch.Tensor) -> bool:
    """True if a row needs sums over each image."""
    if table.shape[1] < WIDTH:
        return False
    phi, eta, rho = (table[:, column(name)] for name in ("phi", "eta", "rho"))
    return bool(((phi != 0) | (eta != 1) | (rho != 0)).any())


def has_momentum(table: torch.Tensor) -> bool:
    """True if a row reads the average of updates."""
    return table.shape[1] == WIDTH and bool((table[:, column("mu")] != 0).any())
