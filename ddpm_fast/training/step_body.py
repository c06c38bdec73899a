"""What a training step computes: loss, backward, gradient clipping, optimizer, and the average of weights.

Nothing here knows whether it runs once or is recorded, see step_recordings.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ddpm_fast.diffusion.conditions import CONDITIONS
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.xm import XMWrapper
from ddpm_fast.models.narrow_weights import Gradients, KeptCopies
from ddpm_fast.runtime.plain import as_int
from ddpm_fast.training.average import Average
from ddpm_fast.training.optimizer_step import OptimizerStep
from ddpm_fast.training.recordable import has_gradient_hooks
from ddpm_fast.training.transfers import pinned


class StepBody:
    """A training step on batches that `_take_in` has copied to where it reads them.

    The step on one batch in one process is `_whole_step`. With several batches or processes it is `_add_gradients` of
    each batch, `_average_over_processes` and `_update`; gradients are then in `flat_gradients`.

    Args:
        all: as of `capture_training_step`.

    Attributes:
        grad_norm: the gradients' norm before clipping, a scalar on the device that every step overwrites; NaN where
            `max_grad_norm` is None.
    """

    # A recorder of `runtime.recording`, which says whether learning rates are read from `_rates`.
    recorder: Any

    def __init__(
        self,
        diffusion: DiffusionProcess | XMWrapper,
        optimizer: torch.optim.Optimizer,
        batch_shape: Sequence[int],
        *,
        max_grad_norm: float | None,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        accumulate: int,
    ):
        shape = (diffusion.channels, *(diffusion.image_size or ()))
        if len(batch_shape) != 4 or batch_shape[0] < 1 or tuple(batch_shape[1:]) != shape:
            raise ValueError(f"batch_shape must be (B, {', '.join(map(str, shape))}), got {tuple(batch_shape)}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        if autocast == torch.float16 and scaler is None:
            raise ValueError("autocast=torch.float16 needs a gradient scaler, got scaler=None")
        self.diffusion, self.optimizer = diffusion, optimizer
        self.max_grad_norm, self.autocast, self.scaler = max_grad_norm, autocast, scaler
        self.accumulate = as_int("accumulate", accumulate, 1)
        self.batch_shape = tuple(batch_shape)
        self._optimizer_step = OptimizerStep(optimizer)
        device = diffusion.device
        # Images, flips and conditions where a recording reads them, for each kind of batch.
        self._inputs: dict[tuple, tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]] = {}
        self._loss = torch.zeros((), device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)
        self._average: Average | None = None
        # Parameters whose averages the optimizer's kernel moves, by the last body that ran.
        self._by_kernel: frozenset[torch.Tensor] = frozenset()
        self._kept: KeptCopies | None = None
        # Learning rates, one for each group, where a recording reads them at each replay.
        self._rates: list[torch.Tensor] = []
        self._processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Drop the gradients' memory, and which parameters have any."""
        self.flat_gradients: list[torch.Tensor] = []
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        # Parameters that a batch has reached; the optimizer leaves the others alone, as it does without a recording.
        self._received: set[nn.Parameter] = set()
        self._parameters = list(self.diffusion.parameters())

    def _make_flat_gradients(self) -> None:
        """Memory in which gradients of several batches or processes are added up."""
        if not self._gradients:
            trained = [parameter for parameter in self._parameters if parameter.requires_grad]
            self.flat_gradients, self._gradients = _flat_like(trained)

    def _take_in(
        self,
        kind: tuple,
        images: torch.Tensor,
        flips: torch.Tensor | None,
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Copy a batch to where the recordings of its kind read it."""
        device, conditions = self._loss.device, conditions or {}
        if kind not in self._inputs:
            own = torch.zeros(self.batch_shape, dtype=kind[0], device=device)
            told = {name: torch.zeros_like(tensor, device=device) for name, tensor in conditions.items()}
            self._inputs[kind] = own, None if flips is None else torch.zeros_like(flips, device=device), told
        own_images, own_flips, own_conditions = self._inputs[kind]
        pairs = [(own_images, images), (own_flips, flips)]
        pairs += [(own_conditions[name], tensor) for name, tensor in conditions.items()]
        for to, given in pairs:
            if to is not None and given is not None:
                to.copy_(pinned(given, device), non_blocking=True)

    def _whole_step(self, kind: tuple, self_conditioned: bool | None) -> None:
        self._drop_gradients()
        # Nobody sees `.grad` of this step: the optimizer's kernel takes gradients of copies in the copies' dtype.
        gradients: Gradients | None = None if any(map(has_gradient_hooks, self._parameters)) else {}
        loss = self._backward(kind, self_conditioned, gradients)
        norm = self._step_optimizer(gradients)
        made = {self._loss: loss} if norm is None else {self._loss: loss, self.grad_norm: norm}
        torch._foreach_copy_(list(made), list(made.values()))  # one launch
        self._drop_gradients()  # they are in the graphs' memory, which the next replay overwrites

    def _add_gradients(self, kind: tuple, self_conditioned: bool | None, is_first: bool) -> None:
        """The gradients of one batch into `flat_gradients`; they begin with zeros."""
        if is_first:
            torch._foreach_zero_(self.flat_gradients)
            self._loss.zero_()
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient if parameter in self._received and not is_first else None
        self._loss.add_(self._backward(kind, self_conditioned))
        fresh = {p: p.grad for p, kept in self._gradients.items() if p.grad is not None and p.grad is not kept}
        if fresh:
            with torch.no_grad():
                torch._foreach_copy_([self._gradients[p] for p in fresh], list(fresh.values()))
        self._received.update(fresh)
        self._drop_gradients()

    def _average_over_processes(self) -> None:
        """As DistributedDataParallel does: divide, then sum."""
        if self._processes > 1:
            for flat in self.flat_gradients:
                flat.div_(self._processes)
                dist.all_reduce(flat)

    def _update(self) -> None:
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient if parameter in self._received else None
        norm = self._step_optimizer()
        if norm is not None:
            self.grad_norm.copy_(norm)
        self._drop_gradients()

    def _backward(self, kind: tuple, self_conditioned: bool | None, gradients: Gradients | None = None) -> torch.Tensor:
        """The loss of a batch, a share of the step's, after its backward.

        A weight's gradient is then in `.grad`, or, where given, in `gradients`, see `KeptCopies.read`.
        """
        images, flips, conditions = self._inputs[kind]
        options: dict[str, Any] = {} if self_conditioned is None else {"self_conditioned": self_conditioned}
        options |= conditions
        options |= {} if flips is None else {"flip": flips}
        autocast = torch.autocast(
            images.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
        )
        with autocast, nullcontext() if self._kept is None else self._kept.read(gradients):
            loss = self.diffusion(images, **options)
            loss = loss / self.accumulate if self.accumulate > 1 else loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for weight in [weight for weight in gradients or () if weight.grad is not None]:
            weight.grad = weight.grad + gradients.pop(weight)  # type: ignore[union-attr, operator]
        return loss.detach()

    def _step_optimizer(self, gradients: Gradients | None = None) -> torch.Tensor | None:
        """Move the weights; the gradients' norm before clipping, or None where nothing is clipped."""
        self._by_kernel = frozenset()
        if self._optimizer_step.why_not(gradients) is None:
            copies = None if self._kept is None else self._kept.parts
            rates = self._rates if self.recorder.records_calls else None
            found, self._by_kernel = self._optimizer_step.apply(
                self.max_grad_norm, self.scaler, self._average, copies, rates, gradients
            )
            return None if self.max_grad_norm is None else found
        for weight, gradient in (gradients or {}).items():
            weight.grad = gradient.to(weight.dtype)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self._kept is not None:
            self._kept.refresh()
        return norm

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def as_batch(batch: torch.Tensor | tuple) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Images, flips and conditions of what a step is given."""
    images, flips, conditions = (batch, None, None) if isinstance(batch, torch.Tensor) else (*batch, None, None)[:3]
    return images, flips, dict(conditions or {})


def check_conditions(conditions: Mapping[str, Any], batch_size: int) -> None:
    """Raise unless conditions are tensors of the batch; the process checks the rest."""
    for name, tensor in conditions.items():
        if name not in CONDITIONS:
            raise TypeError(f"conditions must be of {', '.join(CONDITIONS)}, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[0] != batch_size:
            raise ValueError(f"{name} must have one entry per image, {batch_size}, got shape {tuple(tensor.shape)}")


def _flat_like(
    parameters: Sequence[nn.Parameter],
) -> tuple[list[torch.Tensor], dict[nn.Parameter, torch.Tensor]]:
    """Zeros for all parameters in one piece of memory per dtype, and for each its part, laid out as it is."""
    flats, parts = [], {}
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        members = [p for p in parameters if p.dtype == dtype]
        flat = torch.zeros(sum(p.numel() for p in members), dtype=dtype, device=members[0].device)
        flats.append(flat)
        for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parts[parameter] = _as_laid_out(part, parameter)
    return flats, parts


def _as_laid_out(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A piece of memory as a tensor in the shape of a parameter, and in its layout where that has no gaps."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)
