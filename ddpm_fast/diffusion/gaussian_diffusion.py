"""Upstream's GaussianDiffusion on tables: sampling and the training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion.diffusion_process import TrainingRows, process
from ddpm_fast.diffusion.discrete_process import DiscreteProcess, extract
from ddpm_fast.diffusion.discrete_process import ModelPrediction as ModelPrediction
from ddpm_fast.diffusion.guidance import column, widened
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling_run import Conditioning, SamplingRun
from ddpm_fast.models.derived_weights import inference_weights, may_derive
from ddpm_fast.noise import Noise
from ddpm_fast.ops.forward_diffusion.op import q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.sampler_step.op import sampler_step
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_int

# Methods that a subclass may override to change what a sampling step does; the fused step replaces all of them.
_STEP_METHODS = (
    "p_sample",
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)


@process("ddpm")
class GaussianDiffusion(DiscreteProcess):
    """Denoising diffusion (Ho et al. 2020) around a model; upstream's arguments, buffers and methods.

    Args:
        model: takes (x, t, x_self_cond) and has `channels`, `out_dim` and `self_condition`, such as `Unet`.
        image_size: one int, or (height, width).
        timesteps: T.
        sampling_timesteps: steps of sampling, T if None.
        objective: "pred_noise", "pred_x0" or "pred_v": what the model's output means.
        beta_schedule, schedule_fn_kwargs: "linear", "cosine" or "sigmoid", and arguments of that function; or "given",
            and T numbers as `betas`.
        ddim_sampling_eta: DDIM's noise, 0 is deterministic.
        auto_normalize: images are in [0, 1] outside and [−1, 1] inside; without it they are taken as they are.
        offset_noise_strength: adds one normal number per channel to the noise, 0.1 is usual.
        min_snr_loss_weight, min_snr_gamma: clip the SNR in the loss weight (Hang et al. 2023).
        immiscible: assign noise to images by distance within the batch (Li et al. 2024).
        sampler, spacing, sampler_options: how `sample` walks, names of `samplers.SAMPLERS` and `spacings.SPACINGS`;
            None is upstream's rule, DDIM if `sampling_timesteps` < T, else DDPM.
        loss_weighting, loss_weighting_options: the weight of x0's squared error as a function of the SNR, a name of
            `weightings.WEIGHTINGS` or a function (N,) → (N,); None is "snr", upstream's.
        uncertainty_weighting: learn a weight per level of noise beside the network (Karras et al. 2024, EDM2).
        zero_terminal_snr: no signal is left at T − 1 (Lin et al. 2023); the loss is then "uniform", as with
            super_resolution, if not told otherwise.
        timestep_sampler: "uniform", or "loss-second-moment" (Nichol & Dhariwal 2021, section 3.3).
        guidance: of `sample`, where it is not told otherwise: a scale or a `Guidance`.
        clip_x_start: sampling clips estimates of x0 to [−1, 1].

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    def _check_model(self, model: nn.Module) -> None:
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(
                f"model must have as many output as input channels, got channels={model.channels}, "
                f"out_dim={model.out_dim}"
            )
        super()._check_model(model)

    # sampling

    @torch.inference_mode()
    def p_sample(
        self,
        x: torch.Tensor,
        t: int,
        x_self_cond: torch.Tensor | None = None,
        *,
        seed: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        start_index: int = 0,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step from t to t − 1 (Ho et al. 2020, algorithm 2).

        Args:
            x: (B, C, H, W) at t.
            t: the timestep, an int in [0, T).
            seed, start_index: the noise function's; a fresh seed if None.
            noise: exactly this ε instead, shape of x. At t = 0 there is none.
            conditions: the model's keywords.

        Returns:
            x at t − 1, and the predicted x0.
        """
        t = as_int("t", t)
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        batched_times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        seed = self._seed(seed)
        row = self.num_timesteps - 1 - t
        if self._overrides(*_STEP_METHODS[1:]):
            mean, _, log_variance, x_start = self.p_mean_variance(
                x=x, t=batched_times, x_self_cond=x_self_cond, clip_denoised=self.clip_x_start, **conditions
            )
            if noise is None:
                noise = self._step_noise(x, seed, row, start_index)
            return mean + (0.5 * log_variance).exp() * noise * (t > 0), x_start
        table = self._plan("ddpm", self.num_timesteps, "own").table.to(device=x.device, dtype=torch.float32)
        step = torch.full((1,), row, dtype=torch.int64, device=x.device)
        output = call_model(self.model, x, batched_times, x_self_cond, **conditions)
        options: dict[str, Any] = {"clip_x_start": self.clip_x_start, "start_index": start_index}
        return sampler_step(x, output, table, step, seed, noise=noise, **options)

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """Ancestral sampling over all T timesteps (Ho et al. 2020, algorithm 2); arguments as in `sample`."""
        options: dict[str, Any] = {"start_index": start_index, "progress": progress, "graph": graph, **conditioning}
        return self._sample(self._plan("ddpm", self.num_timesteps, "own"), shape, return_all_timesteps, seed, **options)

    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """DDIM over `sampling_timesteps` (Song et al. 2021, eq. 12); arguments as in `sample`."""
        options: dict[str, Any] = {"start_index": start_index, "progress": progress, "graph": graph, **conditioning}
        return self._sample(self._plan("ddim"), shape, return_all_timesteps, seed, **options)

    def sample(
        self,
        batch_size: int | None = None,
        return_all_timesteps: bool = False,
        *,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        clip_x_start: bool | None = None,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """Images from noise; arguments as in `DiffusionProcess.sample`.

        Without a sampler it is upstream's: DDIM where there are fewer steps than timesteps, else ancestral sampling.
        """
        shape = self._shape(batch_size, **conditioning)
        asked = (sampler, sampling_timesteps, spacing, sampler_options, clip_x_start)
        given: dict[str, Any] = {"seed": seed, "start_index": start_index, "progress": progress, "graph": graph}
        given |= {name: value for name, value in conditioning.items() if value is not None}
        is_asked_for = any(value is not None for value in (*asked, self.spacing))
        if is_asked_for or self.sampler_options or not self.clip_x_start:
            clip = self.clip_x_start if clip_x_start is None else clip_x_start
            plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
            return self._sample(plan, shape, return_all_timesteps, clip_x_start=clip, **given)
        own_sampler = self.sampler or self.default_sampler
        # Only what differs from the defaults: a subclass may have these methods with upstream's arguments.
        defaults = {"seed": None, "start_index": 0, "progress": True, "graph": None}
        kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not defaults.get(name)}
        if own_sampler == "ddim":
            return self.ddim_sample(shape, return_all_timesteps, **kwargs)
        if own_sampler == "ddpm" and self.sampling_timesteps == self.num_timesteps:
            return self.p_sample_loop(shape, return_all_timesteps, **kwargs)
        return self._sample(self._plan(), shape, return_all_timesteps, **given)

    @property
    def default_sampler(self) -> str:  # type: ignore[override]  # upstream's rule
        return "ddim" if self.is_ddim_sampling else "ddpm"

    def _denoise(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """Walk along the run's table; through the public methods where a subclass has its own."""
        if self._overrides(*_relevant_methods(run.plan.sampler)):
            self._check_recording(x, run)
            return self._composed_loop(x, run)
        return super()._denoise(x, run)

    def _why_not_recorded(
        self, sampler: str, x: torch.Tensor, any_module: bool, given: Conditioning | None = None
    ) -> str | None:
        overridden = sorted(self._overridden().intersection(_relevant_methods(sampler)))
        if overridden:
            return f"{type(self).__name__} has its own {', '.join(overridden)}"
        return super()._why_not_recorded(sampler, x, any_module, given)

    @torch.inference_mode()
    def _composed_loop(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """The same walk with the overridable methods, for subclasses such as guided or learned-variance sampling."""
        x_start, plan = None, run.plan
        self._check_composed(run)
        inserts = run.conditioning.mask is not None
        full_ddpm = plan.sampler == "ddpm" and len(plan.times) == self.num_timesteps and not inserts
        # No table over timesteps: an override may call the network with other times.
        derived = inference_weights(self.model, record=False) if may_derive(self.model) else nullcontext()
        kept: list[torch.Tensor] = []  # of the rows before, the newest first
        with derived, run.progress_bar(x.device) as bar:
            for row in run.rows:
                x_self_cond = x_start if self.self_condition else None
                if full_ddpm:
                    x, x_start = self._own_p_sample(run, row, x, x_self_cond)
                else:
                    x, x_start = self._step_from_predictions(run, row, x, kept, x_self_cond)
                run.step_done(x, bar, x_start)
        return x

    def _check_composed(self, run: SamplingRun) -> None:
        """Raise where overridable methods cannot do what a run asks for."""
        own = f"{type(self).__name__} has its own {', '.join(sorted(self._overridden()))}"
        run.conditioning.check_unguided(own, inserts=not self._has_own("p_sample"))
        if not run.clip_x_start:
            raise ValueError(f"clip_x_start must be True where {type(self).__name__} has its own steps, which clip")
        if not run.plan.has_integer_times:
            raise ValueError(
                f"sampler {run.plan.sampler!r} calls the network between timesteps, which {type(self).__name__}'s own "
                f"{', '.join(sorted(self._overridden()))} cannot do"
            )

    def _noise_options(self, run: SamplingRun) -> dict[str, Any]:
        """What `p_sample` is told of the noise, unless it is a user's own."""
        return {} if self._has_own("p_sample") else {"seed": run.seed, "start_index": run.start_index}

    def _own_p_sample(
        self, run: SamplingRun, row: int, x: torch.Tensor, x_self_cond: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`p_sample` of a row."""
        told: dict[str, Any] = {**self._noise_options(run), **run.conditioning.arguments}
        return self.p_sample(x, int(run.plan.times[row]), x_self_cond, **told)

    def _own_predictions(
        self, run: SamplingRun, row: int, x: torch.Tensor, t: torch.Tensor, x_self_cond: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise and x0 of `model_predictions` at a row."""
        options: dict[str, Any] = {"clip_x_start": True, "rederive_pred_noise": True, **run.conditioning.arguments}
        return self.model_predictions(x, t, x_self_cond, **options)[:2]

    def _step_from_predictions(
        self,
        run: SamplingRun,
        row: int,
        x: torch.Tensor,
        kept: list[torch.Tensor],
        x_self_cond: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row of the table from an overridden `model_predictions`, with the noise that it predicts."""
        plan = run.plan
        timestep = int(plan.times[row])
        now = self._schedule.alphas_cumprod[timestep].item()
        columns = widened(plan.table[row : row + 1])[0]
        _, _, r, s, u, sigma, u2, u3, _, _, e, f, of_known, of_noise, *_ = columns.tolist()
        # The noise of other estimates of x0 is that which is predicted.
        r += sum(columns[column(name)].item() for name in ("kg", "kn", "kc"))
        t = torch.full((x.shape[0],), timestep, device=x.device, dtype=torch.long)
        pred_noise, x_start = self._own_predictions(run, row, x, t, x_self_cond)
        # s·x = s·√ᾱ·x0 + s·√(1 − ᾱ)·ε, with the ε that was predicted.
        x_next = (r + s * now**0.5) * x_start + s * (1 - now) ** 0.5 * pred_noise
        for factor, earlier in zip((u, u2, u3), kept, strict=False):
            if factor != 0:
                x_next = x_next + factor * earlier
        second = [e * x + f * x_start] if e or f else kept[:1]
        kept[:] = [x_start, *second, *kept[1:2]][: plan.num_previous]
        mask, known = run.conditioning.mask, run.conditioning.known
        noise = self._step_noise(x, run.seed, row, run.start_index) if sigma != 0 or mask is not None else None
        if sigma != 0:
            x_next = x_next + sigma * noise
        if mask is not None:
            x_next = mask * (of_known * known + of_noise * noise) + (1 - mask) * x_next
        return x_next, x_start

    def _step_noise(self, x: torch.Tensor, seed: torch.Tensor, row: int, start_index: int) -> torch.Tensor:
        return normal(
            x.shape,
            seed=seed,
            stream=noise_function.STREAM_STEP,
            step=row,
            start_index=start_index,
            device=x.device,
        )

    def _overridden(self) -> set[str]:
        """Of the methods that make up a step, those that are not this class's."""
        return {name for name in _STEP_METHODS if self._has_own(name)}

    def _overrides(self, *names: str) -> bool:
        return not self._overridden().isdisjoint(names)

    def _interpolation_plan(self, t: float | None) -> SamplerTable:
        if t is not None and not 0 <= as_int("t", t) < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        return self._plan("ddpm", self.num_timesteps, "own")

    def _interpolation_start(self, plan: SamplerTable, t: float | None) -> int:
        return 0 if t is None else self.num_timesteps - 1 - int(t)

    def _noised_to(self, x_start: torch.Tensor, t: float | None, noise: torch.Tensor) -> torch.Tensor:
        timestep = self.num_timesteps - 1 if t is None else int(t)
        batched_times = torch.full((x_start.shape[0],), timestep, device=x_start.device, dtype=torch.long)
        return self.q_sample(x_start, batched_times, noise)

    # training

    def _can_fuse_noise(self) -> bool:
        """True if fresh ε may stay a seed: nobody but the ops looks at it."""
        return super()._can_fuse_noise() and not any(self._has_own(name) for name in _NOISE_METHODS)

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t = √ᾱ x0 + √(1 − ᾱ) ε (Ho et al. 2020, eq. 4).

        Args:
            x_start: (B, ...), in [−1, 1].
            t: (B,) int64 in [0, T).
            noise: exactly this ε; fresh if None.
        """
        if noise is None:
            noise = self.training_noise(x_start)
        t = self._check_times(t, x_start)
        return q_sample(x_start, t, self.forward_table, noise)

    def _noised(
        self, x_start: torch.Tensor, t: torch.Tensor, rows: TrainingRows, drawn: Noise, options: dict[str, Any]
    ) -> torch.Tensor:
        if self._has_own("q_sample"):
            return self.q_sample(x_start=x_start, t=t, noise=drawn.tensor)
        return super()._noised(x_start, t, rows, drawn, options)

    def _errors(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        rows: TrainingRows,
        drawn: Noise,
        options: dict[str, Any],
    ) -> torch.Tensor:
        if self.objective == "pred_v" and self._has_own("predict_v"):
            assert drawn.tensor is not None  # `_can_fuse_noise` is False
            v = self.predict_v(x_start, t, drawn.tensor)
            errors = F.mse_loss(model_output, v, reduction="none").flatten(1).mean(1)
            return errors * extract(self.loss_weight, t, t.shape)
        return super()._errors(model_output, x_start, x, t, rows, drawn, options)

    def _shows_images(self) -> bool:
        return super()._shows_images() or any(map(self._has_own, _NOISE_METHODS))


def _relevant_methods(sampler: str) -> tuple[str, ...]:
    """The overridable methods that a sampler's steps go through."""
    return _STEP_METHODS if sampler == "ddpm" else _STEP_METHODS[2:]


# Methods that look at the noise of a training step.
_NOISE_METHODS = ("training_noise", "q_sample", "predict_v", "noise_assignment")
