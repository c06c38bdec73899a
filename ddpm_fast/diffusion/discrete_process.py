"""A process in T discrete timesteps: schedule, buffers, tables, conversions between noise, x0 and v, predictions."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddpm_fast.diffusion import samplers, schedules
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess, TrainingRows, check_is_network
from ddpm_fast.diffusion.guidance import Guidance
from ddpm_fast.diffusion.images import check_mean
from ddpm_fast.diffusion.levels import TARGETS, Target
from ddpm_fast.diffusion.schedules import Schedule
from ddpm_fast.diffusion.weightings import Weighting, recorded_weighting
from ddpm_fast.ops.common.tables import lookup
from ddpm_fast.ops.registration import may_read
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_int, as_number, plain

if TYPE_CHECKING:
    from typing_extensions import Self

    from ddpm_fast.diffusion.timestep_history import LossSecondMoment

ModelPrediction = namedtuple("ModelPrediction", ["pred_noise", "pred_x_start"])


_LARGEST = 1e308  # of finite numbers
TIMESTEP_SAMPLERS = ("uniform", "loss-second-moment")


def extract(a: torch.Tensor, t: torch.Tensor, x_shape: Sequence[int]) -> torch.Tensor:
    """a[t], shaped (B, 1, ..., 1) to broadcast over x_shape; NaN for a t outside a."""
    return lookup(a[:, None], t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


class DiscreteProcess(DiffusionProcess):
    """A model, a schedule of T timesteps, and what follows from both: buffers, tables, conversions, predictions.

    The arguments are those of `GaussianDiffusion`.
    """

    model: Any  # called as model(x, t, x_self_cond), with channels, out_dim and self_condition
    # Upstream's buffers, (T,) float32.
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    log_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance_clipped: torch.Tensor
    posterior_mean_coef1: torch.Tensor
    posterior_mean_coef2: torch.Tensor
    loss_weight: torch.Tensor
    # Tables of the ops.
    forward_table: torch.Tensor  # (T, 2)
    loss_table: torch.Tensor  # (T, 3)

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
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        loss_weighting: str | Weighting | None = None,
        loss_weighting_options: Mapping[str, float] | None = None,
        uncertainty_weighting: bool = False,
        zero_terminal_snr: bool = False,
        timestep_sampler: str = "uniform",
        guidance: float | Mapping[str, Any] | Guidance | None = None,
        super_resolution: int | None = None,
        noise_augmentation: float | None = None,
        clip_x_start: bool = True,
    ):
        timesteps = as_int("timesteps", timesteps)
        sampling_timesteps = None if sampling_timesteps is None else as_int("sampling_timesteps", sampling_timesteps)
        schedule_fn_kwargs = dict(plain("schedule_fn_kwargs", schedule_fn_kwargs or {}))
        ddim_sampling_eta = as_number("ddim_sampling_eta", ddim_sampling_eta, 0, _LARGEST)
        min_snr_gamma = as_number("min_snr_gamma", min_snr_gamma)
        objective, beta_schedule = plain("objective", objective), plain("beta_schedule", beta_schedule)
        schedules.check_objective(objective)
        is_chosen = loss_weighting is not None or min_snr_loss_weight
        weighting = schedules.choose_weighting(
            # The SNR itself, the default, would leave T − 1 untrained without a signal there; and with a low-resolution
            # condition it hardly trains the most noise, where the condition alone says what the image is.
            loss_weighting if is_chosen or not (zero_terminal_snr or super_resolution) else "uniform",
            loss_weighting_options,
            min_snr_gamma if min_snr_loss_weight else None,
        )
        schedule = Schedule(schedules.make_betas(beta_schedule, timesteps, **schedule_fn_kwargs))
        if timestep_sampler not in TIMESTEP_SAMPLERS:
            raise ValueError(
                f"timestep_sampler must be one of {', '.join(TIMESTEP_SAMPLERS)}, got {timestep_sampler!r}"
            )
        if zero_terminal_snr:
            schedule = schedule.with_zero_terminal_snr()
            if objective == "pred_noise":
                raise ValueError("objective must be pred_v or pred_x0 with zero_terminal_snr=True, got 'pred_noise'")
        check_is_network(model)
        self._check_model(model)
        config = dict(
            image_size=image_size,
            timesteps=timesteps,
            sampling_timesteps=sampling_timesteps,
            objective=objective,
            beta_schedule=beta_schedule,
            schedule_fn_kwargs=schedule_fn_kwargs,
            ddim_sampling_eta=ddim_sampling_eta,
            auto_normalize=plain("auto_normalize", auto_normalize),
            offset_noise_strength=as_number("offset_noise_strength", offset_noise_strength),
            min_snr_loss_weight=plain("min_snr_loss_weight", min_snr_loss_weight),
            min_snr_gamma=min_snr_gamma,
            immiscible=plain("immiscible", immiscible),
            sampler=plain("sampler", sampler),
        )
        later = dict(
            spacing=spacing if spacing is None or isinstance(spacing, str) else [float(time) for time in spacing],
            sampler_options=plain("sampler_options", dict(sampler_options)) if sampler_options else None,
            loss_weighting=recorded_weighting(loss_weighting),
            loss_weighting_options=dict(loss_weighting_options) if loss_weighting_options else None,
            uncertainty_weighting=plain("uncertainty_weighting", uncertainty_weighting),
            zero_terminal_snr=plain("zero_terminal_snr", zero_terminal_snr),
            timestep_sampler=None if timestep_sampler == "uniform" else timestep_sampler,
        )
        super().__init__(
            model,
            image_size=image_size,
            channels=None,
            auto_normalize=bool(auto_normalize),
            offset_noise_strength=offset_noise_strength,
            immiscible=bool(immiscible),
            uncertainty_weighting=bool(uncertainty_weighting),
            sampler=config["sampler"],
            spacing=later["spacing"],
            sampler_options=later["sampler_options"],
            sampling_timesteps=schedule.num_timesteps if sampling_timesteps is None else sampling_timesteps,
            clip_x_start=bool(clip_x_start),
            # Only what was asked for: files that need nothing new are read by earlier releases.
            config=config | {name: value for name, value in later.items() if value},
            guidance=guidance,
            super_resolution=super_resolution,
            noise_augmentation=noise_augmentation,
        )
        self.objective, self._weighting = objective, weighting
        self.num_timesteps = schedule.num_timesteps
        samplers.check_steps(schedule, self.sampling_timesteps)
        self.timestep_history: LossSecondMoment | None = None
        if timestep_sampler == "loss-second-moment":
            from ddpm_fast.diffusion.timestep_history import LossSecondMoment

            self.timestep_history = LossSecondMoment(self.num_timesteps)
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        self.ddim_sampling_eta = ddim_sampling_eta

        device = torch.get_default_device()
        for name, value in schedule.buffers().items():
            self.register_buffer(name, value.to(device=device, dtype=torch.float32))
        weight = schedules.loss_weight(schedule, objective, weighting)
        if weight[-1] == 0:
            raise ValueError(
                "loss_weighting must not be 0 at T − 1, which has no signal (zero_terminal_snr=True) and would not be "
                "trained: use 'uniform' or 'truncated_snr'"
            )
        self._made_loss_weight = weight  # (T,) float64 on the CPU
        self.register_buffer("loss_weight", weight.to(device=device, dtype=torch.float32))

        # Tables of the ops; the state dict stays upstream's.
        self.register_buffer("forward_table", None, persistent=False)
        self.register_buffer("loss_table", None, persistent=False)
        self._use_schedule(schedule)

    def current_config(self) -> dict[str, Any]:
        config = super().current_config()
        if self.config["sampling_timesteps"] is None and self.sampling_timesteps == self.num_timesteps:
            config["sampling_timesteps"] = None
        # Only what was asked for, as in the constructor.
        return config if self.clip_x_start else {**config, "clip_x_start": False}

    @property
    def noise_scale(self) -> Schedule:
        return self._schedule

    @property
    def target(self) -> Target:
        schedules.check_objective(self.objective)
        return TARGETS[self.objective]

    # the schedule

    def _use_schedule(self, schedule: Schedule) -> None:
        """Build everything that follows from the schedule and is not in the state dict."""
        self._schedule = schedule
        self._plans = {}
        weight = self._made_loss_weight if self.loss_weight.is_meta else self.loss_weight
        tables = {
            "forward_table": schedules.forward_table(schedule),
            "loss_table": schedules.loss_table(schedule, self.objective, weight),
        }
        for name, table in tables.items():
            present = getattr(self, name)
            if present is not None and present.shape == table.shape and present.device == self.betas.device:
                present.copy_(table)  # where it is: recordings know it by its place
            else:
                setattr(self, name, table.to(device=self.betas.device, dtype=torch.float32))
        self._tie_loss_weight()

    def _tie_loss_weight(self) -> None:
        """Make the buffer loss_weight the third column of the loss's table, so that a write to it reaches the loss."""
        self._tied_weight = self._buffers["loss_weight"] = self.loss_table[:, 2]

    def _current_loss_table(self) -> torch.Tensor:
        """The table of the loss, (T, 3), with the loss_weight of now, which a user may have replaced."""
        weight = self._buffers["loss_weight"]
        if weight is None or weight is self._tied_weight:
            return self.loss_table
        if weight.shape != self.loss_table.shape[:1]:
            raise ValueError(f"loss_weight must have shape ({self.num_timesteps},), got {tuple(weight.shape)}")
        c, d, _ = self.loss_table.unbind(1)
        return torch.stack((c, d, weight.to(self.loss_table)), dim=1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Upstream's buffers: loss_weight is contiguous in files."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}loss_weight"] = destination[f"{prefix}loss_weight"].contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Follow the loaded buffers, which may be of another schedule or loss weight than the constructor's."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.betas.is_meta:
            return
        betas = self.betas.detach().cpu()
        same = torch.equal(betas.float(), self._schedule.betas.float())
        self._use_schedule(self._schedule if same else Schedule(betas.double()))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts, of which the schedule takes no narrowing: half a network still needs float32 tables."""
        before = dict(self._buffers)
        was_meta = any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                kept = before[name]
                self._buffers[name] = None if kept is None else kept.to(buffer.device)
        if was_meta and not self.betas.is_meta:  # `to_empty`: numbers that follow from the arguments
            self._fill_buffers()
        elif before["loss_weight"] is self._tied_weight:
            self._tie_loss_weight()
        return self

    def _fill_buffers(self) -> None:
        """Write the schedule's numbers into the buffers, which memory that was never written holds."""
        for name, value in self._schedule.buffers().items():
            getattr(self, name).copy_(value)
        weight = self._made_loss_weight.to(self.betas)
        self.loss_table = torch.zeros_like(self.loss_table)
        self._buffers["loss_weight"] = weight
        self._use_schedule(self._schedule)

    def _default_options(self, sampler: str) -> dict[str, float]:
        return {"eta": float(self.ddim_sampling_eta)} if sampler == "ddim" else {}

    def _plan_key(self) -> tuple:
        return (self.objective,)

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
        if self._schedule.has_zero_terminal_snr:  # 1/√ᾱ is infinite there
            signal = extract(self.sqrt_alphas_cumprod, t, x_t.shape) * x0
            return (x_t - signal) / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
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
        **conditions: Any,
    ) -> ModelPrediction:
        """The model's output as (pred_noise, pred_x_start), each (B, C, H, W); `conditions` are the model's keywords.

        `rederive_pred_noise` makes the noise agree with a clipped x0; pred_x0 and pred_v always do.
        """
        output = call_model(self.model, x, t, x_self_cond, **conditions)
        return self._as_prediction(x, t, output, clip_x_start, rederive_pred_noise)

    def _as_prediction(
        self, x: torch.Tensor, t: torch.Tensor, output: torch.Tensor, clip_x_start: bool, rederive_pred_noise: bool
    ) -> ModelPrediction:
        """What the model's output says of noise and x0."""
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
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance, clipped log variance of p(x_{t−1} | x_t) and the x0 behind them."""
        x_start = self.model_predictions(x, t, x_self_cond, **conditions).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

    # a training step

    def forward(
        self,
        img: torch.Tensor,
        *args: Any,
        times: torch.Tensor | None = None,
        loss_reduction: str = "mean",
        **kwargs: Any,
    ) -> torch.Tensor:
        """The training loss; arguments as in `DiffusionProcess.forward`."""
        if times is not None or self.timestep_history is None:
            return super().forward(img, *args, times=times, loss_reduction=loss_reduction, **kwargs)
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        check_mean(img, loss_reduction)
        times, weights = self.timestep_history.draw(img.shape[0])
        losses = super().forward(img, *args, times=times, loss_reduction="none", **kwargs)
        if self.training and torch.is_grad_enabled():
            self.timestep_history.update(times, losses.detach())
        losses = losses * weights
        return losses if loss_reduction == "none" else losses.mean()

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) int64 uniform in [0, T)."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def _rows(self, t: torch.Tensor) -> TrainingRows:
        return TrainingRows(t, self.forward_table, self._current_loss_table(), t)

    def _estimate(self, x: torch.Tensor, t: torch.Tensor, rows: TrainingRows, **conditions: Any) -> torch.Tensor:
        return self.model_predictions(x, t, **conditions).pred_x_start

    # checks

    def _check_model(self, model: nn.Module) -> None:
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError(
                "model must have plain sinusoidal time embeddings for discrete timesteps, got "
                "learned_sinusoidal_cond or random_fourier_features"
            )

    def _check_times(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"t must be an integer tensor of timesteps, got {got}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), one timestep per image, got {tuple(t.shape)}")
        for name, tensor in (("t", t), ("x_start", x)):
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the diffusion's device {self.device}, got {tensor.device}")
        if t.numel() and may_read(t):
            low, high = (bound.item() for bound in t.aminmax())
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"t must be in [0, {self.num_timesteps}), got values from {low} to {high}")
        return t.long()
