"""The average of weights: `ema_pytorch.EMA.update`, most of it in the optimizer's kernel, the rest recorded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.runtime import recording
from ddpm_fast.runtime.snapshot import Snapshot

# Methods of EMA that are not called here, but done.
_OWN = (
    "update",
    "update_moving_average",
    "copy_params_from_model_to_ema",
    "get_params_iter",
    "get_buffers_iter",
)


def foreign_method(ema: Any) -> str | None:
    """The first method of an average that is not ema_pytorch's, so that it may do anything; None if all are."""
    for name in _OWN:
        method = getattr(type(ema), name, None)
        if name in vars(ema) or getattr(method, "__module__", "").split(".")[0] != "ema_pytorch":
            return name
    return None


def why_not_averaged(ema: Any, model: nn.Module) -> str | None:
    """Why `ema.update()` has to be called instead of `Average`, in one clause; None where it has not."""
    method = foreign_method(ema)
    if method is not None:
        return f"it is a {type(ema).__name__} with its own {method}"
    if ema.model is not model:
        return "it is of another model"
    if ema.ema_model is None:
        return "it has no copy of the model yet (lazy_init_ema=True)"
    if ema.update_model_with_ema_every is not None:
        return "it is copied to the model (update_model_with_ema_every)"
    if ema.param_or_buffer_names_no_ema:
        return "it copies some weights at every update (param_or_buffer_names_no_ema)"
    return None


class Average:
    """What `ema.update()` after a step does, in two parts around the step, with the package's counters on the host.

    `begin` decides what becomes of the average in this step, and puts its weight where the optimizer's kernel reads it,
    0 where nothing is due. `finish` moves what the kernel has not. Only the host decides, and it waits for nothing.

    Attributes:
        weight: 1 − decay, a float32 scalar on the device.
        targets: parameter → its average, of those that a kernel can move.
    """

    def __init__(self, ema: Any, device: torch.device, recorder: Any):
        self.ema, self.model, self._recorder = ema, ema.model, recorder(device)
        # Reading them on the device would wait for it.
        ema.initted, ema.step = ema.initted.cpu(), ema.step.cpu()
        self.weight = torch.zeros((), device=device)
        self._due: str | None = None
        # By name: the addresses of the tensors, and the function that replays.
        self._recordings: dict[str, tuple[list[int], recording.Body]] = {}
        self._checked: dict[str, frozenset[torch.Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the tensors again; called where one may have been replaced."""
        ema = self.ema
        parameters = zip(ema.get_params_iter(ema.ema_model), ema.get_params_iter(ema.model), strict=True)
        self._parameters = [(name, average, current) for (name, average), (_, current) in parameters]
        self._written = [*ema.ema_model.parameters(), *ema.ema_model.buffers()]
        self.targets = {
            current: average
            for name, average, current in self._parameters
            if not self._is_ignored(name) and _are_alike(average, current)
        }
        self._all_targets = frozenset(self.targets)
        self._checked = {}
        self._ignored = self._names()
        self._snapshot = Snapshot(ema.ema_model, [vars(ema), ema._modules, ema._buffers], is_called=False)

    def holds(self) -> bool:
        """True if nothing that `refresh` read has been replaced since, besides the model's tensors."""
        return self._names() == self._ignored and self._snapshot.holds()

    def moved_with_gradients(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> frozenset[torch.Tensor]:
        """The parameters among `targets` that have a gradient now, in `.grad` or in `gradients`."""
        moved = frozenset(p for p in self.targets if p.grad is not None or p in gradients)
        return self._all_targets if len(moved) == len(self._all_targets) else moved

    def begin(self) -> None:
        """Before a step that may still fail: nothing is counted yet."""
        ema = self.ema
        step = int(ema.step)
        is_due = step % ema.update_every == 0
        weight = 0.0
        self._due = None
        if not ema.initted or (is_due and step <= ema.update_after_step):
            self._due, weight = "copy", 1.0
        elif is_due and not ema.is_frozen:
            ema.step += 1  # as the package does before it asks
            self._due, weight = "move", 1 - ema.get_current_decay()
            ema.step -= 1
        self.weight.fill_(weight)

    def finish(self, by_kernel: frozenset[torch.Tensor] = frozenset()) -> None:
        """After the step.

        Args:
            by_kernel: the parameters whose averages the optimizer's kernel has moved.
        """
        if self._due is not None:
            if self._checked.get(self._due) != by_kernel:
                self._prepare(self._due, by_kernel)
                self._checked[self._due] = by_kernel
            self._recordings[self._due][1]()
            if self._due == "copy":
                self.ema.initted.fill_(True)
            torch.autograd.graph.increment_version(self._written)
        self.ema.step += 1

    def _prepare(self, name: str, by_kernel: frozenset[torch.Tensor]) -> None:
        """Record anew where the tensors are others."""
        ema = self.ema
        buffers = zip(ema.get_buffers_iter(ema.ema_model), ema.get_buffers_iter(ema.model), strict=True)
        both = [entry for entry in self._parameters if entry[2] not in by_kernel]
        both += [(key, average, current) for (key, average), (_, current) in buffers]
        # What is ignored is only copied at the beginning.
        pairs = [(a.data, current.data) for key, a, current in both if name == "copy" or not self._is_ignored(key)]
        held = [t.data_ptr() for pair in pairs for t in pair]
        if name not in self._recordings or held != self._recordings[name][0]:
            self._recordings[name] = (held, self._record(name, pairs))

    def _record(self, name: str, pairs: list) -> recording.Body:
        if not pairs:
            return lambda: None
        targets = [target for target, _ in pairs]
        saved = [target.clone() for target in targets]
        return self._recorder.record(partial(self._apply, name, pairs), lambda: torch._foreach_copy_(targets, saved))

    @torch.no_grad()
    def _apply(self, name: str, pairs: list) -> None:
        targets, sources = map(list, zip(*pairs, strict=True))
        if name == "copy":
            torch._foreach_copy_(targets, sources)
            return
        # The weight is read on the device; a number would be part of the recording.
        torch._foreach_lerp_(targets, sources, [self.weight] * len(targets))

    def _names(self) -> tuple:
        return (*self.ema.ignore_names, None, *self.ema.ignore_startswith_names)

    def _is_ignored(self, name: str) -> bool:
        return name in self.ema.ignore_names or name.startswith((*self.ema.ignore_startswith_names,))


def _are_alike(average: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether one kernel can walk both in the order of memory."""
    return (
        average is not parameter
        and average.dtype is parameter.dtype
        and average.device == parameter.device
        and average.shape == parameter.shape
        and average.stride() == parameter.stride()
    )
