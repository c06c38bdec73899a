"""A network that predicts noise and x0 and weighs the two, as upstream's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.diffusion_process import TrainingRows, process
from ddpm_fast.diffusion.discrete_process import ModelPrediction
from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.diffusion.levels import TARGETS, Target
from ddpm_fast.models.stock import stock
from ddpm_fast.noise import Noise
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_number


@stock
class WeighedEstimate(nn.Module):
    """The network of a process as one that gives x0, the weighted mean of both of its estimates; for sampling."""

    def __init__(self, diffusion: WeightedObjectiveGaussianDiffusion, network: nn.Module):
        super().__init__()
        self.estimate = partial(diffusion._estimate_of, network)
        self.network = network

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        return self.estimate(x, t, **conditions)


@process("weighted")
class WeightedObjectiveGaussianDiffusion(GaussianDiffusion):
    """Predicts noise, x0, and by a softmax how much each counts; upstream's arguments and methods.

    Args:
        model: its `out_dim` is 2·channels + 2.
        pred_noise_loss_weight, pred_x_start_loss_weight: of the two errors beside that of the weighted mean.
        others: of `GaussianDiffusion`. Sampling with fewer steps works, unlike upstream's.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    # Its loss has weights of its own.
    fixed_arguments = GaussianDiffusion.fixed_arguments | {
        "objective",
        "min_snr_loss_weight",
        "min_snr_gamma",
        "loss_weighting",
        "loss_weighting_options",
    }

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        pred_noise_loss_weight: float = 0.1,
        pred_x_start_loss_weight: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(model, *args, **kwargs)
        if self.self_condition:
            raise ValueError("model must not be conditioned on itself for this process, got self_condition=True")
        self.split_dims = (self.channels, self.channels, 2)
        self.pred_noise_loss_weight = as_number("pred_noise_loss_weight", pred_noise_loss_weight)
        self.pred_x_start_loss_weight = as_number("pred_x_start_loss_weight", pred_x_start_loss_weight)
        self.config |= dict(
            pred_noise_loss_weight=self.pred_noise_loss_weight, pred_x_start_loss_weight=self.pred_x_start_loss_weight
        )

    def _check_model(self, model: nn.Module) -> None:
        if model.out_dim != 2 * model.channels + 2:  # type: ignore[operator]
            raise ValueError(
                f"model must have out_dim = 2·channels + 2 = {2 * model.channels + 2}, got {model.out_dim}"  # type: ignore[operator]
            )
        super()._check_model(model)

    def _weighed(
        self, x: torch.Tensor, t: torch.Tensor, output: torch.Tensor, limit: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noise, x0 and the weighted mean of x0 by both, (B, C, H, W) each."""
        noise, x_start, weights = output.float().split(self.split_dims, dim=1)
        by_noise = self.predict_start_from_noise(x, t, noise)
        if limit is not None:
            by_noise = by_noise.clamp(-limit, limit)
        share = weights.softmax(dim=1)
        return noise, x_start, share[:, :1] * by_noise + share[:, 1:] * x_start

    def estimate(self, x: torch.Tensor, t: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """x0 as the network weighs its two estimates, (B, C, H, W)."""
        return self._estimate_of(self.model, x, t, **conditions)

    def _estimate_of(self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, **conditions: Any) -> torch.Tensor:
        return self._weighed(x, t, call_model(network, x, t, **conditions), None)[2]

    def model_predictions(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        **conditions: Any,
    ) -> ModelPrediction:
        """The weighted estimate as (pred_noise, pred_x_start), each (B, C, H, W)."""
        x_start = self.estimate(x, t, **conditions)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    @property
    def target(self) -> Target:
        """What a sampler sees of the network: x0."""
        return TARGETS["pred_x0"]

    def _sampled(self, network: Any) -> nn.Module:
        return WeighedEstimate(self, network)

    def _reads_x_t(self) -> bool:
        return True

    def _can_fuse_noise(self) -> bool:
        return False

    def _shows_images(self) -> bool:
        return True

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
        assert drawn.tensor is not None  # `_can_fuse_noise` is False
        noise, estimate, weighed = self._weighed(x, t, model_output, limit=2.0)
        of_noise, of_x_start, of_weighed = (
            (found - wanted).square().flatten(1).mean(1)
            for found, wanted in ((noise, drawn.tensor), (estimate, x_start), (weighed, x_start))
        )
        return of_weighed + self.pred_x_start_loss_weight * of_x_start + self.pred_noise_loss_weight * of_noise
