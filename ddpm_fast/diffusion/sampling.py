"""The one sampling loop: a model, a table, and a seed.

DDPM, DDIM and DPM-Solver++ differ only in the numbers of the table (samplers.py); nothing here knows which one runs.
A step reads all that changes from one to the next on the device, so that the same code runs step by step, or is
recorded once (as a CUDA graph, on the CPU as a tape of operator calls) and replayed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.models.derived_weights import inference_weights, may_derive
from ddpm_fast.ops.sampler_step.op import sampler_step_
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, uncached_autocast

Model = Any  # (x, t, x_self_cond) -> the objective's output, shape of x; most are modules

_STEPS_AHEAD = 32  # how far the host may run before the device while a progress bar is shown


class Progress:
    """Upstream's progress bar, counting the steps that the device has finished.

    The host never waits for the latest step, only, where it is far ahead, for one of long before; at the end it waits
    for the rest.

    Args:
        total: steps.
        desc: the text before the bar.
        enabled: without it nothing is shown and nothing waited for.
        mark: gives an event, with `query` and `synchronize`, of what the device has been given so far; None: the host's
            calls end when the work is done, as on the CPU.
    """

    def __init__(self, total: int, *, desc: str, enabled: bool, mark: Callable[[], Any] | None = None):
        self._bar: Any = _make_bar(desc, total) if enabled else None
        self._mark = mark
        self._pending: deque[Any] = deque()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if self._bar is None:
            return
        if kind is None:
            self._finish(all_but=0)
        self._bar.close()

    def step_done(self) -> None:
        """One more step is finished, or enqueued on the device."""
        if self._bar is None:
            return
        if self._mark is None:
            self._bar.update(1)
            return
        self._pending.append(self._mark())
        self._finish(all_but=_STEPS_AHEAD)

    def _finish(self, all_but: int) -> None:
        """Count finished steps; wait until at most `all_but` are not."""
        while self._pending and (len(self._pending) > all_but or self._pending[0].query()):
            self._pending.popleft().synchronize()
            self._bar.update(1)


def _make_bar(desc: str, total: int) -> Any:
    """tqdm's bar, or None with a warning where tqdm is not installed: a bar is no reason to refuse samples."""
    if importlib.util.find_spec("tqdm") is None:
        hint = "pip install tqdm, or progress=False"
        warnings.warn(f"no progress bar is shown, since tqdm is not installed ({hint})", stacklevel=2)
        return None
    from tqdm.auto import tqdm

    return tqdm(desc=desc, total=total)


def progress_on(device: torch.device, total: int, *, desc: str, enabled: bool) -> Progress:
    """A progress bar over steps that run on a device."""
    mark = (lambda: torch.cuda.current_stream(device).record_event()) if device.type == "cuda" else None
    return Progress(total, desc=desc, enabled=enabled, mark=mark)


@dataclass
class SamplingRun:
    """One walk along a sampler's table, and how it is shown and recorded.

    Args:
        plan: the sampler's table.
        seed: one-element int64 tensor on the device of the state.
        start_index: index of the first sample, for the noise.
        first_step: row of the table to start with.
        on_step: called with the state after every step, which the next step overwrites.
        on_x_start: called with the estimate of x0 in every step, which the next step overwrites.
        progress, desc: show a progress bar, and the text before it.
        graph: record a step and replay it; None where it can be, True raises where it cannot, False never.
        clip_x_start: clip estimates of x0 to [−1, 1].
    """

    plan: SamplerTable
    seed: torch.Tensor
    start_index: int = 0
    first_step: int = 0
    on_step: Callable[[torch.Tensor], object] | None = None
    on_x_start: Callable[[torch.Tensor], object] | None = None
    progress: bool = False
    desc: str = "sampling loop time step"
    graph: bool | None = None
    clip_x_start: bool = True

    @property
    def rows(self) -> range:
        """Rows of the table that the walk takes."""
        return range(self.first_step, len(self.plan.times))

    def progress_bar(self, device: torch.device) -> Progress:
        """A progress bar over the steps, which run on `device`."""
        return progress_on(device, len(self.rows), desc=self.desc, enabled=self.progress)

    def step_done(self, x: torch.Tensor, bar: Progress, x_start: torch.Tensor | None) -> None:
        """One more step has made x, by this estimate of x0, which is kept where `on_x_start` wants it."""
        if self.on_step is not None:
            self.on_step(x)
        if self.on_x_start is not None:
            assert x_start is not None
            self.on_x_start(x_start)
        bar.step_done()


