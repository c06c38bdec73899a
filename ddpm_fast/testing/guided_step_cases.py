"""Rows of the sampler's table with guidance, masks and gradients, and tensors for them: for tests on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ddpm_fast.ops.sampler_step.op import COLUMNS

NAN = float("nan")
_BASE = {"p": 0.9, "q": 0.4, "r": 0.7, "s": 0.5, "sigma": 0.3}
_HISTORY = {"u": -0.2, "u2": 0.15, "u3": -0.1, "e": 1.1, "f": -0.6}
ROWS: dict[str, dict[str, float]] = {
    "w": {"w": 4.0},
    "w below 1, no noise": {"w": 0.3, "sigma": 0.0},
    "w in x0": {"w": 4.0, "space": 1.0},
    "phi": {"w": 4.0, "phi": 0.7},
    "eta": {"w": 4.0, "eta": 0.2},
    "rho": {"w": 4.0, "rho": 3.0},
    "a threshold that is not reached": {"w": 4.0, "rho": 1e4},
    "mu": {"w": 4.0, "mu": -0.5},
    "mu without guidance": {"mu": -0.5, "phi": 0.7},
    "everything with sums": {"w": 8.0, "phi": 0.4, "eta": 0.1, "rho": 5.0, "mu": -0.75, "space": 1.0},
    "kg": {"kg": 0.6},
    "kn": {"kn": -0.4},
    "kc": {"kc": 0.4},
    "cfg++": {"w": 0.6, "kn": -0.5, "kc": 0.5, "r": 0.8},
    "h": {"h": 0.5},
    "j": {"j": -0.3},
    "known": {"A": 0.8, "B": 0.6},
    "known, no other noise": {"A": 0.8, "B": 0.6, "sigma": 0.0},
    "known without noise": {"A": 1.0, "sigma": 0.0},
    "learned": {"w": 4.0, "lo": -0.4, "hi": 0.7},
    "history": {"w": 4.0, **_HISTORY},
    "all": {
        **{"w": 4.0, "phi": 0.7, "eta": 0.2, "rho": 6.0, "mu": -0.5, "space": 1.0, "kg": 0.3, "kn": -0.4, "kc": 0.2},
        **{"h": 0.5, "j": -0.3, "A": 0.8, "B": 0.6, "lo": -0.4, "hi": 0.7, **_HISTORY},
    },
}
SUMS = ("phi", "eta", "rho", "a threshold that is not reached", "everything with sums", "all")
MASKS = ("full", "one for all", "one per sample", "one per channel")


def guided_table(**columns: float) -> torch.Tensor:
    """(3, 25) with these columns in the second row, neutral values besides, and NaN in the others."""
    values = {"w": 1.0, "eta": 1.0, **_BASE, **columns}
    row = [values.get(name, 0.0) for name in COLUMNS]
    return torch.tensor([[NAN] * len(row), row, [NAN] * len(row)])


def tensors_read(columns: dict[str, float]) -> set[str]:
    """The tensors of guidance that a row reads, and `update` and `mask` where it has a use for them."""
    guides = columns.get("w", 1.0) != 1 or "mu" in columns
    wanted = {
        "second_output": guides or "kn" in columns or "kc" in columns,
        "gradient": "h" in columns or "j" in columns,
        "known": "A" in columns,
        "mask": "A" in columns,
        "update": "mu" in columns,
    }
    return {name for name, is_wanted in wanted.items() if is_wanted}


@dataclass
class GuidedStep:
    """A call of the op: the five tensors that every call has, three earlier states, and the other arguments."""

    arguments: tuple[torch.Tensor, ...]
    history: tuple[torch.Tensor, ...]
    options: dict

    def doubled(self) -> GuidedStep:
        """The same in float64."""

        def wide(value):
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.double() if is_float else value

        options = {name: wide(value) for name, value in self.options.items()}
        return GuidedStep(tuple(map(wide, self.arguments)), tuple(map(wide, self.history)), options)

    def run(self, step) -> dict[str, torch.Tensor]:
        """x_next, x_start and the momentum of the op out of place, or of its reference."""
        options = {**self.options, "update": clone(self.options["update"])}
        names = ("x_start_previous", "x_start_previous2", "x_start_previous3")
        x_next, x_start = step(*self.arguments, **dict(zip(names, self.history, strict=True)), **options)
        return without_none({"x_next": x_next, "x_start": x_start, "update": options["update"]})

    def run_in_place(self, step_) -> dict[str, torch.Tensor]:
        """The same in place, with the history that it leaves."""
        options = {**self.options, "update": clone(self.options["update"])}
        x, history = self.arguments[0].clone(), [tensor.clone() for tensor in self.history]
        states = dict(zip(("x_start", "x_start2", "x_start3"), history, strict=True))
        assert step_(x, *self.arguments[1:], **states, **options) is x
        return without_none({"x_next": x, **states, "update": options["update"]})

    def to(self, device: torch.device | str) -> GuidedStep:
        def moved(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        options = {name: moved(value) for name, value in self.options.items()}
        return GuidedStep(tuple(map(moved, self.arguments)), tuple(map(moved, self.history)), options)


def clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def without_none(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def make_guided(
    row: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    mask: str = "full",
    only_read: bool = False,
) -> GuidedStep:
    """A step of one of `ROWS`.

    Args:
        layout: of both outputs: "contiguous", "channels-last", "misaligned", or "halves" of a doubled batch.
        mask: one of `MASKS`.
        only_read: give only the tensors that the row reads.
    """
    columns = ROWS[row]
    learned = "lo" in columns and len(shape) > 1
    of_output = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
    first, second = (torch.randn(of_output).clamp(-1.5, 1.5).to(dtype) for _ in range(2))
    if layout == "halves":
        both = torch.cat([first, second])
        both = both.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else both
        first, second = both.chunk(2) if shape[0] else (first, second)
    elif layout == "channels-last":
        first, second = (output.contiguous(memory_format=torch.channels_last) for output in (first, second))
    elif layout == "misaligned":
        first, second = (torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (first, second))
    of_mask = list(shape)
    if mask in ("one for all", "one per channel"):
        of_mask[0] = 1
    if mask in ("one for all", "one per sample") and len(shape) > 1:
        of_mask[1] = 1
    values = torch.tensor([0.0, 1.0, 0.3])
    options: dict[str, Any] = {
        "second_output": second,
        "gradient": torch.randn(shape),
        "known": torch.randn(shape),
        "mask": values[torch.randint(3, of_mask)],
        "update": torch.randn(shape),
    }
    if only_read:
        options = {name: value if name in tensors_read(columns) else None for name, value in options.items()}
    options |= {"reduces": row in SUMS, "start_index": 3, "stream": 7, "clip_x_start": True, "noise": None}
    arguments = (torch.randn(shape), first, guided_table(**columns), torch.tensor([1]), torch.tensor([-12345678901]))
    return GuidedStep(arguments, tuple(torch.randn(shape) for _ in range(3)), options)
