"""A whole training step recorded: loss, backward, gradient clipping, optimizer, and the average of weights.

On CUDA the recording is a graph; on the CPU it is a tape of operator calls, which a replay makes without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ddpm_fast.diffusion.conditions import CONDITIONS
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.xm import XMWrapper, process_of
from ddpm_fast.models.narrow_weights import KeptCopies
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime import recording, triton_launch
from ddpm_fast.runtime.plain import as_int
from ddpm_fast.runtime.snapshot import Snapshot
from ddpm_fast.training.adam_state import check_optimizer, settings_of_scaler, state_of_scaler, state_tensors
from ddpm_fast.training.average import Average, foreign_method, why_not_averaged
from ddpm_fast.training.optimizer_step import OptimizerStep
from ddpm_fast.training.recordable import NotRecordableError, draws_coin_first, why_not_recorded
from ddpm_fast.training.transfers import pinned


def capture_training_step(
    diffusion: DiffusionProcess | XMWrapper,
    optimizer: torch.optim.Optimizer,
    batch_shape: Sequence[int],
    *,
    ema: nn.Module | None = None,
    max_grad_norm: float | None = 1.0,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    graph: bool | None = None,
    any_module: bool = False,
    keep_copies: bool = False,
) -> TrainingStep:
    """A function `step(images) -> loss` that trains `diffusion` on one batch by replaying a recording.

    The recording is a CUDA graph, or on the CPU a tape of operator calls, made in the second call.

    A batch of a conditional network is `step((images, None, {"classes": classes}))`, see `TrainingStep.__call__`.

    Timesteps, noise and dropout are drawn on the device from torch's generator, so that `torch.manual_seed` fixes a
    run, and they are those of the same step run without a recording. It is made by the first call, and again when
    weights, optimizer state or settings are replaced. A learning rate may change at any time.

    Let go of the losses of earlier steps that ran without a graph before the first call: they keep autograd's nodes of
    the weights, which are bound to the stream of then, and a capture cannot take that in.

    Where torch.distributed runs several processes, gradients are averaged over them between two graphs.

    Args:
        diffusion: a process, such as `GaussianDiffusion`, or an `XMWrapper` around one.
        optimizer: Adam or AdamW over parameters of `diffusion`, best with `fused=True`; on CUDA with `capturable=True`.
        batch_shape: (B, C, H, W) of every batch.
        ema: an `ema_pytorch.EMA` of `diffusion`, or of the process in an `XMWrapper`; a call does what `ema.update()`
            after the step would. One with an `update` of its own, or that writes more than its own copy of the model,
            is called after the step.
        max_grad_norm: the gradients' norm is clipped to this; None leaves them.
        autocast: torch.bfloat16, torch.float16 with a scaler, or None for the weights' own dtype.
        scaler: scales the loss for float16 and skips steps whose gradients are not finite; it stays on the device.
        accumulate: batches per step: `step(images, more_images)` with 2. The gradient is that of their mean loss.
        graph: True records, and raises where that cannot be done; False never records. None records, too, but on the
            CPU runs step by step where it cannot: `TrainingStep.explain_graphs` says why.
        any_module: trust modules that are neither torch's nor this package's to do nothing in Python that matters.
        keep_copies: the weights' copies for autocast are kept, and written by the optimizer's kernel. Between calls
            weights then may be changed by torch's operators alone, and not through `.data`, which leaves no trace;
            after that call `renew_copies`.

    Raises:
        TypeError, ValueError: an argument does not fit, or a graph cannot replace the step; in one sentence.
    """
    if process_of(diffusion) is None:
        raise TypeError(f"diffusion must be a process or an XMWrapper around one, got {type(diffusion).__name__}")
    recorder = recording.recorder_on(diffusion.device)
    reason = recorder.why_not(diffusion.device)
    if graph and reason is not None:
        raise ValueError(f"graph=True, and a recording cannot replace the step: {reason}")
    falls_back = graph is None and recorder is not recording.CudaRecorder
    if graph is False or (falls_back and reason is not None):
        recorder = recording.EagerRecorder
    return TrainingStep(
        diffusion,
        optimizer,
        batch_shape,
        ema=ema,
        max_grad_norm=max_grad_norm,
        autocast=autocast,
        scaler=scaler,
        accumulate=accumulate,
        recorder=recorder,
        any_module=any_module,
        keep_copies=keep_copies,
        falls_back=falls_back,
        refusal="graph=False was given" if graph is False else reason,
    )


class TrainingStep:
    """What `capture_training_step` returns.

    Args:
        recorder: the class that makes recordings; the other arguments are those of `capture_training_step`.
        falls_back: where the step cannot be recorded, it runs without a recording instead of raising.
        refusal: why `recorder` does not record.

    A step on one batch in one process is one recording. Otherwise there are three, or six with self-conditioning: the
    gradients of the first batch, those of a further one, and the update; gradients then stay in memory of their own,
    `flat_gradients`, where they are added up and averaged over processes.

    Attributes:
        grad_norm: the gradients' norm before clipping, a scalar on the device that every call overwrites; NaN where
            `max_grad_norm` is None.
    """

    def __init__(
        self,
        diffusion: DiffusionProcess | XMWrapper,
        optimizer: torch.optim.Optimizer,
        batch_shape: Sequence[int],
        *,
        recorder: Any,
        ema: nn.Module | None = None,
        max_grad_norm: float | None = 1.0,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        any_module: bool = False,
        keep_copies: bool = False,
        falls_back: bool = False,
        refusal: str | None = None,
    ):
        check_optimizer(optimizer, diffusion, capturable=recorder.needs_capturable)
        shape = (diffusion.channels, *(diffusion.image_size or ()))
        if len(batch_shape) != 4 or batch_shape[0] < 1 or tuple(batch_shape[1:]) != shape:
            raise ValueError(f"batch_shape must be (B, {', '.join(map(str, shape))}), got {tuple(batch_shape)}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        if autocast == torch.float16 and scaler is None:
            raise ValueError("autocast=torch.float16 needs a gradient scaler, got scaler=None")
        if recorder.freezes_decisions:
            reason = why_not_recorded(diffusion, optimizer, any_module)
            if reason is not None and not falls_back:
                raise NotRecordableError(reason)
            if reason is not None:
                recorder, refusal = recording.EagerRecorder, reason
        self._falls_back, self._refusal = falls_back, refusal
        self.diffusion, self.optimizer = diffusion, optimizer
        self.max_grad_norm, self.autocast, self.scaler = max_grad_norm, autocast, scaler
        self.accumulate = as_int("accumulate", accumulate, 1)
        self._optimizer_step = OptimizerStep(optimizer)
        self._recorder_class, self.any_module = recorder, any_module
        device = diffusion.device
        self.batch_shape = tuple(batch_shape)
        # Images, flips and conditions where a graph reads them, for each kind of batch.
        self._inputs: dict[tuple, tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]] = {}
        self._loss = torch.zeros((), device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)
        self.ema: Any = ema
        self._average = None if ema is None else _average_of(ema, _averaged(ema, diffusion), recorder)
        # Parameters whose averages the optimizer's kernel moves: by the last body that ran, and by name of a recording.
        self._by_kernel: frozenset[torch.Tensor] = frozenset()
        self._by_kernel_in: dict[tuple, frozenset[torch.Tensor]] = {}
        self.keep_copies = keep_copies
        self._kept: KeptCopies | None = None
        # Learning rates, one for each group, where a recording reads them at each replay.
        self._rates: list[torch.Tensor] = []
        self._processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.clear()

    def clear(self) -> None:
        """Drop what is recorded; the next call records again."""
        self._recordings: dict[tuple, recording.Body] = {}
        # Bodies that have run once before a recorder records a call of them.
        self._ran: set[tuple] = set()
        self._by_kernel_in = {}
        self._captured_key: tuple | None = None
        self._snapshot: Snapshot | None = None
        self.flat_gradients: list[torch.Tensor] = []
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        # Parameters that a batch has reached; the optimizer leaves the others alone, as it does without a recording.
        self._received: set[nn.Parameter] = set()
        self._parameters = list(self.diffusion.parameters())
        self.recorder = self._recorder_class(self.diffusion.device)

    def __call__(self, *batches: torch.Tensor | tuple) -> torch.Tensor:
        """Train on `accumulate` batches.

        Args:
            batches: images of `batch_shape`, floating point in [0, 1] with `auto_normalize`, or uint8, which stand for
                themselves / 255; or tuples of images, flips, (B,) bool or None, the images to be mirrored, and
                conditions, a dictionary of what the process takes by keyword: `classes`, `cond`, `cond_image` or
                `cond_keep_mask`, (B, ...) each. All on the device, or in memory of the host, best pinned.

        Returns:
            The loss, a scalar on the device; nothing waits for it.
        """
        if len(batches) != self.accumulate:
            raise ValueError(
                f"a step takes {self.accumulate} batches, accumulate={self.accumulate}; got {len(batches)}"
            )
        given = [_as_batch(batch) for batch in batches]
        for images, _, conditions in given:
            if images.shape != self.batch_shape:
                raise ValueError(f"images must have shape {self.batch_shape}, got {tuple(images.shape)}")
            if not images.is_floating_point() and images.dtype != torch.uint8:
                raise TypeError(f"images must be floating point in [0, 1] or uint8, got {images.dtype}")
            _check_conditions(conditions, len(images))
            if self.recorder.records_calls:
                process_of(self.diffusion).check_values(images, **conditions)  # type: ignore[union-attr]
        self._see_changes()
        if self._average is not None:
            self._average.begin()
        if self._kept is not None and not self._kept.is_current():
            self._kept.refresh()
        is_whole = self.accumulate == 1 and self._processes == 1
        if not is_whole and not self._gradients:
            trained = [parameter for parameter in self._parameters if parameter.requires_grad]
            self.flat_gradients, self._gradients = _flat_like(trained)
        for index, (images, flips, conditions) in enumerate(given):
            told = tuple((name, tensor.shape, tensor.dtype) for name, tensor in conditions.items())
            kind = (images.dtype if images.dtype == torch.uint8 else torch.float32, flips is not None, told)
            self._take_in(kind, images, flips, conditions)
            # The coin is the host's, so that each side has a recording of its own.
            is_drawn = self.recorder.freezes_decisions or draws_coin_first(self.diffusion)
            coin = self.diffusion.draw_self_condition() if is_drawn else None
            if is_whole:
                self._replay(("step", kind, coin), partial(self._whole_step, kind, coin))
            else:
                body = partial(self._add_gradients, kind, coin, index == 0)
                self._replay(("gradients", kind, coin, index == 0), body)
        if not is_whole:
            self._average_over_processes()
            self._replay(("update", len(self._received)), self._update)
        torch.autograd.graph.increment_version(self._parameters)  # as if each op had been called
        if self._kept is not None:
            self._kept.now_current()
        if self._average is not None:
            self._average.finish(self._by_kernel)
        elif self.ema is not None:
            self.ema.update()
        return self._loss.clone()

    def explain_optimizer(self) -> str:
        """What moved weights and their average in the last step, and why no kernel where none did; one sentence."""
        reasons = {
            "their average": None
            if self.ema is None
            else why_not_averaged(self.ema, _averaged(self.ema, self.diffusion))
        }
        reasons["their copies for autocast"] = None if self.autocast is None else self._why_not_kept()
        return self._optimizer_step.explain(reasons)

    def explain_graphs(self) -> str:
        """Whether steps are replayed, and if not, why; one sentence."""
        if self._refusal is not None:
            return f"training runs step by step: {self._refusal}"
        return f"training replays {self.recorder.what}"

    @property
    def _network(self) -> Any:
        process = process_of(self.diffusion)
        return None if process is None else process.network

    def renew_copies(self) -> None:
        """Make the copies of `keep_copies` again, after weights were changed through `.data`."""
        if self._kept is not None:
            self._kept.refresh()

    def _why_not_kept(self) -> str | None:
        """Why no copies of the weights are kept, in one clause; None where they are."""
        if not self.keep_copies:
            return "keep_copies=False"
        if self.autocast is None:
            return "there is no autocast"
        if not isinstance(self._network, UnetBase):
            return f"the model is a {type(self._network).__name__}"
        reason = triton_launch.why_not_triton(self.diffusion.device)
        if reason is None and self.ema is not None and self._average is None:
            reason = (
                f"ema.update() may change weights: {why_not_averaged(self.ema, _averaged(self.ema, self.diffusion))}"
            )
        return reason or (None if self._kept is None else self._kept.why_not_written())

    def _look_at_weights(self) -> None:
        """Keep copies of the weights where that is possible, the same as long as they fit."""
        device = self.diffusion.device
        if self._why_not_kept() is not None or self.autocast is None:
            self._kept = None
        elif self._kept is None or not self._kept.fit(device, self.autocast):
            self._kept = KeptCopies(self._network, device, self.autocast)
            if self._kept.why_not_written() is not None:
                self._kept = None

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
            room = torch.zeros(self.batch_shape, dtype=kind[0], device=device)
            told = {name: torch.zeros_like(tensor, device=device) for name, tensor in conditions.items()}
            self._inputs[kind] = room, None if flips is None else torch.zeros_like(flips, device=device), told
        own_images, own_flips, own_conditions = self._inputs[kind]
        pairs = [(own_images, images), (own_flips, flips)]
        pairs += [(own_conditions[name], tensor) for name, tensor in conditions.items()]
        for to, given in pairs:
            if to is not None and given is not None:
                to.copy_(pinned(given, device), non_blocking=True)

    def _see_changes(self) -> None:
        """Drop recordings that something has made invalid, and refuse what cannot be recorded any more."""
        if self.recorder.freezes_decisions:
            self._hold_rates()
        average = self._average
        if (
            self._snapshot is not None
            and self._snapshot.holds()
            and (average is None or average.holds())
            and self._options() == self._captured_options
        ):
            return
        lay_out_state(self.optimizer)
        self._parameters = list(self.diffusion.parameters())
        if average is not None and why_not_averaged(self.ema, average.model) is None:
            average.refresh()
        else:
            self._average = None
        self._look_at_weights()
        if self.scaler is not None and self.scaler._scale is None:
            self.scaler.scale(self._loss)  # makes its state, which a recording only changes
        if self.recorder.freezes_decisions:
            reason = why_not_recorded(self.diffusion, self.optimizer, self.any_module)
            if reason is not None:
                if not self._falls_back:
                    raise NotRecordableError(reason)
                self._stop_recording(reason)
        if not self.recorder.freezes_decisions:
            self.clear()  # which parameters have gradients, and their memory
            self._take_snapshot()
        elif self._capture_key() != self._captured_key:
            self.clear()
        elif self._recordings:
            self._take_snapshot()

    def _replay(self, name: tuple, body: Callable[[], None]) -> None:
        """Run a body; where there is no recording of that name yet, make it."""
        if name in self._recordings:
            self._recordings[name]()
        elif self.recorder.records_calls and name not in self._ran:
            body()
            # A recording finds what this call has made, such as Adam's moments.
            self._ran.add(name)
            self._remember()
        elif not self._falls_back:
            self._record(name, body)
        else:
            drawn = torch.get_rng_state()
            try:
                self._record(name, body)
            except (NotRecordableError, recording.CaptureError) as error:
                torch.set_rng_state(drawn)
                self._stop_recording(error.reason if isinstance(error, NotRecordableError) else str(error))
                body()
        self._by_kernel = self._by_kernel_in.get(name, self._by_kernel)

    def _record(self, name: tuple, body: Callable[[], None]) -> None:
        """Make a recording, and run it once."""
        reason = None if name[0] == "gradients" else self._optimizer_step.last_reason
        if self.recorder.records_calls and reason is not None:
            raise NotRecordableError(f"torch moves the weights: {reason}")
        reset = self._make_reset()
        try:
            recorded = self.recorder.record(body, reset)
            if self.recorder.records_calls:
                recorded()
        except BaseException:
            reset()  # the weights as they were, not as a warm-up left them
            self._drop_gradients()
            if not self._falls_back:
                self.clear()
            raise
        self._recordings[name] = recorded
        self._remember()
        if self.recorder.freezes_decisions:
            self._by_kernel_in[name] = self._by_kernel
        if not self.recorder.records_calls:
            recorded()

    def _remember(self) -> None:
        """What the recordings depend on, as it is now."""
        self._captured_key = self._capture_key()
        if self.recorder.freezes_decisions:
            self._take_snapshot()

    def _stop_recording(self, reason: str) -> None:
        """Go on step by step."""
        self._recorder_class, self._refusal = recording.EagerRecorder, reason
        self.recorder = self._recorder_class(self.diffusion.device)
        self._recordings, self._captured_key = {}, None

    def _whole_step(self, kind: tuple, self_conditioned: bool | None) -> None:
        self._drop_gradients()
        loss = self._backward(kind, self_conditioned)
        self._step_optimizer()
        self._loss.copy_(loss)
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
        self._step_optimizer()
        self._drop_gradients()

    def _backward(self, kind: tuple, self_conditioned: bool | None) -> torch.Tensor:
        """The loss of a batch, a share of the step's, after its backward."""
        images, flips, conditions = self._inputs[kind]
        options: dict[str, Any] = {} if self_conditioned is None else {"self_conditioned": self_conditioned}
        options |= conditions
        options |= {} if flips is None else {"flip": flips}
        autocast = torch.autocast(
            images.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
        )
        with autocast, nullcontext() if self._kept is None else self._kept.read():
            loss = self.diffusion(images, **options)
            loss = loss / self.accumulate if self.accumulate > 1 else loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _step_optimizer(self) -> None:
        self._by_kernel = frozenset()
        if self._optimizer_step.why_not() is None:
            copies = None if self._kept is None else self._kept.parts
            rates = self._rates if self.recorder.records_calls else None
            norm, self._by_kernel = self._optimizer_step.apply(
                self.max_grad_norm, self.scaler, self._average, copies, rates
            )
            if self.max_grad_norm is not None:
                self.grad_norm.copy_(norm)
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
            self.grad_norm.copy_(norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self._kept is not None:
            self._kept.refresh()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _make_reset(self) -> Callable[[], None]:
        """A function that puts weights, gradients, scale and the optimizer's state back to what they are now."""
        held = [*self.diffusion.buffers(), self._loss]
        if not self.recorder.freezes_decisions:
            return _put_back(held)  # there is no warm-up, and the next step's gradients begin with zeros
        held += self.flat_gradients
        if self.recorder.records_calls:
            # A call stops before it moves weights: the native step, which does, can be recorded.
            return _put_back(held)
        held += [*self.diffusion.parameters(), *state_of_scaler(self.scaler)]
        held += [] if self._average is None else self._average.targets.values()
        held += [] if self._kept is None else self._kept.copies
        saved = {t: t.detach().clone() for t in (*held, *state_tensors(self.optimizer))}

        @torch.no_grad()
        def reset() -> None:
            for tensor in (*held, *state_tensors(self.optimizer)):
                # State that the step itself has made began with zeros: that is Adam's.
                tensor.copy_(saved[tensor]) if tensor in saved else tensor.zero_()

        return reset

    def _hold_rates(self) -> None:
        """Put learning rates where a recording reads them; on CUDA in the groups, too, for torch's own step."""
        groups, device = self.optimizer.param_groups, self.diffusion.device
        # The CPU's step reads a float64, which is the number itself.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rates += [torch.zeros((), device=device, dtype=dtype) for _ in groups[len(self._rates) :]]
        for group, rate in zip(groups, self._rates, strict=False):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], torch.Tensor) else rate.fill_(group["lr"])
                if not self.recorder.records_calls:
                    group["lr"] = rate

    def _capture_key(self) -> tuple:
        """The cache key of a recording: addresses, settings of modules, options of the optimizer."""
        diffusion = self.diffusion
        options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        members = [[id(p) for p in g["params"]] for g in self.optimizer.param_groups]
        wanted = [p.requires_grad for p in diffusion.parameters()]
        attributes = (diffusion.recording_key(), self._options())
        state = recording.storage_key((*state_tensors(self.optimizer), *state_of_scaler(self.scaler)))
        forwards = [type(module).forward for module in diffusion.modules()]
        weights = recording.weights_of(diffusion)
        written = [] if self._average is None else [*self._average.targets.values()]
        written += [] if self._kept is None else self._kept.copies
        key = recording.storage_key(written)
        return weights, forwards, state, wanted, members, options, attributes, key, recording.settings()

    def _options(self) -> tuple:
        """This step's own settings, and those of the scaler; on the CPU also the optimizer's, besides its rates."""
        own: tuple = (self.max_grad_norm, self.autocast, self.accumulate, self.any_module, self.keep_copies)
        if self.recorder.records_calls:
            groups = self.optimizer.param_groups
            own += tuple(id(v) if k == "params" else v for group in groups for k, v in group.items() if k != "lr")
        return own if self.scaler is None else (*own, *settings_of_scaler(self.scaler))

    def _take_snapshot(self) -> None:
        """All that `_capture_key` and `why_not_recorded` read."""
        optimizer = self.optimizer
        own = vars(optimizer)
        dicts = [own, *(value for value in own.values() if isinstance(value, dict))]
        dicts += optimizer.state.values()
        lists = [optimizer.param_groups, *(group["params"] for group in optimizer.param_groups)]
        if self.recorder.needs_capturable:  # else they hold rates that change from step to step
            dicts += optimizer.param_groups
        tensors = [*state_tensors(optimizer), *state_of_scaler(self.scaler)]
        self._snapshot, self._captured_options = Snapshot(self.diffusion, dicts, lists, tensors), self._options()


