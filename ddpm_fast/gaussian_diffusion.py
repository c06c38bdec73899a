"""The peer's GaussianDiffusion on tables: training loss, predictions, sampling."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast import schedules
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, makes_noise_in_its_pass, q_sample
from ddpm_fast.ops.forward_diffusion.reference import lookup
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.sampler_step.op import sampler_step
from ddpm_fast.samplers import progress_bar, sample_loop
from ddpm_fast.schedules import SamplerTable, Schedule
from ddpm_fast.unet import Unet

ModelPrediction = namedtuple("ModelPrediction", ["pred_noise", "pred_x_start"])

# Methods that a subclass may override to change what a sampling step does; the fused step stands for all of them.
_STEP_METHODS = (
    "p_sample",
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)


def normalize_to_neg_one_to_one(img: torch.Tensor) -> torch.Tensor:
    """[0, 1] → [−1, 1]."""
    return img * 2 - 1


def unnormalize_to_zero_to_one(t: torch.Tensor) -> torch.Tensor:
    """[−1, 1] → [0, 1]."""
    return (t + 1) * 0.5


def identity(t: torch.Tensor) -> torch.Tensor:
    """What stands for both with `auto_normalize=False`."""
    return t


def extract(a: torch.Tensor, t: torch.Tensor, x_shape: Sequence[int]) -> torch.Tensor:
    """a[t], shaped (B, 1, ..., 1) to broadcast over x_shape; NaN for a t outside a."""
    return lookup(a[:, None], t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


class GaussianDiffusion(nn.Module):
    """Denoising diffusion (Ho et al. 2020) around a model; the peer's arguments, buffers and methods.

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
        sampler: "ddpm", "ddim" or "dpmpp_2m"; None is the peer's rule, DDIM if `sampling_timesteps` < T, else DDPM.

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: dict | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
        sampler: str | None = None,
    ):
        super().__init__()
        schedules.check_objective(objective)
        if sampler is not None:
            schedules.check_sampler(sampler)
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(
                f"model must have as many output as input channels, got channels={model.channels}, "
                f"out_dim={model.out_dim}"
            )
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError(
                "model must have plain sinusoidal time embeddings for discrete timesteps, got "
                "learned_sinusoidal_cond or random_fourier_features"
            )

        schedule_fn_kwargs = dict(schedule_fn_kwargs or {})
        self.model = model
        self.channels = model.channels
        self.self_condition = model.self_condition
        self.image_size = _image_size(image_size)
        self.objective = objective
        self.config = dict(
            image_size=list(self.image_size),
            timesteps=timesteps,
            sampling_timesteps=sampling_timesteps,
            objective=objective,
            beta_schedule=beta_schedule,
            schedule_fn_kwargs=schedule_fn_kwargs,
            ddim_sampling_eta=ddim_sampling_eta,
            auto_normalize=auto_normalize,
            offset_noise_strength=offset_noise_strength,
            min_snr_loss_weight=min_snr_loss_weight,
            min_snr_gamma=min_snr_gamma,
            immiscible=immiscible,
            sampler=sampler,
        )

        schedule = Schedule(schedules.make_betas(beta_schedule, timesteps, **schedule_fn_kwargs))
        self.num_timesteps = schedule.num_timesteps
        self.sampling_timesteps = self.num_timesteps if sampling_timesteps is None else sampling_timesteps
        schedules.sampling_times(self.num_timesteps, self.sampling_timesteps)  # raises where it does not fit
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.sampler = sampler
        self.immiscible = immiscible
        self.offset_noise_strength = offset_noise_strength

        for name, value in schedule.buffers().items():
            self.register_buffer(name, value.to(torch.float32))
        weight = schedules.loss_weight(schedule, objective, min_snr_gamma if min_snr_loss_weight else None)
        self.register_buffer("loss_weight", weight.to(torch.float32))

        # Tables of the ops; the state dict stays the peer's.
        self.register_buffer("forward_table", None, persistent=False)
        self.register_buffer("loss_table", None, persistent=False)
        self._use_schedule(schedule)

        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    # the schedule

    def _use_schedule(self, schedule: Schedule) -> None:
        """Build everything that follows from the schedule and is not in the state dict."""
        self._schedule = schedule
        self._plans: dict[tuple, SamplerTable] = {}
        tables = {
            "forward_table": schedules.forward_table(schedule),
            "loss_table": schedules.loss_table(schedule, self.objective, self.loss_weight),
        }
        for name, table in tables.items():
            setattr(self, name, table.to(device=self.betas.device, dtype=torch.float32))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        """Follow the loaded buffers, which may be of another schedule or loss weight than the constructor's."""
        super()._load_from_state_dict(*args, **kwargs)
        betas = self.betas.detach().cpu()
        same = torch.equal(betas.float(), self._schedule.betas.float())
        self._use_schedule(self._schedule if same else Schedule(betas.double()))

    def _plan(self, sampler: str, sampling_timesteps: int) -> SamplerTable:
        """The sampler's table for the settings of now: they are plain attributes, which users change."""
        key = (sampler, sampling_timesteps, float(self.ddim_sampling_eta), self.objective)
        if key not in self._plans:
            self._plans[key] = schedules.sampler_table(
                self._schedule, self.objective, sampler, sampling_timesteps, float(self.ddim_sampling_eta)
            )
        return self._plans[key]

    @property
    def device(self) -> torch.device:
        return self.betas.device

    # conversions between noise, x0 and v

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x0 from x_t and ε (Ho et al. 2020, eq. 4 solved for x0)."""
        return (
            extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise
        )

    def predict_noise_from_start(self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """ε from x_t and x0 (Ho et al. 2020, eq. 4 solved for ε)."""
        return (extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t - x0) / extract(
            self.sqrt_recipm1_alphas_cumprod, t, x_t.shape
        )

    def predict_v(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """v = √ᾱ ε − √(1 − ᾱ) x0 (Salimans & Ho 2022, appendix D)."""
        return (
            extract(self.sqrt_alphas_cumprod, t, x_start.shape) * noise
            - extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * x_start
        )

    def predict_start_from_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x0 = √ᾱ x_t − √(1 − ᾱ) v (Salimans & Ho 2022, appendix D)."""
        return (
            extract(self.sqrt_alphas_cumprod, t, x_t.shape) * x_t
            - extract(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * v
        )

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log variance of q(x_{t−1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7)."""
        mean = (
            extract(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + extract(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = extract(self.posterior_variance, t, x_t.shape)
        log_variance_clipped = extract(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance_clipped

    # predictions

    def model_predictions(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """The model's output as (pred_noise, pred_x_start), each (B, C, H, W).

        `rederive_pred_noise` makes the noise agree with a clipped x0; pred_x0 and pred_v always do.
        """
        output = self.model(x, t, x_self_cond)
        if self.objective == "pred_noise":
            x_start = self.predict_start_from_noise(x, t, output)
        elif self.objective == "pred_x0":
            x_start = output
        else:
            x_start = self.predict_start_from_v(x, t, output)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        clip_denoised: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance, clipped log variance of p(x_{t−1} | x_t) and the x0 behind them."""
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

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
            x at t − 1, and the x0 predicted on the way.
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
        output = self.model(x, batched_times, x_self_cond)
        return sampler_step(x, output, table, step, seed, noise=noise, start_index=start_index)

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
    ) -> torch.Tensor:
        """Ancestral sampling over all T timesteps (Ho et al. 2020, algorithm 2); arguments as in `sample`."""
        return self._sample("ddpm", self.num_timesteps, shape, return_all_timesteps, seed, start_index, progress)

    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
    ) -> torch.Tensor:
        """DDIM over `sampling_timesteps` (Song et al. 2021, eq. 12); arguments as in `sample`."""
        return self._sample("ddim", self.sampling_timesteps, shape, return_all_timesteps, seed, start_index, progress)

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
    ) -> torch.Tensor:
        """Images from noise, with `self.sampler` over `self.sampling_timesteps`.

        Args:
            batch_size: B.
            return_all_timesteps: also every state on the way, from x_T on.
            seed: 64-bit seed of the noise; None draws one from torch's generator, so `torch.manual_seed` fixes it.
            start_index: index of the first image: `sample(6, seed=7)` is `sample(2, seed=7)` followed by
                `sample(4, seed=7, start_index=2)`.
            progress: show a progress bar.

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
        kwargs = {"seed": seed, "start_index": start_index, "progress": progress}
        if sampler == "ddim":
            return self.ddim_sample(shape, return_all_timesteps, **kwargs)
        if sampler == "ddpm" and self.sampling_timesteps == self.num_timesteps:
            return self.p_sample_loop(shape, return_all_timesteps, **kwargs)
        return self._sample(
            sampler, self.sampling_timesteps, shape, return_all_timesteps, seed, start_index, progress
        )

    def _sample(
        self,
        sampler: str,
        sampling_timesteps: int,
        shape: Sequence[int],
        return_all_timesteps: bool,
        seed: int | torch.Tensor | None,
        start_index: int,
        progress: bool,
    ) -> torch.Tensor:
        seed = self._seed(seed)
        plan = self._plan(sampler, sampling_timesteps)
        x = normal(
            shape, seed=seed, stream=noise_function.STREAM_INITIAL, start_index=start_index, device=self.device
        )
        states = [x.clone()]
        keep = (lambda state: states.append(state.clone())) if return_all_timesteps else None
        x = self._denoise(sampler, plan, x, seed, start_index, 0, keep, progress, "sampling loop time step")
        with torch.inference_mode():
            result = self.unnormalize(torch.stack(states, dim=1) if return_all_timesteps else x)
        return result.clone()  # outside inference mode: an ordinary tensor, which may be trained on

    def _denoise(
        self,
        sampler: str,
        plan: SamplerTable,
        x: torch.Tensor,
        seed: torch.Tensor,
        start_index: int,
        first_step: int,
        on_step: Callable[[torch.Tensor], None] | None,
        progress: bool,
        desc: str,
    ) -> torch.Tensor:
        """Run the table from `first_step` on; through the public methods where a subclass has its own."""
        relevant = _STEP_METHODS if sampler == "ddpm" else _STEP_METHODS[2:]
        loop = self._composed_loop if self._overrides(*relevant) else self._fused_loop
        return loop(sampler, plan, x, seed, start_index, first_step, on_step, progress, desc)

    def _fused_loop(self, sampler, plan, x, seed, start_index, first_step, on_step, progress, desc) -> torch.Tensor:
        return sample_loop(
            self.model,
            x,
            plan,
            seed,
            start_index=start_index,
            first_step=first_step,
            self_condition=self.self_condition,
            on_step=on_step,
            progress=progress,
            desc=desc,
        )

    @torch.inference_mode()
    def _composed_loop(self, sampler, plan, x, seed, start_index, first_step, on_step, progress, desc) -> torch.Tensor:
        """The same walk with the overridable methods, for subclasses such as guided or learned-variance sampling."""
        x_start = None
        rows = range(first_step, len(plan.times))
        full_ddpm = sampler == "ddpm" and len(plan.times) == self.num_timesteps
        for row in progress_bar(rows, desc=desc, total=len(rows), enabled=progress):
            x_self_cond = x_start if self.self_condition else None
            if full_ddpm and "p_sample" in self._overridden():
                x, x_start = self.p_sample(x, plan.times[row], x_self_cond)
            elif full_ddpm:
                x, x_start = self.p_sample(x, plan.times[row], x_self_cond, seed=seed, start_index=start_index)
            else:
                x, x_start = self._step_from_predictions(plan, row, x, x_start, x_self_cond, seed, start_index)
            if on_step is not None:
                on_step(x)
        return x

    def _step_from_predictions(self, plan, row, x, x_start_previous, x_self_cond, seed, start_index):
        """One row of the table from an overridden `model_predictions`, with the noise that it predicts."""
        now, after = self._alphas_cumprod_pair(plan, row)
        _, _, r, s, u, sigma = plan.table[row].tolist()
        t = torch.full((x.shape[0],), plan.times[row], device=x.device, dtype=torch.long)
        pred_noise, x_start = self.model_predictions(
            x, t, x_self_cond, clip_x_start=True, rederive_pred_noise=True
        )[:2]
        # s·x = s·√ᾱ·x0 + s·√(1 − ᾱ)·ε, with the ε that was predicted.
        x_next = (r + s * now**0.5) * x_start + s * (1 - now) ** 0.5 * pred_noise
        if u != 0:
            x_next = x_next + u * x_start_previous
        if sigma != 0:
            x_next = x_next + sigma * self._step_noise(x, seed, row, start_index)
        return x_next, x_start

    def _alphas_cumprod_pair(self, plan: SamplerTable, row: int) -> tuple[float, float]:
        alphas_cumprod = self._schedule.alphas_cumprod
        after = alphas_cumprod[plan.times[row + 1]].item() if row + 1 < len(plan.times) else 1.0
        return alphas_cumprod[plan.times[row]].item(), after

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

    def _overridden(self) -> set[str]:
        return {name for name in _STEP_METHODS if getattr(type(self), name) is not getattr(GaussianDiffusion, name)}

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
    ) -> torch.Tensor:
        """Images between x1 and x2: both are noised to t, mixed, and denoised from t on (Ho et al. 2020, section 4.2).

        Args:
            x1, x2: (B, C, H, W) images, in [0, 1] with `auto_normalize`.
            t: the timestep, in [0, T); T − 1 if None.
            lam: 0 gives x1's side, 1 gives x2's.

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
        first_step = self.num_timesteps - 1 - t
        desc = "interpolation sample time step"
        x = self._denoise("ddpm", plan, x, seed, start_index, first_step, None, progress, desc)
        with torch.inference_mode():
            result = self.unnormalize(x)
        return result.clone()

    # training

    def noise_assignment(self, x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Which noise each image gets, by smallest total distance (Li et al. 2024, immiscible diffusion).

        Returns:
            (B,) int64, a permutation of the batch.
        """
        from scipy.optimize import linear_sum_assignment

        distance = torch.cdist(x_start.flatten(1), noise.flatten(1))
        _, assignment = linear_sum_assignment(distance.cpu())
        return torch.from_numpy(assignment).to(x_start.device)

    def training_noise(self, x_start: torch.Tensor, offset_noise_strength: float = 0.0) -> torch.Tensor:
        """Fresh ε for x_start, offset and assigned to the images as configured."""
        seed = noise_function.draw_seed(x_start.device)
        kwargs = {"seed": seed, "device": x_start.device, "dtype": x_start.dtype}
        noise = normal(x_start.shape, stream=noise_function.STREAM_TRAINING, **kwargs)
        if offset_noise_strength > 0:
            noise = self._offset(noise, offset_noise_strength, seed)
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return noise

    def _noise_stays_a_seed(self, x_start: torch.Tensor, t: torch.Tensor) -> bool:
        """Whether fresh ε need not be a tensor: the ops make it where they need it, and nobody else looks at it."""
        methods = ("training_noise", "q_sample")
        changed = any(getattr(type(self), name) is not getattr(GaussianDiffusion, name) for name in methods)
        return not self.immiscible and not changed and makes_noise_in_its_pass(x_start, t, self.forward_table)

    def _network_dtype(self, x_start: torch.Tensor) -> torch.dtype | None:
        """The dtype to which autocast would cast x_t at once, so that q_sample writes it; None is x_start's own.

        Only `Unet` is known to begin with a convolution, and without self-conditioning nothing else reads x_t.
        """
        device_type = x_start.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        if autocast and isinstance(self.model, Unet) and not self.self_condition:
            return torch.get_autocast_dtype(device_type)
        return None

    def _offset(self, noise: torch.Tensor, strength: float, seed: torch.Tensor) -> torch.Tensor:
        """Noise plus one normal number per image and channel (Guttenberg 2023, offset noise); not in place."""
        offset = normal(
            noise.shape[:2], seed=seed, stream=noise_function.STREAM_OFFSET, device=noise.device, dtype=noise.dtype
        )
        return noise + strength * offset[:, :, None, None]

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
    ) -> torch.Tensor:
        """The weighted squared error of the objective (Ho et al. 2020, eq. 14).

        Args:
            x_start: (B, C, H, W), normalised.
            t: (B,) int64 in [0, T).
            noise: ε, shape of x_start; fresh if None.
            offset_noise_strength: the constructor's if None.
            loss_reduction: "mean", a scalar, or "none", (B,).
        """
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        self._check_images("x_start", x_start, sized=False)
        t = self._check_times(t, x_start)
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        fresh = {}  # how the ops make ε, where it is no tensor
        if noise is None and self._noise_stays_a_seed(x_start, t):
            fresh = {"seed": noise_function.draw_seed(x_start.device), "offset_noise_strength": strength}
        elif noise is None:
            noise = self.training_noise(x_start, strength)
        else:
            if noise.shape != x_start.shape or noise.device != x_start.device:
                raise ValueError(
                    f"noise must have x_start's shape {tuple(x_start.shape)} and device {x_start.device}, "
                    f"got {tuple(noise.shape)} on {noise.device}"
                )
            if strength > 0:
                noise = self._offset(noise, strength, noise_function.draw_seed(noise.device))

        if fresh:
            x = q_sample(x_start, t, self.forward_table, dtype=self._network_dtype(x_start), **fresh)
        else:
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        # The coin is torch's, on the CPU: it costs no synchronisation and torch.manual_seed fixes it.
        if self.self_condition and torch.rand(()).item() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start
        model_output = self.model(x, t, x_self_cond)
        loss = diffusion_loss(model_output, x_start, t, self.loss_table, noise, **fresh)
        return loss if loss_reduction == "none" else loss.mean()

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) int64 uniform in [0, T)."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def forward(
        self, img: torch.Tensor, *args, times: torch.Tensor | None = None, loss_reduction: str = "mean", **kwargs
    ) -> torch.Tensor:
        """The training loss of a batch of images, at random timesteps unless `times` gives them.

        Args:
            img: (B, C, H, W) floating point, in [0, 1] with `auto_normalize`.
            times: (B,) int64 in [0, T).
            args, kwargs: of `p_losses`.

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence. NaN in images and t out of range are
                seen on the CPU only; on CUDA looking would wait for the device, and they make the loss NaN.
        """
        self._check_images("img", img)
        times = self.random_times(img.shape[0]) if times is None else times
        return self.p_losses(self.normalize(img), times, *args, loss_reduction=loss_reduction, **kwargs)

    # checks

    def _check_images(self, name: str, img: torch.Tensor, sized: bool = True) -> None:
        if not isinstance(img, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(img).__name__}")
        if not img.is_floating_point():
            raise TypeError(
                f"{name} must be floating point in [0, 1] (divide 8-bit images by 255), got {img.dtype}"
            )
        if self.image_size is None and sized:
            raise ValueError(
                "image_size is not known, since the loaded checkpoint does not record it: set "
                "diffusion.image_size = (height, width), or pass image_size= to load_checkpoint"
            )
        size = tuple(self.image_size) if sized else tuple(img.shape[2:])
        if img.ndim != 4 or tuple(img.shape[1:]) != (self.channels, *size):
            expected = ", ".join(map(str, (self.channels, *(self.image_size if sized else ("H", "W")))))
            raise ValueError(f"{name} must have shape (B, {expected}), got {tuple(img.shape)}")
        if img.device != self.device:
            raise ValueError(f"{name} must be on the diffusion's device {self.device}, got {img.device}")
        if img.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(img).all():
            bad = (~torch.isfinite(img)).flatten(1).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"{name} must be finite, got NaN or infinity in images {bad[:10]} of the batch")

    def _check_times(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"t must be an integer tensor of timesteps, got {got}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), one timestep per image, got {tuple(t.shape)}")
        for name, tensor in (("t", t), ("x_start", x)):
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the diffusion's device {self.device}, got {tensor.device}")
        if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
            low, high = t.min().item(), t.max().item()
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"t must be in [0, {self.num_timesteps}), got values from {low} to {high}")
        return t.long()


def _image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of the constructor's argument."""
    sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not (isinstance(sizes, (tuple, list)) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)):
        raise ValueError(f"image_size must be a positive int or two of them (height, width), got {image_size!r}")
    return tuple(sizes)
