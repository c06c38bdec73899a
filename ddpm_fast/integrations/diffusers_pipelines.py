"""diffusers' pipelines: a pipeline's network, and the steps of `DDPMScheduler` and `DDIMScheduler` as rows of a table.

    x0 = clip(p·x + q·out);  x ← r·x0 + s·x + kg·(p·x + q·out) + σ·ε

The noise is drawn as diffusers draws it, so that a generator gives the same images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations.accelerate import accelerate, lines_of_explain, restore
from ddpm_fast.integrations.family import around, path_of
from ddpm_fast.ops.sampler_step.op import COLUMNS, sampler_step
from ddpm_fast.runtime import dispatch
from ddpm_fast.runtime.dispatch import forced_backend

PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"
DDPM = "diffusers.schedulers.scheduling_ddpm.DDPMScheduler"
DDIM = "diffusers.schedulers.scheduling_ddim.DDIMScheduler"
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large")

# Scheduler's class → the accelerated one.
_MADE: dict[type, type] = {}
# A neutral row: a guidance scale of 1, all of the difference kept.
_NEUTRAL = {"w": 1.0, "eta": 1.0}


def why_not_scheduler(scheduler: Any) -> str | None:
    """Why a scheduler's steps are no rows of a table, in one clause; None where they are."""
    cls = getattr(type(scheduler), "_ddpm_fast_own", type(scheduler))
    if path_of(cls) not in (DDPM, DDIM):
        return f"it is a {cls.__name__}"
    if getattr(cls.step, "__module__", None) != cls.__module__ or "step" in vars(scheduler):
        return "its step was replaced"
    config = scheduler.config
    if config.thresholding:
        return "its threshold depends on the whole image"
    if config.clip_sample and config.clip_sample_range != 1:
        return f"it clips to {config.clip_sample_range:g}, and the table's clipping is to 1"
    if path_of(cls) == DDPM and scheduler.variance_type not in (*_FIXED, "learned_range"):
        return f"variance_type is {scheduler.variance_type!r}"
    return None


