"""Learned variance (Nichol & Dhariwal 2021, improved DDPM) in the ops' tables."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion import samplers, schedules
from ddpm_fast.diffusion.diffusion_process import TrainingRows, process
from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.diffusion.discrete_process import extract
from ddpm_fast.diffusion.samplers import SamplerTable
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
        others: of `GaussianDiffusion`. The objective counts in the bound as well, unlike upstream's, which reads every
            output as noise there.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
    """

    bound_table: torch.Tensor  # (T, 14)

    def __init__(
        self, model: nn.Module, vb_loss_weight: float = 0.001, *args: Any, loss: str = "hybrid", **kwargs: Any
    ):
        self.vb_loss_weight = as_number("vb_loss_weight", vb_loss_weight, 0, 1e12)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self._loss = loss
        super().__init__(model, *args, **kwargs)
        if self.self_condition:
            raise ValueError("model must not be conditioned on itself for this process, got self_condition=True")
        self.config |= {"vb_loss_weight": self.vb_loss_weight, "loss": loss}

    def _check_model(self, model: nn.Module) -> None:
        if model.out_dim != 2 * model.channels:  # type: ignore[operator]
            raise ValueError(
                f"model must have twice as many output as input channels (learned_variance=True), got "
                f"channels={model.channels}, out_dim={model.out_dim}"
            )
        super()._check_model(model)