def _put_back(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A function that gives tensors the values that they have now."""
    saved = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def reset() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)

    return reset


def _as_batch(batch: torch.Tensor | tuple) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Images, flips and conditions of what a step is given."""
    images, flips, conditions = (batch, None, None) if isinstance(batch, torch.Tensor) else (*batch, None, None)[:3]
    return images, flips, dict(conditions or {})


def _check_conditions(conditions: Mapping[str, Any], batch_size: int) -> None:
    """Raise unless conditions are tensors of the batch; the process checks the rest."""
    for name, tensor in conditions.items():
        if name not in CONDITIONS:
            raise TypeError(f"conditions must be of {', '.join(CONDITIONS)}, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[0] != batch_size:
            raise ValueError(f"{name} must have one entry per image, {batch_size}, got shape {tuple(tensor.shape)}")


def _averaged(ema: Any, diffusion: nn.Module) -> nn.Module:
    """The module that an EMA has to be of: what is trained, or the process in it."""
    return process_of(diffusion) or diffusion if ema.model is not diffusion else diffusion


def _average_of(ema: Any, diffusion: Any, recorder: Any) -> Average | None:
    """None if `ema.update()` has to be called; ValueError for another model's average."""
    reason = why_not_averaged(ema, diffusion)
    if reason is None:
        return Average(ema, diffusion.device, recorder)
    if foreign_method(ema) is None and ema.model is not diffusion:
        raise ValueError(f"ema must be an average of diffusion, and {reason}")
    return None


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


@torch.no_grad()
def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give moments that were loaded from elsewhere the layout of their parameters.

    Fused Adam walks through memory: on the CPU, moments in another order would be those of other weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
