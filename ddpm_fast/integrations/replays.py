"""Calls of accelerated networks without gradients, replayed from tapes on the CPU (models/recorded_calls.py).

A network says so in its fast forward:

    class Network(Replayed):
        def forward(self, x, t):
            return replayed(self, self._run, x, t)

`_run` acts on the network's weights and on these tensors alone. `ReplaysOwnForward` is a mixin for networks whose own
forward goes on running. A module inside has to be computed by an op, be one of torch's, or of a class that its family
has declared by `computes_plainly`; any other may do more than a tape shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations.family import own_forward, path_of, plain_classes, why_changed, why_own_forward
from ddpm_fast.models.recorded_calls import RecordedCalls, calls_of, why_not_replayed
from ddpm_fast.models.stock import own_class
from ddpm_fast.runtime.recording import is_of_torch


class Replayed:
    """A mixin of networks whose calls are replayed, for `explain`."""

    def why_not_replayed(self: Any) -> str | None:
        return why_not_replayed(self, untrusted_module)


def replayed(network: nn.Module, run: Callable[..., torch.Tensor], *given: torch.Tensor | None) -> torch.Tensor:
    """run(*given), or a replay of it with the same bits."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(*given)
    recorded = recorded_calls(network)
    return run(*given) if recorded is None else recorded.call(lambda tensors: run(*tensors), given)


def recorded_calls(network: nn.Module) -> RecordedCalls | None:
    """What this thread has recorded of an accelerated network; None in a block that records no calls."""
    return calls_of(network, untrusted_module)


class ReplaysOwnForward(Replayed):
    """A network that runs its own forward, replayed for calls with tensors alone."""

    arguments: tuple[str, ...]  # of the own forward; tensors, the first of them always given

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        are_tensors = all(value is None or isinstance(value, torch.Tensor) for value in given.values())
        is_known = len(args) <= len(self.arguments) and set(self.arguments).issuperset(given)
        if not (are_tensors and is_known and given.get(self.arguments[0]) is not None):
            return own_forward(self, *args, **kwargs)
        names = tuple(given)

        def run(*tensors: torch.Tensor | None) -> torch.Tensor:
            by_name = dict(zip(self.arguments, tensors, strict=True))
            return self._run(**{name: by_name[name] for name in names})

        return replayed(self, run, *(given.get(name) for name in self.arguments))

    def _run(self: Any, **given: torch.Tensor | None) -> torch.Tensor:
        """The network's output for arguments by name; a family's class may do something around it."""
        return own_forward(self, **given)


def untrusted_module(network: nn.Module) -> str | None:
    """Which module of an accelerated network may do anything in its forward, in one clause; None where none may."""
    computed: tuple[str, ...] = ()  # an op computes what lies below these paths
    for path, module in network.named_modules():
        if path.startswith(computed) and computed:
            continue
        reason = _why_untrusted(module)
        if reason is not None:
            return f"{path or 'the network'}: {reason}"
        declared = getattr(type(module), "_ddpm_fast", None)
        if declared is not None and not declared.is_network:
            computed += (f"{path}.",)
    return None


def _why_untrusted(module: nn.Module) -> str | None:
    if hasattr(type(module), "_ddpm_fast"):
        by_modules = getattr(module, "why_by_modules", None)
        return why_own_forward(module) or (by_modules() if by_modules is not None else None)
    cls: Any = own_class(module)
    if is_of_torch(cls):
        return None if is_of_torch(cls.forward) else f"the forward of {cls.__name__} was replaced"
    path = path_of(cls)
    if path not in plain_classes():
        return f"it is a {cls.__name__}, and what its forward does besides is not known"
    return why_changed(module, path)
