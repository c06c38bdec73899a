"""Upstream's GaussianDiffusion on tables: sampling and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion import sampling
from ddpm_fast.diffusion.diffusion_process import (
    DiffusionProcess,
    as_floats,
    identity,
    normalize_to_neg_one_to_one,
)
from ddpm_fast.diffusion.diffusion_process import ModelPrediction as ModelPrediction
from ddpm_fast.diffusion.diffusion_process import extract as extract
from ddpm_fast.diffusion.sampling import SamplingRun, sample_loop
from ddpm_fast.models.derived_weights import free_inference_weights, inference_weights, may_derive
from ddpm_fast.noise import Noise
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.sampler_step.op import sampler_step
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, narrow_dtype, uncached_autocast

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


class GaussianDiffusion(DiffusionProcess):
    """Denoising diffusion (Ho et al. 2020) around a model; upstream's arguments, buffers and methods.

    Args:
        model: takes (x, t, x_self_cond) and has `channels`, `out_dim` and `self_condition`, such as `Unet`.
        image_size: one int, or (height, width).
        timesteps: T.
        sampling_timesteps: steps of sampling, T if None.
        objective: "pred_noise", "pred_x0" or "pred_v": what the model's output means.
        beta_schedule, schedule_fn_kwargs: "linear", "cosine" or "sigmoid", and arguments of that function.
        ddim_sampling_eta: DDIM's noise, 0 is deterministic.
        auto_normalize: images are in [0, 1] outside and [−1, 1] inside; without it they are taken as they are.
        offset_noise_strength: adds one normal number per channel to the noise, 0.1 is usual.
        min_snr_loss_weight, min_snr_gamma: clip the SNR in the loss weight (Hang et al. 2023).
        immiscible: assign noise to images by distance within the batch (Li et al. 2024).
        sampler: "ddpm", "ddim" or "dpmpp_2m"; None is upstream's rule, DDIM if `sampling_timesteps` < T, else DDPM.

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step from t to t − 1 (Ho et al. 2020, algorithm 2).

        Args:
            x: (B, C, H, W) at t.
            t: the timestep, an int in [0, T).
            seed, start_index: the noise function's; a fresh seed if None.
            noise: exactly this ε instead, shape of x. At t = 0 there is none.

        Returns:
            x at t − 1, and the predicted x0.
        """
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        batched_times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        seed = self._seed(seed)
        row = self.num_timesteps - 1 - t
        if self._overrides(*_STEP_METHODS[1:]):
            mean, _, log_variance, x_start = self.p_mean_variance(
                x=x, t=batched_times, x_self_cond=x_self_cond, clip_denoised=True
            )
            if noise is None:
                noise = self._step_noise(x, seed, row, start_index)
            return mean + (0.5 * log_variance).exp() * noise * (t > 0), x_start
        table = self._plan("ddpm", self.num_timesteps).table.to(device=x.device, dtype=torch.float32)
        step = torch.full((1,), row, dtype=torch.int64, device=x.device)
        output = call_model(self.model, x, batched_times, x_self_cond)
        return sampler_step(x, output, table, step, seed, noise=noise, start_index=start_index)

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Ancestral sampling over all T timesteps (Ho et al. 2020, algorithm 2); arguments as in `sample`."""
        options = {"start_index": start_index, "progress": progress, "graph": graph}
        return self._sample("ddpm", self.num_timesteps, shape, return_all_timesteps, seed, **options)

    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """DDIM over `sampling_timesteps` (Song et al. 2021, eq. 12); arguments as in `sample`."""
        options = {"start_index": start_index, "progress": progress, "graph": graph}
        return self._sample("ddim", self.sampling_timesteps, shape, return_all_timesteps, seed, **options)

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Images from noise, with `self.sampler` over `self.sampling_timesteps`.

        Args:
            batch_size: B.
            return_all_timesteps: also every intermediate state, from x_T on.
            seed: 64-bit seed of the noise; None draws one from torch's generator, so `torch.manual_seed` fixes it.
            start_index: index of the first image: `sample(6, seed=7)` is `sample(2, seed=7)` followed by
                `sample(4, seed=7, start_index=2)`.
            progress: show a progress bar.
            graph: record a step (as a CUDA graph, on the CPU as a tape of operator calls) and replay it; the result is
                the same. None does so where it can (`explain_graphs` says why not), True raises where it cannot, False
                never does. CUDA graphs are kept: what Python changes in the model besides its weights, settings of
                torch and train/eval needs `clear_graphs`.

        Returns:
            (B, C, H, W) float32 in [0, 1] with `auto_normalize`; (B, S + 1, C, H, W) with `return_all_timesteps`.
        """
        if self.image_size is None:
            raise ValueError(
                "image_size is not known, since the loaded checkpoint does not record it: set "
                "diffusion.image_size = (height, width), or pass image_size= to load_checkpoint"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size must be an int of at least 0, got {batch_size!r}")
        shape = (batch_size, self.channels, *self.image_size)
        sampler = self.sampler or ("ddim" if self.is_ddim_sampling else "ddpm")
        # Only what differs from the defaults: a subclass may have these methods with upstream's arguments.
        defaults = {"seed": None, "start_index": 0, "progress": True, "graph": None}
        given = {"seed": seed, "start_index": start_index, "progress": progress, "graph": graph}
        kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not defaults[name]}
        if sampler == "ddim":
            return self.ddim_sample(shape, return_all_timesteps, **kwargs)
        if sampler == "ddpm" and self.sampling_timesteps == self.num_timesteps:
            return self.p_sample_loop(shape, return_all_timesteps, **kwargs)
        options = {"start_index": start_index, "progress": progress, "graph": graph}
        return self._sample(sampler, self.sampling_timesteps, shape, return_all_timesteps, seed, **options)

    def explain_graphs(self, batch_size: int = 16) -> str:
        """Whether `sample(batch_size)` replays a recorded step now, and if not, why; one sentence."""
        x = torch.empty((batch_size, self.channels, 1, 1), device=self.device)
        reason = self._why_not_recorded(self.sampler or ("ddim" if self.is_ddim_sampling else "ddpm"), x, False)
        if reason is not None:
            return f"sampling runs step by step: {reason}"
        recorder = self.graphs.recorder_on(self.device)
        if not recorder.is_kept:
            return f"sampling replays {recorder.what}; every run makes one"
        return f"sampling replays {recorder.what}; {len(self.graphs)} are kept, {self.graphs.limit} at most"

    def clear_graphs(self) -> None:
        """Drop recorded graphs and the memory they hold, derived weights included; the next `sample` records again."""
        self.graphs.clear()
        free_inference_weights(self.model)

    def _sample(
        self,
        sampler: str,
        sampling_timesteps: int,
        shape: Sequence[int],
        return_all_timesteps: bool,
        seed: int | torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Images from noise; `options` are of `SamplingRun`."""
        run = SamplingRun(self._plan(sampler, sampling_timesteps), self._seed(seed), **options)
        x = normal(
            shape, seed=run.seed, stream=noise_function.STREAM_INITIAL, start_index=run.start_index, device=self.device
        )
        if return_all_timesteps:
            states = x.new_empty(x.shape[0], len(run.plan.times) + 1, *x.shape[1:])  # (B, S + 1, C, H, W)
            unwritten = iter(states.unbind(1))
            on_step = run.on_step = lambda state: next(unwritten).copy_(state)
            on_step(x)
        x = self._denoise(x, run)
        with torch.inference_mode():
            result = self.unnormalize(states if return_all_timesteps else x)
        return result.clone()  # outside inference mode: an ordinary tensor, which may be trained on

    def _denoise(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """Walk along the run's table; through the public methods where a subclass has its own."""
        sampler = run.plan.sampler
        reason = "it was not asked for" if run.graph is False else self._why_not_recorded(sampler, x, bool(run.graph))
        if run.graph and reason is not None:
            raise RuntimeError(f"graph=True, and a graph cannot replace the steps: {reason}")
        if self._overrides(*_relevant_methods(sampler)):
            return self._composed_loop(x, run)
        with self.graphs.try_lock(x.device) if reason is None else nullcontext(False) as locked:
            return sample_loop(
                self.model,
                x,
                run,
                self_condition=self.self_condition,
                num_timesteps=self.num_timesteps,
                cache=self.graphs if locked else None,
            )

    def _why_not_recorded(self, sampler: str, x: torch.Tensor, any_module: bool) -> str | None:
        """Why steps on x cannot be recorded, in one clause; None where they can."""
        if torch.compiler.is_compiling():
            return "sampling is being compiled"
        overridden = sorted(self._overridden().intersection(_relevant_methods(sampler)))
        if overridden:
            return f"{type(self).__name__} has its own {', '.join(overridden)}"
        return sampling.why_not_recorded(
            self.model, x, self.graphs, self_condition=self.self_condition, any_module=any_module
        )

    @torch.inference_mode()
    def _composed_loop(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """The same walk with the overridable methods, for subclasses such as guided or learned-variance sampling."""
        x_start, plan = None, run.plan
        if not plan.has_integer_times:
            raise ValueError(
                f"sampler {plan.sampler!r} calls the network between timesteps, which {type(self).__name__}'s own "
                f"{', '.join(sorted(self._overridden()))} cannot do"
            )
        full_ddpm = plan.sampler == "ddpm" and len(plan.times) == self.num_timesteps
        # No table over timesteps: an override may call the network with other times.
        derived = inference_weights(self.model) if may_derive(self.model) else nullcontext()
        with derived, run.progress_bar(x.device) as bar:
            for row in run.rows:
                x_self_cond = x_start if self.self_condition else None
                if full_ddpm and "p_sample" in self._overridden():
                    x, x_start = self.p_sample(x, int(plan.times[row]), x_self_cond)
                elif full_ddpm:
                    options: dict[str, Any] = {"seed": run.seed, "start_index": run.start_index}
                    x, x_start = self.p_sample(x, int(plan.times[row]), x_self_cond, **options)
                else:
                    x, x_start = self._step_from_predictions(run, row, x, x_start, x_self_cond)
                run.step_done(x, bar)
        return x

    def _step_from_predictions(
        self,
        run: SamplingRun,
        row: int,
        x: torch.Tensor,
        x_start_previous: torch.Tensor | None,
        x_self_cond: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row of the table from an overridden `model_predictions`, with the noise that it predicts."""
        plan = run.plan
        timestep = int(plan.times[row])
        now = self._schedule.alphas_cumprod[timestep].item()
        _, _, r, s, u, sigma = plan.table[row].tolist()
        t = torch.full((x.shape[0],), timestep, device=x.device, dtype=torch.long)
        pred_noise, x_start = self.model_predictions(x, t, x_self_cond, clip_x_start=True, rederive_pred_noise=True)[:2]
        # s·x = s·√ᾱ·x0 + s·√(1 − ᾱ)·ε, with the ε that was predicted.
        x_next = (r + s * now**0.5) * x_start + s * (1 - now) ** 0.5 * pred_noise
        if u != 0:
            x_next = x_next + u * x_start_previous
        if sigma != 0:
            x_next = x_next + sigma * self._step_noise(x, run.seed, row, run.start_index)
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

    def _seed(self, seed: int | torch.Tensor | None) -> torch.Tensor:
        if seed is None:
            return noise_function.draw_seed(self.device)
        return noise_function.seed_tensor(seed, self.device)

    def _has_own(self, name: str) -> bool:
        """True if a subclass, this object, or whoever patched the class has a method of its own."""
        return name in self.__dict__ or getattr(type(self), name) is not _ORIGINALS[name]

    def _overridden(self) -> set[str]:
        """Of the methods that make up a step, those that are not this class's."""
        return {name for name in _STEP_METHODS if self._has_own(name)}

    def _overrides(self, *names: str) -> bool:
        return not self._overridden().isdisjoint(names)

    def interpolate(
        self,
        x1: torch.Tensor,
        x2: torch.Tensor,
        t: int | None = None,
        lam: float = 0.5,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Images between x1 and x2: both are noised to t, mixed, and denoised from t on (Ho et al. 2020, section 4.2).

        Args:
            x1, x2: (B, C, H, W) images, in [0, 1] with `auto_normalize`.
            t: the timestep, in [0, T); T − 1 if None.
            lam: 0 gives x1's side, 1 gives x2's.
            seed, start_index, progress, graph: as in `sample`.

        Returns:
            (B, C, H, W) images in the range of x1.
        """
        if x1.shape != x2.shape:
            raise ValueError(f"x2 must have x1's shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        t = self.num_timesteps - 1 if t is None else t
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        self._check_images("x1", x1)
        self._check_images("x2", x2)
        seed = self._seed(seed)
        batched_times = torch.full((x1.shape[0],), t, device=x1.device, dtype=torch.long)
        noised = []
        for image, stream in (
            (x1, noise_function.STREAM_TRAINING),
            (x2, noise_function.STREAM_INTERPOLATE),
        ):
            noise = normal(image.shape, seed=seed, stream=stream, start_index=start_index, device=image.device)
            with torch.inference_mode():
                noised.append(self.q_sample(self.normalize(image.float()), batched_times, noise))
        x = ((1 - lam) * noised[0] + lam * noised[1]).contiguous()
        plan = self._plan("ddpm", self.num_timesteps)
        run = SamplingRun(plan, seed, start_index, progress=progress, graph=graph)
        run.first_step, run.desc = self.num_timesteps - 1 - t, "interpolation sample time step"
        x = self._denoise(x, run)
        with torch.inference_mode():
            result = self.unnormalize(x)
        return result.clone()

    # training

    def _can_fuse_noise(self) -> bool:
        """True if fresh ε may stay a seed: nobody but the ops looks at it."""
        return not self.immiscible and not any(self._has_own(name) for name in _NOISE_METHODS)

    def _noise(self, x_start: torch.Tensor, noise: torch.Tensor | None, offset_noise_strength: float) -> Noise:
        """ε of a training step: as given, or fresh, with its offset."""
        if noise is None and self._can_fuse_noise():
            return Noise(None, noise_function.draw_seed(x_start.device), offset_noise_strength)
        if noise is None:
            return Noise(self.training_noise(x_start, offset_noise_strength))
        if noise.shape != x_start.shape or noise.device != x_start.device:
            raise ValueError(
                f"noise must have x_start's shape {tuple(x_start.shape)} and device {x_start.device}, "
                f"got {tuple(noise.shape)} on {noise.device}"
            )
        if offset_noise_strength > 0:
            noise = self._offset(noise, offset_noise_strength, noise_function.draw_seed(noise.device))
        return Noise(noise)

    def _network_input(self, x_start: torch.Tensor) -> dict:
        """Options of q_sample for x_t that the network reads; {} leaves dtype and memory format as they are.

        Autocast would cast the input of a network that begins with a convolution at once. With self-conditioning x_t is
        read by the conversion to x0 as well, and keeps its dtype.
        """
        if not getattr(self.model, "begins_with_convolution", False):
            return {}
        dtype = torch.promote_types(x_start.dtype, torch.float32) if self.self_condition else narrow_dtype(self.model)
        return {"for_network": True, "dtype": dtype}

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

    def p_losses(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        self_conditioned: bool | None = None,
    ) -> torch.Tensor:
        """The weighted squared error of the objective (Ho et al. 2020, eq. 14).

        Args:
            x_start: (B, C, H, W), normalised.
            t: (B,) int64 in [0, T).
            noise: ε, shape of x_start; fresh if None.
            offset_noise_strength: the constructor's if None.
            loss_reduction: "mean", a scalar, or "none", (B,).
            self_conditioned: whether the network sees a first estimate of x0; None draws it.
        """
        self._check_images("x_start", x_start, sized=False)
        return self._losses(x_start, t, noise, offset_noise_strength, loss_reduction, self_conditioned)

    def _losses(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        self_conditioned: bool | None = None,
        *,
        normalize: bool = False,
        flip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`p_losses` of images that the ops still mirror and, where they are bytes, divide by 255 and normalise."""
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        t = self._check_times(t, x_start)
        options: dict[str, Any] = {"normalize": normalize, "flip": flip}
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        drawn = self._noise(x_start, noise, strength)
        if not self._has_own("q_sample"):
            x = q_sample(x_start, t, self.forward_table, drawn, **options, **self._network_input(x_start))
        else:
            x = self.q_sample(x_start=x_start, t=t, noise=drawn.tensor)
        x_self_cond = None
        if self.draw_self_condition() if self_conditioned is None else self_conditioned:
            with torch.no_grad(), uncached_autocast(x.device, autocast_dtype(x.device.type)):
                x_self_cond = self.model_predictions(x, t).pred_x_start
        model_output = call_model(self.model, x, t, x_self_cond)
        if self.objective == "pred_v" and self._has_own("predict_v"):
            assert drawn.tensor is not None  # `_can_fuse_noise` is False
            v = self.predict_v(x_start, t, drawn.tensor)
            errors = F.mse_loss(model_output, v, reduction="none").flatten(1).mean(1)
            loss = errors * extract(self.loss_weight, t, t.shape)
        else:
            loss = diffusion_loss(model_output, x_start, t, self._current_loss_table(), drawn, **options)
        return loss if loss_reduction == "none" else loss.mean()

    def forward(
        self,
        img: torch.Tensor,
        *args: Any,
        times: torch.Tensor | None = None,
        loss_reduction: str = "mean",
        flip: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The training loss of a batch of images, at random timesteps unless `times` gives them.

        Args:
            img: (B, C, H, W) floating point, in [0, 1] with `auto_normalize`; or uint8, which stands for img/255.
            times: (B,) int64 in [0, T).
            flip: (B,) bool or uint8: mirror these images left to right.
            args, kwargs: of `p_losses`.

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence. NaN in images and t out of range are
                seen on the CPU only; on CUDA looking would wait for the device, and they make the loss NaN.
        """
        self._check_images("img", img, bytes_too=True)
        if flip is not None:
            self._check_flip(flip, img)
        times = self.random_times(img.shape[0]) if times is None else times
        if self._shows_images():
            x_start = self.normalize(as_floats(img, flip))
            return self.p_losses(x_start, times, *args, loss_reduction=loss_reduction, **kwargs)  # type: ignore[misc]
        # Bytes are read as they are by the ops, so that no float copy of the images is made.
        is_bytes = img.dtype == torch.uint8
        options: dict[str, Any] = {"flip": flip, "normalize": is_bytes and self.normalize is not identity}
        x_start = img if is_bytes else self.normalize(img)
        return self._losses(x_start, times, *args, loss_reduction=loss_reduction, **options, **kwargs)  # type: ignore[misc]

    def _shows_images(self) -> bool:
        """True if a method of the user's, or the assignment of noise, looks at the images of a training step."""
        is_own_range = self.normalize in (normalize_to_neg_one_to_one, identity)
        return self.immiscible or not is_own_range or any(map(self._has_own, ("p_losses", *_NOISE_METHODS)))

    @property
    def takes_bytes(self) -> bool:
        """True if `forward` is this class's and nobody listens to it: it then takes uint8 images and `flip`."""
        return not (self._has_own("forward") or self._forward_hooks or self._forward_pre_hooks)


def _relevant_methods(sampler: str) -> tuple[str, ...]:
    """The overridable methods that a sampler's steps go through."""
    return _STEP_METHODS if sampler == "ddpm" else _STEP_METHODS[2:]


# Methods that look at the noise of a training step.
_NOISE_METHODS = ("training_noise", "q_sample", "predict_v", "noise_assignment")
# The methods as this module defines them: a class may be patched, too.
_ORIGINALS = {
    name: getattr(GaussianDiffusion, name) for name in (*_STEP_METHODS, *_NOISE_METHODS, "p_losses", "forward")
}