def _why_not_step(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> str | None:
    """Why one call is not a row of a table."""
    if forced_backend() == "reference":
        return "use_backend('reference') steps as diffusers does"
    if sample.dtype != torch.float32 or sample.dim() != 4 or model_output.dtype == torch.float64:
        return f"the state is {sample.dtype}, and the table's rows are float32"
    channels = 2 if getattr(scheduler, "variance_type", None) == "learned_range" else 1
    if model_output.shape != (sample.shape[0], channels * sample.shape[1], *sample.shape[2:]):
        return "the output is not of the state's shape"
    return why_not_scheduler(scheduler)


class _Steps:
    """What both accelerated schedulers have."""

    def _row(self: Any, key: tuple, columns: dict[str, float], device: torch.device) -> torch.Tensor:
        """(1, N), the row of these columns, kept for a key on a device."""
        rows = self.__dict__.setdefault("_ddpm_fast_rows", {})
        place = (key, device)
        if place not in rows:
            if len(rows) >= 4096:
                rows.clear()
            values = {**_NEUTRAL, **columns}
            width = 25 if "kg" in columns else 10 if "hi" in columns else 6
            numbers = [values.get(name, 0.0) for name in COLUMNS[:width]]
            rows[place] = torch.tensor([numbers], dtype=torch.float64).to(device=device, dtype=torch.float32)
        return rows[place]

    def _levels(self: Any) -> list[float]:
        """ᾱ of all timesteps, read again where somebody has replaced or written the tensor."""
        tensor = self.alphas_cumprod
        kept = self.__dict__.get("_ddpm_fast_levels")
        if kept is None or kept[0] is not tensor or kept[1] != tensor._version:
            kept = self._ddpm_fast_levels = (tensor, tensor._version, tensor.tolist())
        return kept[2]

    def _take(
        self: Any, x: torch.Tensor, out: torch.Tensor, row: torch.Tensor, noise: torch.Tensor | None, return_dict: bool
    ) -> Any:
        """The step of a row, as diffusers' `step` returns it."""
        zeros = self.__dict__.setdefault("_ddpm_fast_zeros", {})
        if x.device not in zeros:
            zeros[x.device] = torch.zeros(1, dtype=torch.int64, device=x.device)
        zero = zeros[x.device]
        clip = bool(self.config.clip_sample)
        x_next, x_start = sampler_step(x, out, row, zero, zero, noise=noise, clip_x_start=clip)
        if not return_dict:
            return x_next, x_start
        output = getattr(_module_of(self), f"{_own(self).__name__}Output")
        return output(prev_sample=x_next, pred_original_sample=x_start)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """A pickle of diffusers' class, accelerated when it is loaded."""
        reduced: Any = object.__reduce_ex__(self, protocol)
        _, args, state, *rest = reduced
        own = {key: value for key, value in state.items() if not key.startswith("_ddpm_fast")}
        return (_rebuild, (_own(self), *args[1:]), own, *rest)


def _own(scheduler: Any) -> Any:
    return type(scheduler)._ddpm_fast_own


def _module_of(scheduler: Any) -> Any:
    return sys.modules[_own(scheduler).__module__]


def _rebuild(own: type) -> Any:
    cls: Any = _made(own)
    return cls.__new__(cls)


def _prediction(kind: str, a: float) -> dict[str, float]:
    """p and q of x0 = p·x + q·out, for what the network gives, at ᾱ."""
    signal, noise = a**0.5, (1 - a) ** 0.5
    if kind == "sample":
        return {"p": 0.0, "q": 1.0}
    return {"p": 1 / signal, "q": -noise / signal} if kind == "epsilon" else {"p": signal, "q": -noise}


class _DDPMSteps(_Steps):
    def step(
        self: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DDPMScheduler.step` (Ho et al. 2020, eq. 7)."""
        if _why_not_step(self, model_output, sample) is not None:
            return _own(self).step(self, model_output, timestep, sample, generator, return_dict)
        t, before, levels = int(timestep), int(self.previous_timestep(timestep)), self._levels()
        if t >= len(levels):  # diffusers says so
            return _own(self).step(self, model_output, timestep, sample, generator, return_dict)
        a, a_before = levels[t], levels[before] if before >= 0 else 1.0
        kinds = (self.config.prediction_type, self.variance_type)
        if a == 0 and kinds[0] == "epsilon":
            return _own(self).step(self, model_output, timestep, sample, generator, return_dict)
        row = self._row((a, a_before, t > 0, kinds), _ddpm(a, a_before, t > 0, *kinds), sample.device)
        noise = None
        if t > 0:
            shape, options = sample.shape, {"device": model_output.device, "dtype": model_output.dtype}
            noise = _module_of(self).randn_tensor(shape, generator=generator, **options).to(sample.dtype)
        return self._take(sample, model_output, row, noise, return_dict)


def _ddpm(a: float, a_before: float, is_noisy: bool, prediction_type: str, variance_type: str) -> dict[str, float]:
    """The columns of an ancestral step from ᾱ to that before (Ho et al. 2020, eq. 7)."""
    beta = 1 - a / a_before
    columns = _prediction(prediction_type, a)
    columns |= {"r": a_before**0.5 * beta / (1 - a), "s": (a / a_before) ** 0.5 * (1 - a_before) / (1 - a)}
    small = max((1 - a_before) / (1 - a) * beta, 1e-20)
    if not is_noisy:
        small = beta = 0.0
    columns["sigma"] = (beta if variance_type == "fixed_large" else small) ** 0.5
    if variance_type == "learned_range":  # between both in logarithms (Nichol & Dhariwal 2021, eq. 15)
        columns |= {"lo": 0.0, "hi": float(torch.tensor(beta / small).log()) / 2 if is_noisy else 0.0}
    return columns


class _DDIMSteps(_Steps):
    def step(
        self: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DDIMScheduler.step` (Song et al. 2021, eq. 12 and 16)."""
        arguments = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
        both = generator is not None and variance_noise is not None
        # Noise that diffusers would broadcast, or would not add.
        other_noise = eta < 0 or (variance_noise is not None and variance_noise.shape != sample.shape)
        if (
            both
            or other_noise
            or self.num_inference_steps is None
            or _why_not_step(self, model_output, sample) is not None
        ):
            return _own(self).step(self, model_output, timestep, sample, *arguments)
        t, levels = int(timestep), self._levels()
        if t >= len(levels):
            return _own(self).step(self, model_output, timestep, sample, *arguments)
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        a, a_before = levels[t], levels[before] if before >= 0 else float(self.final_alpha_cumprod)
        sigma = eta * ((1 - a_before) / (1 - a) * (1 - a / a_before)) ** 0.5
        if a == 0 or sigma**2 > 1 - a_before:  # no number, as diffusers gives it
            return _own(self).step(self, model_output, timestep, sample, *arguments)
        kind = self.config.prediction_type
        columns = _ddim(a, a_before, sigma, kind, self.config.clip_sample and not use_clipped_model_output)
        row = self._row((a, a_before, sigma, kind, "kg" in columns), columns, sample.device)
        noise = variance_noise
        if eta > 0 and noise is None:
            options = {"device": model_output.device, "dtype": model_output.dtype}
            noise = _module_of(self).randn_tensor(model_output.shape, generator=generator, **options)
        noise = None if eta <= 0 or noise is None else noise.to(sample.dtype)
        return self._take(sample, model_output, row, noise, return_dict)


def _ddim(a: float, a_before: float, sigma: float, prediction_type: str, keeps_noise: bool) -> dict[str, float]:
    """The columns of a step of DDIM from ᾱ to that before, with noise of σ (Song et al. 2021, eq. 12).

    Args:
        keeps_noise: the direction is the noise that was predicted, whatever clipping made of x0; else the noise that
            agrees with the clipped x0.
    """
    direction = (1 - a_before - sigma**2) ** 0.5 / (1 - a) ** 0.5  # of x − √ᾱ·x0
    columns = _prediction(prediction_type, a)
    columns |= {"r": a_before**0.5, "s": direction, "sigma": sigma}
    columns["kg" if keeps_noise else "r"] = -direction * a**0.5 + (0.0 if keeps_noise else columns["r"])
    return columns


_STEPS = {DDPM: _DDPMSteps, DDIM: _DDIMSteps}


def _made(own: type) -> type:
    """The accelerated subclass of a scheduler's class, of the same name."""
    if own not in _MADE:
        body = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _MADE[own] = type(own)(own.__name__, (_STEPS[path_of(own)], own), {**body, "_ddpm_fast_own": own})
    return _MADE[own]


def _restore(pipeline: Any) -> None:
    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if isinstance(network, nn.Module):
        restore(network)
    if scheduler is not None and hasattr(type(scheduler), "_ddpm_fast_own"):
        scheduler.__class__ = _own(scheduler)
        for name in [name for name in vars(scheduler) if name.startswith("_ddpm_fast")]:
            delattr(scheduler, name)


@around(PIPELINE, restore=_restore)
def _accelerate(pipeline: Any) -> None:
    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if isinstance(network, nn.Module):
        accelerate(network)
    is_known = scheduler is not None and not hasattr(type(scheduler), "_ddpm_fast_own")
    if is_known and why_not_scheduler(scheduler) is None:
        scheduler.__class__ = _made(type(scheduler))


def _lines(pipeline: Any) -> Iterator[str]:
    if not any(path_of(cls) == PIPELINE for cls in type(pipeline).__mro__):
        return
    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if isinstance(network, nn.Module):
        yield from lines_of_explain(network)
        yield from dispatch.lines_about_replays(network)
    if scheduler is not None:
        is_made = hasattr(type(scheduler), "_ddpm_fast_own")
        reason = why_not_scheduler(scheduler) or (None if is_made else "the pipeline is not accelerated")
        yield f"scheduler  {type(scheduler).__name__}  {f'its own step: {reason}' if reason else 'sampler_step'}"


dispatch.accounts.append(_lines)
