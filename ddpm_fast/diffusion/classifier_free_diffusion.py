"""Upstream's class-conditional process (denoising_diffusion_pytorch.classifier_free_guidance) on tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion.conditions import Conditions, taken_by
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess, TrainingRows, process
from ddpm_fast.diffusion.discrete_process import ModelPrediction
from ddpm_fast.diffusion.gaussian_diffusion import _STEP_METHODS, GaussianDiffusion
from ddpm_fast.diffusion.guidance import Guidance, column, reduces, split_noise, widened
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling_run import Conditioning, SamplingRun
from ddpm_fast.models.classifier_free_unet import guided_output
from ddpm_fast.ops.sampler_step.op import sampler_step
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import plain

# Upstream's defaults of sampling.
COND_SCALE, RESCALED_PHI = 6.0, 0.7


@process("classifier_free")
class ClassifierFreeDiffusion(GaussianDiffusion):
    """Denoising diffusion of classes with classifier-free guidance; upstream's arguments, buffers and methods.

    Args:
        model: takes (x, t) and `classes` and `cond_keep_mask` by keyword, such as the `Unet` beside it.
        objective, beta_schedule, ddim_sampling_eta: as of `GaussianDiffusion`, with upstream's other defaults.
        use_cfg_plus_plus: DDIM renoises with the noise of the null condition (Chung et al. 2024).
        others: of `GaussianDiffusion`, but for `guidance`: `sample` has `cond_scale` and `rescaled_phi`.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    fixed_arguments = GaussianDiffusion.fixed_arguments | {"guidance"}

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_noise",
        beta_schedule: str = "cosine",
        ddim_sampling_eta: float = 1.0,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        use_cfg_plus_plus: bool = False,
        **others: Any,
    ):
        if others.get("guidance") is not None:
            raise TypeError(
                "guidance must be None for this process: sample takes cond_scale, rescaled_phi and guidance"
            )
        super().__init__(
            model,
            image_size=image_size,
            timesteps=timesteps,
            sampling_timesteps=sampling_timesteps,
            objective=objective,
            beta_schedule=beta_schedule,
            ddim_sampling_eta=ddim_sampling_eta,
            offset_noise_strength=offset_noise_strength,
            min_snr_loss_weight=min_snr_loss_weight,
            min_snr_gamma=min_snr_gamma,
            **others,
        )
        self.use_cfg_plus_plus = plain("use_cfg_plus_plus", use_cfg_plus_plus)
        self.config["use_cfg_plus_plus"] = self.use_cfg_plus_plus

    def _check_model(self, model: nn.Module) -> None:
        if model.channels != model.out_dim:
            raise ValueError(
                f"model must have as many output as input channels, got channels={model.channels}, "
                f"out_dim={model.out_dim}"
            )
        takes = taken_by(model)
        if takes.classes is None or not takes.has_null:
            raise ValueError(
                f"model must take classes and cond_keep_mask by keyword for classifier-free guidance, which a "
                f"{type(model).__name__} does not"
            )
        super()._check_model(model)

    # training

    def random_cond_keep_mask(self, batch_size: int) -> torch.Tensor:
        """(B,) bool, False where a class is dropped, with probability `model.cond_drop_prob`."""
        keep = torch.ones(batch_size, dtype=torch.bool, device=self.device)
        classes = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        drawn = Conditions(classes=classes).with_drawn_mask(self.model, self.device).keep_mask
        return keep if drawn is None else drawn

    def xm_shared_random_kwargs(self, batch_size: int) -> dict[str, torch.Tensor]:
        """What the candidates of an image share in explorative modelling."""
        return {"cond_keep_mask": self.random_cond_keep_mask(batch_size)}

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t = √ᾱ x0 + √(1 − ᾱ) ε (Ho et al. 2020, eq. 4), ε with its offset, as upstream's here.

        Args:
            x_start: (B, ...), in [−1, 1].
            t: (B,) int64 in [0, T).
            noise: ε before the offset; fresh if None. Unlike upstream's it is left as it is.
        """
        if noise is None:
            noise = self.training_noise(x_start, self.offset_noise_strength)
        elif self.offset_noise_strength > 0:
            noise = self._offset(noise, self.offset_noise_strength, noise_function.draw_seed(noise.device))
        return super().q_sample(x_start, t, noise)

    def _estimate(
        self, x: torch.Tensor, t: torch.Tensor, rows: TrainingRows, **conditions: torch.Tensor
    ) -> torch.Tensor:
        output = call_model(self.model, x, t, **conditions)
        return self._as_prediction(x, t, output, False, False).pred_x_start

    # predictions

    def _outputs(self, x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model gives with the classes and without, (B, C, H, W) each, in one call."""
        told = Conditions(classes=classes).check(self.model, batch_size=len(x), device=x.device, size=None)
        both = call_model(self.model, torch.cat((x, x)), torch.cat((t, t)), **told.doubled().arguments(self.model))
        output, null = both.split(len(x))
        return output, null

    def _guided_outputs(
        self, x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor, cond_scale: float, rescaled_phi: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guided output and that without classes; by the model's own method where a user has written one."""
        if self._guides_itself():
            options = {"cond_scale": cond_scale, "rescaled_phi": rescaled_phi}
            found = self.model.forward_with_cond_scale(x, t, classes, **options)
            return found if isinstance(found, tuple) else (found, found)
        output, null = self._outputs(x, t, classes)
        return guided_output(output, null, cond_scale, rescaled_phi), null

    def _guides_itself(self) -> bool:
        """True if the model has a `forward_with_cond_scale` that is neither this package's nor upstream's."""
        method = getattr(self.model, "forward_with_cond_scale", None)
        home = getattr(getattr(method, "__func__", method), "__module__", None)
        return method is not None and str(home).partition(".")[0] not in ("ddpm_fast", "denoising_diffusion_pytorch")

    def model_predictions(  # type: ignore[override]  # upstream's arguments
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        classes: torch.Tensor,
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        clip_x_start: bool = False,
    ) -> ModelPrediction:
        """The guided output as (pred_noise, pred_x_start), each (B, C, H, W).

        With CFG++ the noise is that of the null condition. A predicted noise is not made to agree with a clipped x0.
        """
        output, null = self._guided_outputs(x, t, classes, cond_scale, rescaled_phi)
        x_start = self._as_prediction(x, t, output, clip_x_start, False).pred_x_start
        of_noise = null if self.use_cfg_plus_plus else output
        return ModelPrediction(self._as_prediction(x, t, of_noise, clip_x_start, False).pred_noise, x_start)

    def p_mean_variance(  # type: ignore[override]  # upstream's arguments
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        classes: torch.Tensor,
        cond_scale: float,
        rescaled_phi: float,
        clip_denoised: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance, clipped log variance of p(x_{t−1} | x_t) and the guided x0 behind them."""
        x_start = self.model_predictions(x, t, classes, cond_scale, rescaled_phi).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

    # sampling

    def _as_guidance(self, cond_scale: float, rescaled_phi: float) -> Guidance:
        """Upstream's two numbers; the update's part along the output is left out."""
        projected: dict[str, Any] = {"eta": 0.0, "space": "output"}
        return Guidance(cond_scale, rescale=rescaled_phi, cfg_plus_plus=self.use_cfg_plus_plus, **projected)

    def _guidance(self, guidance: Any, conditions: Conditions) -> Guidance:
        return super()._guidance(self._chosen_guidance(COND_SCALE, RESCALED_PHI, guidance), conditions)

    def _guided_plan(self, plan: SamplerTable, found: Guidance, has_gradient: bool) -> SamplerTable:
        """A sampler's table with upstream's guidance: its DDIM takes the noise of other estimates of x0."""
        found = found.with_numbers(len(plan.times))
        if plan.sampler not in ("ddpm", "ddim"):
            return super()._guided_plan(plan, found, has_gradient)
        guided = super()._guided_plan(plan, replace(found, cfg_plus_plus=False), has_gradient)
        name = self._noise_column(found.cfg_plus_plus)
        if plan.sampler == "ddpm" or name is None:
            return guided

        def with_noise() -> SamplerTable:
            assert plan.levels is not None
            table = widened(guided.table)
            table = table.clone() if table is guided.table else table
            low, high = found.interval if found.cfg_plus_plus else (-1.0, float("inf"))
            inside = (plan.levels.sigma > low) & (plan.levels.sigma <= high)
            split_noise(table, plan, name, inside)
            return replace(guided, table=table)

        return self._kept((guided, name, *found.key), with_noise)

    def _noise_column(self, cfg_plus_plus: bool) -> str | None:
        """The column of the x0 whose noise DDIM takes; None: it is that of the guided and clipped x0."""
        if self.objective == "pred_noise":  # the noise as predicted, whatever is clipped
            return "kn" if cfg_plus_plus else "kg"
        return "kc" if cfg_plus_plus else None

    @torch.inference_mode()
    def p_sample(  # type: ignore[override]  # upstream's arguments
        self,
        x: torch.Tensor,
        t: int,
        classes: torch.Tensor,
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        clip_denoised: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        start_index: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step from t to t − 1; further arguments as in `GaussianDiffusion.p_sample`.

        Returns:
            x at t − 1, and the guided x0.
        """
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        seed = self._seed(seed)
        row = self.num_timesteps - 1 - t
        if self._overrides(*_STEP_METHODS[1:]):
            given: dict[str, Any] = {"classes": classes, "cond_scale": cond_scale, "rescaled_phi": rescaled_phi}
            mean, _, log_variance, x_start = self.p_mean_variance(x=x, t=times, clip_denoised=clip_denoised, **given)
            noise = self._step_noise(x, seed, row, start_index) if noise is None else noise
            return mean + (0.5 * log_variance).exp() * noise * (t > 0), x_start
        plan = self._plan("ddpm", self.num_timesteps, "own")
        guided = self._guided_plan(plan, self._as_guidance(cond_scale, rescaled_phi), False)
        output, null = self._outputs(x, times, classes)
        step = torch.full((1,), row, dtype=torch.int64, device=x.device)
        return sampler_step(
            x,
            output,
            widened(guided.table).to(device=x.device, dtype=torch.float32),
            step,
            seed,
            noise=noise,
            clip_x_start=clip_denoised,
            start_index=start_index,
            second_output=null,
            reduces=reduces(guided.table),
        )

    def p_sample_loop(  # type: ignore[override]  # upstream's arguments
        self,
        classes: torch.Tensor,
        shape: Sequence[int],
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        *,
        return_all_timesteps: bool = False,
        seed: int | torch.Tensor | None = None,
        guidance: Any = None,
        progress: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """Ancestral sampling over all T timesteps; `options` as in `sample`."""
        plan = self._plan("ddpm", self.num_timesteps, "own")
        told = {"classes": classes, "guidance": self._chosen_guidance(cond_scale, rescaled_phi, guidance)}
        return self._sample(plan, shape, return_all_timesteps, seed, progress=progress, **told, **options)

    def ddim_sample(  # type: ignore[override]  # upstream's arguments
        self,
        classes: torch.Tensor,
        shape: Sequence[int],
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        clip_denoised: bool = True,
        *,
        return_all_timesteps: bool = False,
        seed: int | torch.Tensor | None = None,
        guidance: Any = None,
        progress: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """DDIM over `sampling_timesteps`; `options` as in `sample`."""
        told = {"classes": classes, "guidance": self._chosen_guidance(cond_scale, rescaled_phi, guidance)}
        options = {"clip_x_start": clip_denoised, "progress": progress, **options}
        return self._sample(self._plan("ddim"), shape, return_all_timesteps, seed, **told, **options)

    def _chosen_guidance(self, cond_scale: float, rescaled_phi: float, guidance: Any) -> Any:
        return self._as_guidance(cond_scale, rescaled_phi) if guidance is None else guidance

    def sample(  # type: ignore[override]  # upstream's arguments
        self,
        classes: torch.Tensor | Sequence[int] | None = None,
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        *,
        batch_size: int | None = None,
        return_all_timesteps: bool = False,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Any = None,
        clip_x_start: bool | None = None,
        guidance: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images of classes; further arguments as in `DiffusionProcess.sample`.

        Args:
            classes: (B,) int64.
            cond_scale: w of the guidance; 1 is none.
            rescaled_phi: φ, how far its standard deviation is brought back (Lin et al. 2023).
            guidance: a scale or a `Guidance` in place of both.
        """
        shape = self._shape(batch_size, classes=classes)
        asked = (sampler, sampling_timesteps, spacing, sampler_options, clip_x_start, guidance)
        all_asked = any(value is not None for value in (*asked, self.spacing, self.sampler)) or self.sampler_options
        if all_asked or return_all_timesteps or not self.clip_x_start:
            options["clip_x_start"] = self.clip_x_start if clip_x_start is None else clip_x_start
            plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
            options.setdefault("progress", True)
            told = {"classes": classes, "guidance": self._chosen_guidance(cond_scale, rescaled_phi, guidance)}
            return self._sample(plan, shape, return_all_timesteps, **told, **options)
        # A subclass may have these methods with upstream's arguments.
        sample = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return sample(classes, shape, cond_scale, rescaled_phi, **options)  # type: ignore[arg-type]

    def interpolate(  # type: ignore[override]  # upstream's arguments
        self,
        x1: torch.Tensor,
        x2: torch.Tensor,
        classes: torch.Tensor,
        t: float | None = None,
        lam: float = 0.5,
        cond_scale: float = COND_SCALE,
        rescaled_phi: float = RESCALED_PHI,
        *,
        guidance: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images of classes between x1 and x2; see `DiffusionProcess.interpolate`."""
        told = {"classes": classes, "guidance": self._chosen_guidance(cond_scale, rescaled_phi, guidance)}
        return DiffusionProcess.interpolate(self, x1, x2, t, lam, **told, **options)

    # methods of subclasses

    def _overridden(self) -> set[str]:
        return super()._overridden() | ({"model_predictions"} if self._guides_itself() else set())

    def _why_not_recorded(
        self, sampler: str, x: torch.Tensor, any_module: bool, given: Conditioning | None = None
    ) -> str | None:
        if self._guides_itself():
            return f"{type(self.model).__name__} has its own forward_with_cond_scale"
        return super()._why_not_recorded(sampler, x, any_module, given)

    def _check_composed(self, run: SamplingRun) -> None:
        super()._check_composed(replace(run, conditioning=replace(run.conditioning, is_doubled=False)))
        table = widened(run.plan.table)
        guided = table[table[:, column("w")] != 1]
        if bool((guided[:, [column(name) for name in ("eta", "rho", "mu", "space")]] != 0).any()):
            raise ValueError(
                f"guidance must be cond_scale and rescaled_phi where {type(self).__name__} has its own "
                f"{', '.join(sorted(self._overridden()))}, which takes these two"
            )

    def _told(self, run: SamplingRun, row: int) -> tuple[torch.Tensor, float, float]:
        """The classes, the scale and φ of a row, as upstream's methods take them."""
        w, phi = widened(run.plan.table[row : row + 1])[0, [column("w"), column("phi")]].tolist()
        classes = run.conditioning.arguments["classes"]
        return classes[: len(classes) // 2] if run.conditioning.is_doubled else classes, w, phi

    def _own_p_sample(
        self, run: SamplingRun, row: int, x: torch.Tensor, x_self_cond: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.p_sample(x, int(run.plan.times[row]), *self._told(run, row), **self._noise_options(run))

    def _own_predictions(
        self, run: SamplingRun, row: int, x: torch.Tensor, t: torch.Tensor, x_self_cond: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model_predictions(x, t, *self._told(run, row), clip_x_start=True)[:2]
