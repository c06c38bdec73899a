"""A whole training step as one CUDA graph: loss, backward, gradient clipping, optimizer, and the average of weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.runtime import recording


def capture_training_step(
    diffusion: GaussianDiffusion,
    optimizer: torch.optim.Optimizer,
    batch_shape: Sequence[int],
    *,
    ema: nn.Module | None = None,
    max_grad_norm: float | None = 1.0,
    autocast: torch.dtype | None = None,
    graph: bool | None = None,
    any_module: bool = False,
) -> TrainingStep:
    """A function `step(images) -> loss` that trains `diffusion` on one batch, as a CUDA graph where there is CUDA.

    Timesteps, noise and dropout are drawn on the device from torch's generator, so that `torch.manual_seed` fixes a
    run, and they are those of the same step run without a graph. The graph is recorded by the first call, and again
    when weights, optimizer state or settings are replaced. A learning rate may change at any time.

    Let go of the losses of earlier steps that ran without a graph before the first call: they keep autograd's nodes of
    the weights, which are bound to the stream of then, and a capture cannot take that in.

    Args:
        optimizer: Adam or AdamW over parameters of `diffusion`, best with `fused=True`; on CUDA with `capturable=True`.
        batch_shape: (B, C, H, W) of every batch.
        ema: an `ema_pytorch.EMA` of `diffusion`; a call does what `ema.update()` after the step would.
        max_grad_norm: the gradients' norm is clipped to this; None leaves them.
        autocast: torch.bfloat16, or None for the weights' own dtype. float16 would need a gradient scaler.
        graph: None records on CUDA and runs step by step elsewhere, True raises elsewhere, False never records.
        any_module: trust modules that are neither torch's nor this package's to do nothing in Python that matters.

    Raises:
        TypeError, ValueError: an argument does not fit, or a graph cannot replace the step; in one sentence.
    """
    if not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion must be a GaussianDiffusion, got {type(diffusion).__name__}")
    reason = recording.CudaRecorder.why_not(diffusion.device)
    if graph and reason is not None:
        raise ValueError(f"graph=True, and a graph cannot replace the step: {reason}")
    is_recorded = diffusion.device.type == "cuda" if graph is None else graph
    recorder = recording.CudaRecorder if is_recorded else recording.EagerRecorder
    return TrainingStep(
        diffusion,
        optimizer,
        batch_shape,
        ema=ema,
        max_grad_norm=max_grad_norm,
        autocast=autocast,
        recorder=recorder,
        any_module=any_module,
    )


class TrainingStep:
    """What `capture_training_step` returns; its arguments, and the class of the recorder that makes graphs.

    Attributes:
        grad_norm: the gradients' norm before clipping, a scalar on the device that every call overwrites; NaN where
            `max_grad_norm` is None.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        optimizer: torch.optim.Optimizer,
        batch_shape: Sequence[int],
        *,
        ema: nn.Module | None,
        max_grad_norm: float | None,
        autocast: torch.dtype | None,
        recorder: Any,
        any_module: bool,
    ):
        _check_optimizer(optimizer, diffusion, capturable=recorder.freezes_decisions)
        shape = (diffusion.channels, *(diffusion.image_size or ()))
        if len(batch_shape) != 4 or batch_shape[0] < 1 or tuple(batch_shape[1:]) != shape:
            raise ValueError(f"batch_shape must be (B, {', '.join(map(str, shape))}), got {tuple(batch_shape)}")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast must be torch.bfloat16 or None, got {autocast}: float16 needs a gradient scaler, which is "
                "not recorded"
            )
        if recorder.freezes_decisions:
            reason = _why_not_recorded(diffusion, optimizer, any_module)
            if reason is not None:
                raise ValueError(f"a graph cannot replace the step: {reason}; graph=False runs it without one")
        self.diffusion, self.optimizer = diffusion, optimizer
        self.max_grad_norm, self.autocast = max_grad_norm, autocast
        self._recorder_class, self.any_module = recorder, any_module
        device = diffusion.device
        self._images = torch.zeros(tuple(batch_shape), device=device)
        self._loss = torch.zeros((), device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)
        self._average = None if ema is None else _Average(ema, diffusion, recorder)
        # Learning rates on the device, where a graph reads them at each replay.
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.clear()

    def clear(self) -> None:
        """Drop what is recorded; the next call records again."""
        self._recordings: dict[bool | None, recording.Body] = {}
        self._captured_key: tuple | None = None
        self.recorder = self._recorder_class(self.diffusion.device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Train on a batch.

        Args:
            images: of `batch_shape`, floating point, in [0, 1] with `auto_normalize`; on the device, or in memory of
                the host, best pinned.

        Returns:
            The loss, a scalar on the device; nothing waits for it.
        """
        if images.shape != self._images.shape:
            raise ValueError(f"images must have shape {tuple(self._images.shape)}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1] (divide 8-bit images by 255), got {images.dtype}")
        self._images.copy_(_pinned(images, self._images.device), non_blocking=True)
        lay_out_state(self.optimizer)
        self_conditioned = None
        if self.recorder.freezes_decisions:  # the coin is the host's, so that each side has a graph of its own
            reason = _why_not_recorded(self.diffusion, self.optimizer, self.any_module)
            if reason is not None:
                raise ValueError(f"a graph cannot replace the step: {reason}; graph=False runs it without one")
            self_conditioned = self.diffusion.draw_self_condition()
            self._hold_rates()
            if self._capture_key() != self._captured_key:
                self.clear()
        if self_conditioned not in self._recordings:
            reset = self._make_reset()
            try:
                self._recordings[self_conditioned] = self.recorder.record(partial(self._body, self_conditioned), reset)
            except BaseException:
                reset()  # the weights as they were, not as a warm-up left them
                self._drop_gradients()
                self.clear()
                raise
            self._captured_key = self._capture_key()
        self._recordings[self_conditioned]()
        torch.autograd.graph.increment_version(list(self.diffusion.parameters()))  # as if each op had been called
        if self._average is not None:
            self._average.update()
        return self._loss.clone()

    def _body(self, self_conditioned: bool | None) -> None:
        self._drop_gradients()
        chosen = {} if self_conditioned is None else {"self_conditioned": self_conditioned}
        with torch.autocast(
            self._images.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            loss = self.diffusion(self._images, **chosen)
        loss.backward()
        if self.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.max_grad_norm)
            self.grad_norm.copy_(norm)
        self.optimizer.step()
        self._loss.copy_(loss.detach())
        self._drop_gradients()  # they are in the graphs' memory, which the next replay overwrites

    def _drop_gradients(self) -> None:
        for parameter in self.diffusion.parameters():
            parameter.grad = None

    def _make_reset(self) -> Callable[[], None]:
        """A function that puts weights and optimizer state back to what they are now."""
        held = (*self.diffusion.parameters(), *self.diffusion.buffers())
        saved = {t: t.detach().clone() for t in (*held, *_state_tensors(self.optimizer))}

        @torch.no_grad()
        def reset() -> None:
            for tensor in (*held, *_state_tensors(self.optimizer)):
                # State that the step itself has made began with zeros: that is Adam's.
                tensor.copy_(saved[tensor]) if tensor in saved else tensor.zero_()

        return reset

    def _hold_rates(self) -> None:
        groups = self.optimizer.param_groups
        self._rates += [torch.zeros((), device=self.diffusion.device) for _ in groups[len(self._rates) :]]
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], torch.Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate

    def _capture_key(self) -> tuple:
        """The cache key of a recording: addresses, settings of modules, options of the optimizer."""
        diffusion = self.diffusion
        options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        members = [[id(p) for p in g["params"]] for g in self.optimizer.param_groups]
        wanted = [p.requires_grad for p in diffusion.parameters()]
        attributes = (diffusion.objective, diffusion.offset_noise_strength, diffusion.num_timesteps, self.max_grad_norm)
        state = recording.storage_key(_state_tensors(self.optimizer))
        return recording.weights_of(diffusion), state, wanted, members, options, attributes, recording.settings()


class _Average:
    """`ema_pytorch.EMA.update`, with its counters on the host and its arithmetic recorded.

    The average moves only every few steps; on the others nothing is replayed.
    """

    def __init__(self, ema: Any, diffusion: GaussianDiffusion, recorder: Any):
        if ema.model is not diffusion:
            raise ValueError("ema must be an EMA of diffusion, got one of another model")
        if ema.ema_model is None:
            raise ValueError("ema must have its copy of the model already, got one with lazy_init_ema=True")
        if ema.update_model_with_ema_every is not None:
            raise ValueError("ema must leave the model alone, got one with update_model_with_ema_every")
        if ema.param_or_buffer_names_no_ema:
            raise ValueError("ema must average or ignore, got one with param_or_buffer_names_no_ema")
        # Reading them on the device would wait for it.
        ema.initted, ema.step = ema.initted.cpu(), ema.step.cpu()
        self.ema, self.recorder = ema, recorder(diffusion.device)
        self._weight = torch.zeros((), device=diffusion.device)  # 1 − decay
        # By name: the addresses of the tensors, and the function that replays.
        self._recordings: dict[str, tuple[list[int], recording.Body]] = {}

    def update(self) -> None:
        """The update of this step; the host decides which, as the package does, and waits for nothing."""
        ema = self.ema
        step = int(ema.step)
        ema.step += 1
        is_due = step % ema.update_every == 0
        if not ema.initted or (is_due and step <= ema.update_after_step):
            self._replay("copy")
            ema.initted.fill_(True)
        elif is_due and not ema.is_frozen:
            self._weight.fill_(1 - ema.get_current_decay())
            self._replay("move")

    def _replay(self, name: str) -> None:
        pairs = self._pairs(name)
        held = [t.data_ptr() for pair in pairs for t in pair]
        if name not in self._recordings or held != self._recordings[name][0]:
            self._recordings[name] = (held, self._record(name, pairs))
        self._recordings[name][1]()
        torch.autograd.graph.increment_version([*self.ema.ema_model.parameters(), *self.ema.ema_model.buffers()])

    def _record(self, name: str, pairs: list) -> recording.Body:
        targets = [target for target, _ in pairs]
        saved = [target.clone() for target in targets]
        return self.recorder.record(partial(self._apply, name, pairs), lambda: torch._foreach_copy_(targets, saved))

    @torch.no_grad()
    def _apply(self, name: str, pairs: list) -> None:
        targets, sources = map(list, zip(*pairs, strict=True))
        if name == "copy":
            torch._foreach_copy_(targets, sources)
            return
        # The weight is read on the device; a number would be part of the recording.
        torch._foreach_lerp_(targets, sources, [self._weight] * len(targets))

    def _pairs(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The average's tensors and the model's; what is ignored is only copied at the beginning."""
        ema = self.ema
        both = itertools.chain(
            zip(ema.get_params_iter(ema.ema_model), ema.get_params_iter(ema.model), strict=True),
            zip(ema.get_buffers_iter(ema.ema_model), ema.get_buffers_iter(ema.model), strict=True),
        )
        ignored = (*ema.ignore_startswith_names,)
        return [
            (average.data, current.data)
            for (key, average), (_, current) in both
            if name == "copy" or not (key in ema.ignore_names or key.startswith(ignored))
        ]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for the device; itself where it is there already."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What CUDA copies while the host goes on: from pageable memory it waits until all work before is done."""
    is_pageable = device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.pin_memory() if is_pageable else tensor


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


@torch.no_grad()
def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give moments that were loaded from elsewhere the layout of their parameters.

    Fused Adam walks through memory: on the CPU, moments in another order would be those of other weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_optimizer(optimizer: torch.optim.Optimizer, diffusion: nn.Module, capturable: bool) -> None:
    if type(optimizer) not in (Adam, AdamW):  # a subclass may do anything in Python
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


def _why_not_recorded(diffusion: GaussianDiffusion, optimizer: Any, any_module: bool) -> str | None:
    """Why a recording may not replace a step, in one clause; None where it may."""
    if diffusion.immiscible:
        return "immiscible=True assigns the noise on the host"
    for name, module in diffusion.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the model'} has backward hooks, which a replay does not call"
    for name, parameter in diffusion.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"{name} has gradient hooks, which a replay does not call"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks on its step, which a replay does not call"
    return recording.why_not_recorded(diffusion) or (None if any_module else recording.untrusted_module(diffusion))
