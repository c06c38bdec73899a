"""The options of OpenAI's improved-diffusion and guided-diffusion, as a process of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.diffusion.learned_gaussian_diffusion import LearnedGaussianDiffusion
from ddpm_fast.runtime.plain import as_int


def from_openai_options(
    model: nn.Module,
    *,
    image_size: int | Sequence[int],
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[float] = "",
    use_ddim: bool = False,
    schedule_sampler: str = "uniform",
    **others: Any,
) -> GaussianDiffusion:
    """A process from the options of `create_gaussian_diffusion` and of the training and sampling scripts.

    Args:
        model: with twice the output channels for `learn_sigma`.
        steps: T.
        learn_sigma: the model gives its variance (Nichol & Dhariwal 2021, eq. 15).
        sigma_small: without it, the variance of ancestral sampling is β, with it the posterior's.
        noise_schedule: "linear" or "cosine".
        use_kl: the loss is T times the bound, in bits per dimension.
        predict_xstart: the model gives x0 instead of noise.
        rescale_timesteps: the model is told t·1000/T; only with 1,000 steps, where it changes nothing.
        rescale_learned_sigmas: the bound counts T/1000 in the loss of a learned variance instead of once.
        timestep_respacing: "250", "10,10,20", "ddim50", or timesteps, for sampling; "" takes all.
        use_ddim: sample with DDIM.
        schedule_sampler: "uniform" or "loss-second-moment".
        others: of `GaussianDiffusion`.

    Raises:
        TypeError, ValueError: an option does not fit, named in one sentence.
    """
    steps = as_int("steps", steps, 1)
    if noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule must be linear or cosine, got {noise_schedule!r}")
    if rescale_timesteps and steps != 1000:
        raise ValueError(f"rescale_timesteps must be False unless steps is 1000, got steps={steps}")
    if use_kl and not learn_sigma:
        raise ValueError("use_kl must be False without learn_sigma: the bound is a loss of learned variances here")
    others = {
        "timesteps": steps,
        "beta_schedule": noise_schedule,
        "objective": "pred_x0" if predict_xstart else "pred_noise",
        "loss_weighting": "uniform",
        "timestep_sampler": schedule_sampler,
        "spacing": timestep_respacing or None,
        "sampler": "ddim" if use_ddim else "ddpm",
        **others,
    }
    if not learn_sigma:
        if not sigma_small and not use_ddim:
            others["sampler_options"] = {"large": 1.0, **(others.get("sampler_options") or {})}
        return GaussianDiffusion(model, image_size=image_size, **others)
    weight = float(steps) if use_kl else steps / 1000 if rescale_learned_sigmas else 1.0
    loss = "bound" if use_kl else "hybrid"
    return LearnedGaussianDiffusion(
        model, weight, image_size=image_size, loss=loss, **{"variance_at_zero": "next", **others}
    )
