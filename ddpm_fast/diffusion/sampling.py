"""The one sampling loop: a model, a table, and a seed.

DDPM, DDIM and DPM-Solver++ differ only in the numbers of the table (samplers.py); nothing here knows which one runs.
A step reads all that changes from one to the next on the device, so that the same code runs step by step, or is
recorded once (as a CUDA graph, on the CPU as a tape of operator calls) and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion import guidance
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling_run import CondFn as CondFn
from ddpm_fast.diffusion.sampling_run import Conditioning as Conditioning
from ddpm_fast.diffusion.sampling_run import Model as Model
from ddpm_fast.diffusion.sampling_run import Progress as Progress
from ddpm_fast.diffusion.sampling_run import SamplingRun as SamplingRun
from ddpm_fast.diffusion.sampling_run import progress_on as progress_on
from ddpm_fast.models.derived_weights import inference_weights, may_derive
from ddpm_fast.ops.sampler_step.op import sampler_step_
from ddpm_fast.runtime import measured, recording
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, uncached_autocast


class SamplingState:
    """All that a step reads and writes, on the device, and the step itself.

    Args:
        model: takes (x, t, x_self_cond) and conditions by keyword, returns the objective's output, shape of x.
        x: (B, C, H, W) float32 contiguous; overwritten by every step. `self.x` is another tensor where the network is
            called with the batch twice.
        num_steps: rows of the tables that it takes.
        columns, num_previous: of the tables that it takes: their width, and how many earlier x0 they read.
        self_condition: give it to the model.
        start_index: index of the first sample, for the noise.
        clip_x_start: clip estimates of x0 to [−1, 1].
        times_by_row, guide_by_row: the model, or the guide, is told the row instead of the time, and looks the time up.
        integer_times: the times are int64, else float32.
        has_update, reduces: tables with momentum, and those with rows that need sums over each image.
        conditioning: the layout of what `load` takes.
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
        guide_by_row: bool = False,
        integer_times: bool = True,
        has_update: bool = False,
        reduces: bool = False,
        conditioning: Conditioning | None = None,
    ):
        self.model, self.start_index, self.clip_x_start = model, start_index, clip_x_start
        self.times_by_row, self.guide_by_row = times_by_row, guide_by_row
        device, batch = x.device, x.shape[0]
        self.given = Conditioning() if conditioning is None else conditioning.empty_like()
        # Twice the batch, whose first half is the state: one copy per step makes what the network reads.
        self._twice = [torch.zeros_like(torch.cat((x, x))) for _ in range(2 if self_condition else 1)]
        self._twice = self._twice if self.given.is_doubled else []
        self.x = self._twice[0][:batch] if self._twice else x
        # x0 of the last steps, the newest first.
        self.history = [torch.zeros_like(x) for _ in range(max(num_previous, int(self_condition)))]
        if len(self._twice) > 1:
            self.history[0] = self._twice[1][:batch]
        self._halves = [(twice[batch:], twice[:batch]) for twice in self._twice]
        self._once = {name: t[:batch] for name, t in self.given.arguments.items()}
        self.update = torch.zeros_like(x) if has_update else None
        self.reduces = reduces
        self.x_start = self.history[0] if self.history else None
        self.self_condition = self_condition
        # A recording is made before a table is there: its warm-ups take steps of a table that guides nothing.
        self.table = guidance.empty_table(num_steps, columns, device)
        self.times = torch.zeros(num_steps, dtype=torch.int64 if integer_times else torch.float32, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._plan: SamplerTable | None = None

    def load(
        self, plan: SamplerTable, seed: torch.Tensor, first_step: int, conditioning: Conditioning | None = None
    ) -> None:
        """Be ready for a walk along the plan; x is the caller's to set. Waits for nothing where the plan stays."""
        if plan is not self._plan:
            self.table.copy_(plan.table)
            self.times.copy_(torch.tensor(plan.times, dtype=self.times.dtype))
            self._plan = plan
        if conditioning is not None:
            self.given.fill(conditioning)
        self.seed.copy_(seed)
        self.step.fill_(first_step)
        for tensor in (*self.history, *([] if self.update is None else [self.update])):
            tensor.zero_()

    def advance(
        self, x_self_cond: torch.Tensor | None, noise: torch.Tensor | None = None, *, is_guided: bool = False
    ) -> None:
        """One step, and the counter with it.

        Args:
            x_self_cond: what the model is given of the step before.
            noise: ε of this step, instead of the noise function's.
            is_guided: the row reads a second output.
        """
        batch = self.x.shape[0]
        is_doubled = is_guided and self.given.is_doubled
        rows = self.step.expand(2 * batch if is_doubled else batch)
        t = rows if self.times_by_row else self.times.index_select(0, rows)
        options = self._of_guidance(t[:batch] if is_doubled else t) if self.given.cond_fn is not None else {}
        if is_doubled:
            for second, first in self._halves[: 1 if x_self_cond is None else 2]:
                second.copy_(first)
            both_self_cond = None if x_self_cond is None else self._twice[1]
            output = call_model(self.model, self._twice[0], t, both_self_cond, **self.given.arguments)
            model_output, options["second_output"] = output.split(batch)
        else:
            model_output = call_model(self.model, self.x, t, x_self_cond, **self._once)
            if is_guided:
                # Its weights may be of another dtype, and the step reads both outputs in one.
                options["second_output"] = self._of_guide(rows, x_self_cond).to(model_output.dtype)
        options |= {"update": self.update} if self.update is not None else {}
        options |= {"reduces": True} if self.reduces and is_guided else {}
        if self.given.known is not None:
            options |= {"known": self.given.known, "mask": self.given.mask}
        history: dict[str, Any] = dict(zip(("x_start", "x_start2", "x_start3"), self.history, strict=False))
        sampler_step_(
            self.x,
            model_output,
            self.table,
            self.step,
            self.seed,
            **history,
            **options,
            noise=noise,
            clip_x_start=self.clip_x_start,
            start_index=self.start_index,
        )
        self.step += 1

    def _of_guide(self, rows: torch.Tensor, x_self_cond: torch.Tensor | None) -> torch.Tensor:
        """What the other network says."""
        assert self.given.guide is not None
        t = rows if self.guide_by_row else self.times.index_select(0, rows)
        x_self_cond = x_self_cond if getattr(self.given.guide, "self_condition", False) else None
        return call_model(self.given.guide, self.x, t, x_self_cond, **self.given.guide_arguments)

    def _of_guidance(self, t: torch.Tensor) -> dict[str, Any]:
        """The gradient of a classifier's log p."""
        cond_fn = self.given.cond_fn
        assert cond_fn is not None
        if self.times_by_row:
            t = self.times.index_select(0, t)
        # Ordinary tensors, which autograd may save: those of inference mode are cloned.
        with torch.inference_mode(False), torch.enable_grad():
            classes = None if self.given.classes is None else self.given.classes.clone()
            gradient = cond_fn(self.x.clone(), t.clone(), classes)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != self.x.shape:
            got = tuple(gradient.shape) if isinstance(gradient, torch.Tensor) else type(gradient).__name__
            raise ValueError(f"cond_fn must return a gradient of x's shape {tuple(self.x.shape)}, got {got}")
        return {"gradient": gradient.detach().to(self.x.dtype).contiguous()}


class RecordedSteps:
    """A `SamplingState` whose steps are recorded; the first x0 is zeros, which `takes_zeros_for_no_estimate` allows.

    Args:
        kinds: which kinds of rows there are, guided ones and others: each is a recording.
    """

    def __init__(self, state: SamplingState, recorder: Any, autocast: torch.dtype | None, kinds: Iterable[bool]):
        self.state = state
        self._autocast = autocast
        self._replays = {kind: recorder.record(partial(self._body, kind), self._reset) for kind in sorted(kinds)}

    def replay(self, is_guided: bool = False) -> None:
        """One step."""
        self._replays[is_guided]()

    def _body(self, is_guided: bool) -> None:
        state = self.state
        with uncached_autocast(state.x.device, self._autocast), recording.outside_inference_mode():
            state.advance(state.x_start if state.self_condition else None, is_guided=is_guided)

    def _reset(self) -> None:
        state = self.state
        for tensor in (state.x, *state.history, state.step, *([] if state.update is None else [state.update])):
            tensor.zero_()


def why_not_recorded(
    model: Model,
    x: torch.Tensor,
    cache: recording.GraphCache,
    *,
    self_condition: bool,
    any_module: bool,
    guide: Model | None = None,
    cond_fn: CondFn | None = None,
) -> str | None:
    """Why the steps of a model cannot be recorded, in one clause; None where they can.

    Args:
        any_module: trust modules that are neither torch's nor this package's, and functions.
        guide, cond_fn: as in `Conditioning`.
    """
    reason = cache.recorder_on(x.device).why_not(x.device) or recording.why_not_recorded(model)
    if reason is not None:
        return reason
    if x.shape[0] == 0:
        return "the batch is empty"
    if self_condition and not getattr(model, "takes_zeros_for_no_estimate", False):
        return "the model is conditioned on itself and is no Unet, so that its first step takes None instead of zeros"
    if guide is not None:
        reason = recording.why_not_recorded(guide) or (None if any_module else recording.untrusted_module(guide))
        if reason is not None:
            return f"of guidance's network, {reason}"
    if isinstance(cond_fn, nn.Module):
        reason = recording.why_not_recorded(cond_fn) or (None if any_module else recording.untrusted_module(cond_fn))
        if reason is not None:
            return f"of cond_fn, {reason}"
    elif cond_fn is not None and not any_module:
        return "cond_fn is a function, and what it does besides is not known (graph=True records it)"
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
        model: takes (x, t, x_self_cond) and conditions by keyword, returns the objective's output, shape of x.
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
    given, guide = run.conditioning, run.conditioning.guide
    is_guided = guidance.reads_second(run.plan.table)
    with ExitStack() as derived, run.progress_bar(x.device) as bar:
        for network in (model, *([] if guide is None else [guide])):
            derived.enter_context(_inference_weights(network, run.plan))
        derived.enter_context(measured.steps_on(x.device))
        options: dict[str, Any] = {
            "columns": run.plan.table.shape[1],
            "num_previous": max(run.plan.num_previous, int(run.on_x_start is not None)),
            "self_condition": self_condition,
            "start_index": run.start_index,
            "clip_x_start": run.clip_x_start,
            "times_by_row": not is_discrete and getattr(model, "has_table_of_times", False),
            "guide_by_row": not is_discrete and getattr(guide, "has_table_of_times", False),
            "integer_times": is_discrete,
            "has_update": guidance.has_momentum(run.plan.table),
            "reduces": guidance.reduces(run.plan.table),
        }
        if cache is None:
            state = SamplingState(model, x, num_steps, **options, conditioning=given)
        else:
            kinds = frozenset(is_guided[row] for row in run.rows)
            steps = _recorded(cache, model, x, num_steps, options, run.plan, given, kinds)
            state = steps.state
        if state.x is not x:
            state.x.copy_(x)
        state.load(run.plan, run.seed, run.first_step, given)
        for row in run.rows:
            if cache is not None:
                steps.replay(is_guided[row])
            else:
                noise = None if noise_for_step is None else noise_for_step(row)
                x_self_cond = state.x_start if self_condition and row > run.first_step else None
                state.advance(x_self_cond, noise, is_guided=is_guided[row])
            run.step_done(state.x, bar, state.x_start)
    return x if state.x is x else x.copy_(state.x)


def _inference_weights(network: Model, plan: SamplerTable) -> AbstractContextManager:
    """What is derived from a network's weights for a walk."""
    known: dict[str, Any] = {"num_timesteps": plan.num_timesteps} if plan.has_integer_times else {"times": plan.times}
    return inference_weights(network, **known, record=False) if may_derive(network) else nullcontext()


def _recorded(
    cache: recording.GraphCache,
    model: Model,
    x: torch.Tensor,
    num_steps: int,
    options: dict,
    plan: SamplerTable,
    given: Conditioning,
    kinds: frozenset[bool],
) -> RecordedSteps:
    autocast = autocast_dtype(x.device.type)
    by_row = options["times_by_row"] or options["guide_by_row"]
    times = plan.times if by_row else plan.num_timesteps  # what the network's table depends on
    modules = [other for other in (given.guide, given.cond_fn) if isinstance(other, nn.Module)]
    others = tuple((recording.weights_of(other), *recording.versions_of(list(other.buffers()))) for other in modules)
    settings = (autocast, recording.settings(), given.key, others, kinds)
    key = (tuple(x.shape), x.device, num_steps, times, *options.values(), *settings)

    def make(recorder: Any) -> RecordedSteps:
        with torch.inference_mode(False), torch.no_grad():
            state = SamplingState(model, torch.zeros_like(x), num_steps, **options, conditioning=given)
            return RecordedSteps(state, recorder, autocast, kinds)

    return cache.find(x.device, key, model, make)
