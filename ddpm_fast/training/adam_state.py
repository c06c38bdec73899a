"""The state of Adam and of the gradients' scaler: as files keep it, and as a recording finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddpm_fast.training.optimizer_step import is_adam


def check_optimizer(optimizer: torch.optim.Optimizer, diffusion: nn.Module, capturable: bool) -> None:
    """Raise TypeError or ValueError for what is no Adam of a process's parameters, or keeps its step on the host."""
    if not is_adam(optimizer):
        raise TypeError(
            f"optimizer must be torch.optim.Adam or AdamW itself, not a wrapper of it, got {type(optimizer).__name__}"
        )
    if capturable and not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(
            "optimizer must keep its step count on the device: make it with capturable=True, fused=True, such as "
            "torch.optim.Adam(diffusion.parameters(), lr, capturable=True, fused=True)"
        )
    known = set(diffusion.parameters())
    if not all(p in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer must have parameters of diffusion only")


def plain_groups(optimizer_state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of an optimizer's state dict as a file keeps them: numbers, and nothing of a recording's.

    A rate on a device may be the float32 of a number, and the shortest number of that float32 is it again.
    """
    groups = []
    for group in optimizer_state["param_groups"]:
        group = {**group, "capturable": False}
        rate = group["lr"]
        if isinstance(rate, torch.Tensor):
            group["lr"] = rate.item() if rate.dtype is torch.float64 else float(f"{rate.item():.7g}")
        groups.append(group)
    return groups


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Moments and counts of steps."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def state_of_scaler(scaler: torch.amp.GradScaler | None) -> list[torch.Tensor]:
    """The scale and its count of steps, once the scaler has made them."""
    if scaler is None:
        return []
    return [t for t in (scaler._scale, scaler._growth_tracker) if t is not None]


def settings_of_scaler(scaler: torch.amp.GradScaler) -> tuple:
    """What a recording has of the scaler besides the values of its state."""
    numbers = (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
    return (scaler.is_enabled(), *numbers, id(scaler._scale), id(scaler._growth_tracker))


@torch.no_grad()
def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give moments that were loaded from elsewhere the layout of their parameters.

    Fused Adam walks through memory: on the CPU, moments in another order would be those of other weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
