"""Whether a recording may replace a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.xm import process_of
from ddpm_fast.runtime import recording
from ddpm_fast.training.optimizer_step import is_adam


class NotRecordableError(ValueError):
    """A recording cannot replace a training step."""

    def __init__(self, reason: str):
        super().__init__(f"a graph cannot replace the step: {reason}; graph=False runs it without one")
        self.reason = reason


def why_not_recorded(diffusion: nn.Module, optimizer: Any, any_module: bool) -> str | None:
    """Why a recording may not replace a training step, in one clause; None where it may."""
    process = process_of(diffusion)
    if process is None:
        return f"the loss is that of a {type(diffusion).__name__}, and recordings are of this package's processes"
    if process.assigns_noise:
        option = "immiscible" if process.immiscible else "optimal_transport"
        return f"{option}=True assigns the noise on the host"
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at every backward, and a replay has none"
    if not is_adam(optimizer):
        return f"the optimizer is a {type(optimizer).__name__}"
    for name, module in diffusion.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the model'} has backward hooks, which a replay does not call"
    for name, parameter in diffusion.named_parameters():
        if has_gradient_hooks(parameter):
            return f"{name} has gradient hooks, which a replay does not call"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks on its step, which a replay does not call"
    return recording.why_not_recorded(diffusion) or (None if any_module else recording.untrusted_module(diffusion))


def has_gradient_hooks(parameter: Any) -> bool:
    """True if somebody looks at a parameter's gradient as it arrives."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def draws_coin_first(diffusion: nn.Module) -> bool:
    """True if a step that is not recorded draws the coin of self-conditioning as a recorded one does.

    That is before the times, which on the CPU come from the same generator. A process of the user's draws it itself.
    """
    process = process_of(diffusion)
    return process is not None and process.self_condition and recording.untrusted_module(diffusion) is None