class SamplingState:
    """All that a step reads and writes, on the device, and the step itself.

    Args:
        model: takes (x, t, x_self_cond), returns the objective's output, shape of x.
        x: (B, C, H, W) float32 contiguous; overwritten by every step.
        num_steps: rows of the tables that it takes.
        columns, num_previous: of the tables that it takes: their width, and how many earlier x0 they read.
        self_condition: give it to the model.
        start_index: index of the first sample, for the noise.
        clip_x_start: clip estimates of x0 to [−1, 1].
        times_by_row: the model is told the row instead of the time, and looks the time up.
        integer_times: the times are int64, else float32.
    """

    def __init__(
        self,
        model: Model,
        x: torch.Tensor,
        num_steps: int,
        *,
        columns: int = 6,
        num_previous: int,
        self_condition: bool,
        start_index: int,
        clip_x_start: bool = True,
        times_by_row: bool = False,
        integer_times: bool = True,
    ):
        self.model, self.x, self.start_index, self.clip_x_start = model, x, start_index, clip_x_start
        self.times_by_row = times_by_row
        device = x.device
        # x0 of the last steps, the newest first.
        self.history = [torch.zeros_like(x) for _ in range(max(num_previous, int(self_condition)))]
        self.x_start = self.history[0] if self.history else None
        self.self_condition = self_condition
        self.table = torch.zeros(num_steps, columns, dtype=torch.float32, device=device)
        self.times = torch.zeros(num_steps, dtype=torch.int64 if integer_times else torch.float32, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._plan: SamplerTable | None = None

    def load(self, plan: SamplerTable, seed: torch.Tensor, first_step: int) -> None:
        """Be ready for a walk along the plan; x is the caller's to set. Waits for nothing where the plan stays."""
        if plan is not self._plan:
            self.table.copy_(plan.table)
            self.times.copy_(torch.tensor(plan.times, dtype=self.times.dtype))
            self._plan = plan
        self.seed.copy_(seed)
        self.step.fill_(first_step)
        for x_start in self.history:
            x_start.zero_()

    def advance(self, x_self_cond: torch.Tensor | None, noise: torch.Tensor | None = None) -> None:
        """One step, and the counter with it.

        Args:
            x_self_cond: what the model is given of the step before.
            noise: ε of this step, instead of the noise function's.
        """
        rows = self.step.expand(self.x.shape[0])
        t = rows if self.times_by_row else self.times.index_select(0, rows)
        model_output = call_model(self.model, self.x, t, x_self_cond)
        history: dict[str, Any] = dict(zip(("x_start", "x_start2", "x_start3"), self.history, strict=False))
        sampler_step_(
            self.x,
            model_output,
            self.table,
            self.step,
            self.seed,
            **history,
            noise=noise,
            clip_x_start=self.clip_x_start,
            start_index=self.start_index,
        )
        self.step += 1


class RecordedSteps:
    """A `SamplingState` whose step is recorded; the first x0 is zeros, which `takes_zeros_for_no_estimate` allows."""

    def __init__(self, state: SamplingState, recorder: Any, autocast: torch.dtype | None):
        self.state = state
        self._autocast = autocast
        self.replay = recorder.record(self._body, self._reset)

    def _body(self) -> None:
        state = self.state
        with uncached_autocast(state.x.device, self._autocast):
            state.advance(state.x_start if state.self_condition else None)

    def _reset(self) -> None:
        state = self.state
        for tensor in (state.x, *state.history, state.step):
            tensor.zero_()


def why_not_recorded(
    model: Model,
    x: torch.Tensor,
    cache: recording.GraphCache,
    *,
    self_condition: bool,
    any_module: bool,
) -> str | None:
    """Why the steps of a model cannot be recorded, in one clause; None where they can.

    Args:
        any_module: trust modules that are neither torch's nor this package's.
    """
    reason = cache.recorder_on(x.device).why_not(x.device) or recording.why_not_recorded(model)
    if reason is not None:
        return reason
    if x.shape[0] == 0:
        return "the batch is empty"
    if self_condition and not getattr(model, "takes_zeros_for_no_estimate", False):
        return "the model is conditioned on itself and is no Unet, so that its first step takes None instead of zeros"
    return None if any_module else recording.untrusted_module(model)


@torch.inference_mode()
def sample_loop(
    model: Model,
    x: torch.Tensor,
    run: SamplingRun,
    *,
    self_condition: bool = False,
    noise_for_step: Callable[[int], torch.Tensor] | None = None,
    cache: recording.GraphCache | None = None,
) -> torch.Tensor:
    """Denoise x in place, one row of the run's table after another.

    Args:
        model: takes (x, t, x_self_cond), returns the objective's output, shape of x.
        x: (B, C, H, W) float32 contiguous, the state at `run.plan.times[run.first_step]`; overwritten.
        self_condition: give the model the previous estimate of x0.
        noise_for_step: ε of a step by its row, instead of the noise function.
        cache: record the step there, or replay what is recorded; None runs step by step. The model must be one for
            which `why_not_recorded` has no reason.

    Returns:
        x.
    """
    if cache is not None and noise_for_step is not None:
        raise ValueError("noise_for_step must be None where steps are recorded, since a replay calls no function")
    num_steps = len(run.plan.times)
    is_discrete = run.plan.has_integer_times
    known = {"num_timesteps": run.plan.num_timesteps} if is_discrete else {"times": run.plan.times}
    derived = inference_weights(model, **known) if may_derive(model) else nullcontext()
    with derived, run.progress_bar(x.device) as bar:
        options: dict[str, Any] = {
            "columns": run.plan.table.shape[1],
            "num_previous": max(run.plan.num_previous, int(run.on_x_start is not None)),
            "self_condition": self_condition,
            "start_index": run.start_index,
            "clip_x_start": run.clip_x_start,
            "times_by_row": not is_discrete and getattr(model, "has_table_of_times", False),
            "integer_times": is_discrete,
        }
        if cache is None:
            state = SamplingState(model, x, num_steps, **options)
        else:
            steps = _recorded(cache, model, x, num_steps, options, run.plan)
            state = steps.state
            state.x.copy_(x)
        state.load(run.plan, run.seed, run.first_step)
        for row in run.rows:
            if cache is not None:
                steps.replay()
            else:
                noise = None if noise_for_step is None else noise_for_step(row)
                state.advance(state.x_start if self_condition and row > run.first_step else None, noise)
            run.step_done(state.x, bar, state.x_start)
    return x if cache is None else x.copy_(state.x)


def _recorded(
    cache: recording.GraphCache, model: Model, x: torch.Tensor, num_steps: int, options: dict, plan: SamplerTable
) -> RecordedSteps:
    autocast = autocast_dtype(x.device.type)
    times = plan.times if options["times_by_row"] else plan.num_timesteps  # what the network's table depends on
    key = (tuple(x.shape), x.device, num_steps, times, *options.values(), autocast, recording.settings())

    def make(recorder: Any) -> RecordedSteps:
        with torch.inference_mode(False), torch.no_grad():
            state = SamplingState(model, torch.zeros_like(x), num_steps, **options)
            return RecordedSteps(state, recorder, autocast)

    return cache.find(x.device, key, recording.weights_of(model), make)
