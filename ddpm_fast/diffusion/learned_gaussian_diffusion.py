"""Learned variance (Nichol & Dhariwal 2021, improved DDPM) in the ops' tables."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion import schedules
from ddpm_fast.diffusion.diffusion_process import TrainingRows, process
from ddpm_fast.diffusion.discrete_process import extract
from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.noise import Noise
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_number

LearnedPrediction = namedtuple("LearnedPrediction", ["pred_noise", "pred_x_start", "pred_variance"])

# What the loss is made of: the squared error and the bound, or the bound alone, which then trains the mean, too.
LOSSES = ("hybrid", "bound")


@process("learned")
class LearnedGaussianDiffusion(GaussianDiffusion):
    """A network that gives its variance beside its mean (Nichol & Dhariwal 2021); upstream's arguments and methods.

    Args:
        model: its `out_dim` is 2·channels: `Unet(learned_variance=True)`.
        vb_loss_weight: λ of the hybrid loss L_simple + λ·L_vlb (eq. 16), the bound being in bits per dimension and
            timestep.
        loss: "hybrid", in which the bound trains the variance alone, or "bound", vb_loss_weight·L_vlb, in which it
            trains the mean as well (OpenAI's use_kl).
        variance_at_zero: the least variance at t = 0, where the posterior's is 0: "clipped", 1e-20, or "next", that of
            t = 1 as OpenAI's.
        objective: what the first half of the output means. Upstream reads it as noise whatever it is told.
        others: of `GaussianDiffusion`.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    learned_variance = True

    bound_table: torch.Tensor  # (T, 14)

    def __init__(
        self,
        model: nn.Module,
        vb_loss_weight: float = 0.001,
        *args: Any,
        objective: str = "pred_noise",
        loss: str = "hybrid",
        variance_at_zero: str = "clipped",
        **kwargs: Any,
    ):
        self.vb_loss_weight = as_number("vb_loss_weight", vb_loss_weight, 0, 1e12)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if variance_at_zero not in ("clipped", "next"):
            raise ValueError(f"variance_at_zero must be clipped or next, got {variance_at_zero!r}")
        self._loss, self._variance_at_zero = loss, variance_at_zero
        super().__init__(model, *args, objective=objective, **kwargs)
        if self.self_condition:
            raise ValueError("model must not be conditioned on itself for this process, got self_condition=True")
        self.config |= {"vb_loss_weight": self.vb_loss_weight, "loss": loss, "variance_at_zero": variance_at_zero}

    def _check_model(self, model: nn.Module) -> None:
        if model.out_dim != 2 * model.channels:  # type: ignore[operator]
            raise ValueError(
                f"model must have twice as many output as input channels (learned_variance=True), got "
                f"channels={model.channels}, out_dim={model.out_dim}"
            )
        super()._check_model(model)

    def _use_schedule(self, schedule: schedules.Schedule) -> None:
        super()._use_schedule(schedule)
        # Upstream's buffer loss_weight is of another objective, and its loss does not read it.
        weight = schedules.loss_weight(schedule, self.objective, self._weighting)
        weight = weight if self._loss == "hybrid" else torch.zeros_like(weight)
        table = schedules.variational_bound_table(
            schedule, self.objective, weight, self.vb_loss_weight, self._variance_at_zero
        )
        self.register_buffer("bound_table", table.to(device=self.betas.device, dtype=torch.float32), persistent=False)

    def model_predictions(  # type: ignore[override]
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        **conditions: Any,
    ) -> LearnedPrediction:
        """The model's output as (pred_noise, pred_x_start, pred_variance), each (B, C, H, W); the variance as it is."""
        output, variance = call_model(self.model, x, t, **conditions).chunk(2, dim=1)
        prediction = self._as_prediction(x, t, output, clip_x_start, rederive_pred_noise)
        return LearnedPrediction(*prediction, variance)

    def p_mean_variance(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        clip_denoised: bool = True,
        model_output: torch.Tensor | None = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log variance of p(x_{t−1} | x_t), and the x0 behind them; the variance is the model's."""
        if model_output is None:
            model_output = call_model(self.model, x, t, **conditions)
        output, variance = model_output.chunk(2, dim=1)
        low = extract(self.posterior_log_variance_clipped, t, x.shape)
        high = extract(torch.log(self.betas), t, x.shape)
        log_variance = low + (high - low) * (variance + 1) / 2
        x_start = self._as_prediction(x, t, output, clip_denoised, False).pred_x_start
        mean = self.q_posterior(x_start, x, t)[0]
        return mean, log_variance.exp(), log_variance, x_start

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
        if self._has_own("p_mean_variance"):
            raise ValueError(
                f"{type(self).__name__} has its own p_mean_variance, which the bound's kernel would leave out of the "
                "loss: give it a p_losses, too"
            )
        return variational_bound(
            model_output, x_start, t, self.bound_table, drawn, detach_mean=self._loss == "hybrid", **options
        )
