"""How a trainer runs one step: replayed from a recording where that can replace it, else operator by operator."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ddpm_fast.runtime import measured, recording
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.snapshot import Snapshot
from ddpm_fast.training.average import Average, why_not_averaged
from ddpm_fast.training.batches import Batch, BatchStream
from ddpm_fast.training.captured_step import TrainingStep
from ddpm_fast.training.optimizer_step import OptimizerStep
from ddpm_fast.training.recordable import NotRecordableError, draws_coin_first, why_not_recorded
from ddpm_fast.training.trained import averaged_module

with needed_for("Trainer"):
    from accelerate import Accelerator
    from accelerate.utils import gather_object


class StepRunner:
    """The part of `Trainer` that computes loss, gradients, new weights and their average from batches.

    `Trainer` sets the attributes, the average on the main process alone, and calls `_prepare_steps`.
    """

    # What records a step; None: the recorder of the device.
    _recorder: Any = None

    accelerator: Accelerator
    model: Any
    opt: Any
    ema: Any
    dl: BatchStream
    channels: int
    image_size: tuple[int, int]
    gradient_accumulate_every: int
    max_grad_norm: float
    _given_model: Any
    _mixed_precision: str

    def _prepare_steps(self, graph: bool | None) -> None:
        """Once model and optimizer are accelerate's; ValueError where `graph` is True and nothing can be recorded."""
        self._optimizer_step = OptimizerStep(self._optimizer)
        # Of steps that are not recorded, and what it was made of.
        self._average: Average | None = None
        self._averaged: tuple[object, Snapshot] | None = None
        self._graph = graph
        self._captured: TrainingStep | None = None
        self._captured_parts: tuple = ()
        # Why a recording failed, once one has.
        self._refusal: str | None = None
        self._said_why_not = False
        if graph and (reason := self._why_not_recorded()) is not None:
            raise ValueError(f"graph=True, and a recording cannot replace the step: {reason}")

    @property
    def device(self) -> torch.device:
        """The device this process trains on."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Index of this process among all of them."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self.accelerator.num_processes

    def explain_graphs(self) -> str:
        """Whether training replays a recorded step now, and if not, why; one sentence."""
        reason = self._why_not_recorded()
        if reason is not None:
            return f"training runs step by step: {reason}"
        return f"training replays {self._recorder.what}" if self._captured is None else self._captured.explain_graphs()

    def explain_optimizer(self) -> str:
        """What moved weights and their average in the last step, and why no kernel where none did; one sentence."""
        if self._captured is not None:
            return self._captured.explain_optimizer()
        is_main = self.accelerator.is_main_process
        reason = why_not_averaged(self.ema, self._diffusion) if is_main else None
        return self._optimizer_step.explain({"their average": reason})

    @property
    def _optimizer(self) -> Any:
        """torch's optimizer in accelerate's wrapper, or one that was assigned without a wrapper."""
        return getattr(self.opt, "optimizer", self.opt)

    @property
    def _trained(self) -> Any:
        """What gives the loss: the process, or a wrapper of it."""
        # accelerate imports torch.compile, 1.2 s, to ask whether a model is compiled.
        return self.model if self.model is self._given_model else self.accelerator.unwrap_model(self.model)

    @property
    def _diffusion(self) -> Any:
        """What is averaged, saved and sampled: the process, or another module of the user's."""
        return averaged_module(self._trained)

    def _follow_replacements(self) -> None:
        """Use what was assigned to the trainer's attributes since the last step."""
        if self._optimizer_step.optimizer is not self._optimizer:
            self._optimizer_step = OptimizerStep(self._optimizer)
        ema = self.ema if self.accelerator.is_main_process else None
        parts = (self._trained, self._optimizer, ema, self.max_grad_norm, self.gradient_accumulate_every)
        if parts != self._captured_parts:
            self._captured, self._captured_parts = None, parts

    def _run_recorded(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Loss and gradient norm of a replayed step; None where nothing can be replayed."""
        reason = self._agree_on_recording() if self._captured is None else None
        if reason is None:
            drawn = torch.get_rng_state()
            try:
                self._captured = self._captured or self._capture()
                loss = self._captured(*batches)
                return loss, self._captured.grad_norm.clone()
            except (NotRecordableError, recording.CaptureError) as error:
                if self._graph:
                    raise
                # Weights, moments and the device's generator are as they were.
                torch.set_rng_state(drawn)
                self._captured = None
                reason = self._refusal = error.reason if isinstance(error, NotRecordableError) else str(error)
        self._say_why_not(reason)
        return None

    def _capture(self) -> TrainingStep:
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._mixed_precision)
        precision = precision if self.accelerator.native_amp else None  # on the CPU accelerate has no fp16
        return TrainingStep(
            self._trained,
            self._optimizer,
            (self.dl.order.batch_size, self.channels, *self.image_size),
            recorder=self._recorder,
            ema=self.ema if self.accelerator.is_main_process else None,
            max_grad_norm=self.max_grad_norm,
            autocast=precision,
            scaler=self.accelerator.scaler,
            accumulate=self.gradient_accumulate_every,
            any_module=bool(self._graph),
            keep_copies=True,  # nobody else changes weights while `train` runs
            # A process that cannot go on recording still averages gradients as the others do.
            falls_back=self._recorder is recording.TapeRecorder and self.world_size > 1 and not self._graph,
        )

    def _agree_on_recording(self) -> str | None:
        """Why no process records, which holds for good where there are several; they average gradients in one way."""
        reason = self._why_not_recorded()
        if self.world_size == 1 or self._graph is False or self._refusal is not None:
            return reason
        reasons = gather_object([reason])
        self._refusal = next((other for other in reasons if other is not None), None)
        return self._refusal

    def _agree_on_forms(self) -> None:
        """Once losses are read, and so before each checkpoint: a run that continues one has the forms of all ranks."""
        if self.world_size > 1:
            measured.agree(gather_object([measured.chosen()]))

    def _why_not_recorded(self) -> str | None:
        """Why a recording cannot replace the step, in one clause; None where it can."""
        if self._graph is False:
            return "graph=False was given"
        reason = self._refusal or self._recorder.why_not(self.device)
        if reason is not None:
            return reason
        if getattr(self.model, "_comm_hooks", None):
            return "the model has a hook on its communication, which a replay does not call"
        return why_not_recorded(self._trained, self._optimizer, any_module=bool(self._graph))

    def _say_why_not(self, reason: str) -> None:
        """Once, and only where the user may expect a recording."""
        if self._said_why_not or self._graph is False or self.device.type != "cuda":
            return
        self._said_why_not = True
        if self.accelerator.is_main_process:
            warnings.warn(f"training runs step by step: {reason}", stacklevel=5)

    def _run_step_by_step(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient norm of a step."""
        total_loss: Any = 0.0
        draws = draws_coin_first(self._trained)
        for micro_step, batch in enumerate(batches):
            options = {"self_conditioned": self._trained.draw_self_condition()} if draws else {}
            is_last = micro_step == len(batches) - 1
            # Gradients are summed over processes once per step, in the backward of the last micro-step.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.model(batch.images, **batch.options, **options) / self.gradient_accumulate_every
                self.accelerator.backward(loss)
            total_loss = total_loss + loss.detach()
        average, moved = None, frozenset[torch.Tensor]()
        if self._optimizer_step.why_not() is None:
            average = self._average_beside_the_step()
            if average is not None:
                average.begin()
            norm, moved = self._optimizer_step.apply(self.max_grad_norm, self.accelerator.scaler, average)
        else:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.opt.step()
        self.opt.zero_grad()
        if average is not None:
            average.finish(moved)
        elif self.accelerator.is_main_process:
            self.ema.update()
        return total_loss, norm.detach()

    def _average_beside_the_step(self) -> Average | None:
        """What the optimizer's kernel moves of the average; None where `ema.update()` does."""
        if not self.accelerator.is_main_process or why_not_averaged(self.ema, self._diffusion) is not None:
            return None
        average = self._average
        if average is None or self._averaged is None or self._averaged[0] is not self.ema:
            self._average = average = Average(self.ema, self.device, recording.EagerRecorder)
        elif self._averaged[1].holds() and average.holds():
            return average
        else:
            average.refresh()
        self._averaged = self.ema, Snapshot(self._diffusion)
        return average
