"""A whole training step recorded: loss, backward, gradient clipping, optimizer, and the average of weights.

On CUDA the recording is a graph; on the CPU it is a tape of operator calls, which a replay makes without Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.xm import XMWrapper, process_of
from ddpm_fast.models.narrow_weights import KeptCopies
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime import recording, triton_launch
from ddpm_fast.training.adam_state import check_optimizer
from ddpm_fast.training.adam_state import lay_out_state as lay_out_state
from ddpm_fast.training.average import Average, foreign_method, why_not_averaged
from ddpm_fast.training.recordable import NotRecordableError, draws_coin_first, why_not_recorded
from ddpm_fast.training.step_body import as_batch, check_conditions
from ddpm_fast.training.step_recordings import StepRecordings


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

    The recording is a CUDA graph, which the first call makes, or on the CPU a tape of operator calls, which the second
    call makes. It is made again when weights, optimizer state or settings are replaced, or a buffer of the network is
    written between steps; a learning rate may change at any time.

    A batch of a conditional network is `step((images, None, {"classes": classes}))`, see `TrainingStep.__call__`.

    Timesteps, noise and dropout are drawn on the device from torch's generator, so that `torch.manual_seed` fixes a
    run, and they are those of the same step run without a recording.

    On CUDA, drop the losses of earlier steps that ran without a graph before the first call: they keep autograd's nodes
    of the weights, which are bound to the stream of that time, and a capture cannot use another stream's.

    Where torch.distributed runs several processes, gradients are averaged over them between two recordings.

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
            after that call `renew_copies`. Gradients of those weights are not widened to float32 for the optimizer,
            unless they are added up over batches or processes, or a weight has a hook for them.

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


class TrainingStep(StepRecordings):
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
        if recorder.freezes_decisions:
            reason = why_not_recorded(diffusion, optimizer, any_module)
            if reason is not None and not falls_back:
                raise NotRecordableError(reason)
            if reason is not None:
                recorder, refusal = recording.EagerRecorder, reason
        super().__init__(
            diffusion,
            optimizer,
            batch_shape,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
            scaler=scaler,
            accumulate=accumulate,
            recorder=recorder,
            any_module=any_module,
            keep_copies=keep_copies,
            falls_back=falls_back,
            refusal=refusal,
        )
        self.ema: Any = ema
        self._average = None if ema is None else _average_of(ema, _averaged(ema, diffusion), recorder)

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
        given = [as_batch(batch) for batch in batches]
        for images, _, conditions in given:
            if images.shape != self.batch_shape:
                raise ValueError(f"images must have shape {self.batch_shape}, got {tuple(images.shape)}")
            if not images.is_floating_point() and images.dtype != torch.uint8:
                raise TypeError(f"images must be floating point in [0, 1] or uint8, got {images.dtype}")
            check_conditions(conditions, len(images))
            if self.recorder.records_calls:
                process_of(self.diffusion).check_values(images, **conditions)  # type: ignore[union-attr]
        self._see_changes()
        if self._average is not None:
            self._average.begin()
        if self._kept is not None and not self._kept.is_current():
            self._kept.refresh()
        is_whole = self.accumulate == 1 and self._processes == 1
        if not is_whole:
            self._make_flat_gradients()
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
        self._pause = max(0, self._pause - 1)
        self._versions = recording.versions_of(self._buffers)
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

    def _see_changes(self) -> None:
        """Drop recordings that something has made invalid, and refuse what cannot be recorded any more."""
        if self.recorder.freezes_decisions:
            self._hold_rates()
        average, is_written = self._average, self._has_written_buffers()
        if (
            not is_written
            and self._snapshot is not None
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
        elif is_written:
            self._forget_numbers()
        elif self._captured_key is None or self._capture_key() != self._captured_key:
            self.clear()
        elif self._recordings:
            self._take_snapshot()


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
