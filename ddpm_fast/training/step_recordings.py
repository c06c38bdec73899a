"""Recordings of a training step's bodies: made, replayed, and dropped when something that they depend on changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.xm import process_of
from ddpm_fast.runtime import measured, recording
from ddpm_fast.runtime.snapshot import Snapshot
from ddpm_fast.training.adam_state import settings_of_scaler, state_of_scaler, state_tensors
from ddpm_fast.training.recordable import NotRecordableError
from ddpm_fast.training.step_body import StepBody

_LONGEST_PAUSE = 64  # steps; a recording takes as long as several of them


class StepRecordings(StepBody):
    """A training step whose bodies `_replay` runs: by a recording, which it makes where there is none yet.

    Args:
        recorder: the class that makes recordings.
        falls_back: where a body cannot be recorded, it runs without a recording instead of raising.
        refusal: why `recorder` does not record.
        others: as of `capture_training_step`.
    """

    def __init__(
        self,
        *args: Any,
        recorder: Any,
        falls_back: bool,
        refusal: str | None,
        any_module: bool,
        keep_copies: bool,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self._recorder_class, self._falls_back, self._refusal = recorder, falls_back, refusal
        self.any_module, self.keep_copies = any_module, keep_copies
        # Steps that run without a recording: a network whose buffers are written between all steps is recorded less and
        # less often.
        self._pause = self._next_pause = 0
        self.clear()

    def clear(self) -> None:
        """Drop what is recorded; the next call records again."""
        self._recordings: dict[tuple, recording.Body] = {}
        self._optimizer_step.release()
        # Bodies that have run once before a recorder records a call of them.
        self._ran: set[tuple] = set()
        # Parameters whose averages the optimizer's kernel moves, by name of a recording.
        self._by_kernel_in: dict[tuple, frozenset[torch.Tensor]] = {}
        self._captured_key: tuple | None = None
        self._snapshot: Snapshot | None = None
        # Of the network, and how often they had been written after the last step.
        self._buffers: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._forget_gradients()
        self.recorder = self._recorder_class(self.diffusion.device)

    def _replay(self, name: tuple, body: Callable[[], None]) -> None:
        """Run a body; where there is no recording of that name yet, make it."""
        with measured.steps_on(self.diffusion.device):
            self._run(name, body)
        self._by_kernel = self._by_kernel_in.get(name, self._by_kernel)

    def _run(self, name: tuple, body: Callable[[], None]) -> None:
        if name in self._recordings:
            self._recordings[name]()
            self._next_pause = 0
        elif self._pause > 0:
            body()
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

    @property
    def _network(self) -> Any:
        process = process_of(self.diffusion)
        return None if process is None else process.network

    def _has_written_buffers(self) -> bool:
        """True if somebody else than the steps has written a buffer of the network since the last one."""
        return recording.versions_of(self._buffers) != self._versions

    def _forget_numbers(self) -> None:
        """Drop recordings that may hold a number that a module has read from a buffer."""
        self.clear()
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause + 1, _LONGEST_PAUSE)

    def _stop_recording(self, reason: str) -> None:
        """Go on step by step."""
        self._recorder_class, self._refusal = recording.EagerRecorder, reason
        self.recorder = self._recorder_class(self.diffusion.device)
        self._recordings, self._captured_key = {}, None

    def _make_reset(self) -> Callable[[], None]:
        """A function that puts weights, gradients, scale and the optimizer's state back to what they are now."""
        buffers = _buffers_of(self._network)
        own = set(map(id, buffers))
        held = [*(buffer for buffer in self.diffusion.buffers() if id(buffer) not in own), self._loss]
        if self.recorder.freezes_decisions:
            held += self.flat_gradients
        if self.recorder.records_calls or not self.recorder.freezes_decisions:
            # A call stops before it moves weights: the native step, which does, can be recorded. Where nothing is
            # recorded there is no warm-up, and the next step's gradients begin with zeros.
            return _put_back(held, buffers)
        held += [*self.diffusion.parameters(), *state_of_scaler(self.scaler)]
        held += [] if self._average is None else self._average.targets.values()
        held += [] if self._kept is None else self._kept.copies
        reset_buffers = _put_back((), buffers)
        saved = {t: t.detach().clone() for t in (*held, *state_tensors(self.optimizer))}

        @torch.no_grad()
        def reset() -> None:
            reset_buffers()
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
        self._buffers = _buffers_of(self._network) if self.recorder.freezes_decisions else []


def _buffers_of(network: Any) -> list[torch.Tensor]:
    return list(network.buffers()) if isinstance(network, nn.Module) else []


def _put_back(tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor] = ()) -> Callable[[], None]:
    """A function that gives tensors the values that they have now, and buffers that were written since.

    Of a buffer that was written a module reads its numbers again, for which a capture would wait.
    """
    saved, saved_buffers = ([tensor.detach().clone() for tensor in given] for given in (tensors, buffers))
    seen = recording.versions_of(buffers)

    @torch.no_grad()
    def reset() -> None:
        nonlocal seen
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        for i, version in enumerate(recording.versions_of(buffers)):
            if version != seen[i]:
                buffers[i].copy_(saved_buffers[i])
        seen = recording.versions_of(buffers)

    return reset
