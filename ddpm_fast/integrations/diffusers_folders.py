"""Import and export: folders of diffusers' `DDPMPipeline` and `DDIMPipeline` as processes of this package, and back.

No `UNet2DModel` computes what a `Unet` of this package does, with either norm: its blocks normalise before a
convolution and ours after it, its output goes through a norm and ours through a block. So `from_diffusers` takes the
`UNet2DModel` itself into a process, accelerated, and `to_diffusers` writes a network of ours as a component of its own
class, `diffusers_network.FastUnet2D`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.diffusion.learned_gaussian_diffusion import LearnedGaussianDiffusion
from ddpm_fast.diffusion.schedules import GIVEN, Schedule, make_betas
from ddpm_fast.integrations.accelerate import accelerate as accelerate_model
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.pretrained import check_repository

# prediction_type of diffusers' schedulers → objective of ours.
OBJECTIVES = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}
# variance_type → where the log variance lies between the posterior's and that of the forward step.
VARIANCES = {"fixed_small": 0.0, "fixed_small_log": 0.0, "fixed_large": 1.0, "learned_range": 0.0}
# Names of schedules in both packages that give the same betas, with diffusers' usual ends of its linear one.
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}
# Steps of DDIMPipeline where it is not told.
_DDIM_STEPS = 50


class DiffusersNetwork(nn.Module):
    """A `UNet2DModel`, or a model with its arguments, called as processes of this package call a network.

    Args:
        unet: the model; its state dict has the prefix `unet.`.

    Raises:
        TypeError, ValueError: a model that takes a condition which no process has.
    """

    self_condition = False

    def __init__(self, unet: nn.Module):
        super().__init__()
        config: Any = getattr(unet, "config", None)
        if config is None or not hasattr(config, "in_channels"):
            raise TypeError(f"unet must be a UNet2DModel of diffusers, got {type(unet).__name__}")
        if getattr(config, "class_embed_type", None) is not None:
            raise ValueError(
                f"class_embed_type must be None, since classes are numbers, got {config.class_embed_type!r}"
            )
        if getattr(config, "time_embedding_type", "positional") == "fourier":
            raise ValueError(
                "time_embedding_type must be positional or learned: a network with 'fourier' is told levels of noise "
                "and divides by them"
            )
        self.unet = unet
        self.channels, self.out_dim = config.in_channels, config.out_channels
        self.num_classes = getattr(config, "num_class_embeds", None)
        # Its first layer is a convolution of x, which x_t may be written for.
        self.begins_with_convolution = not getattr(config, "center_input_sample", False)

    @property
    def downsample_factor(self) -> int:
        """Height and width must be divisible by this."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        x_self_cond: torch.Tensor | None = None,
        *,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, channels, H, W), (B,) or (1,), classes (B,) → (B, out_dim, H, W)."""
        if x_self_cond is not None:
            raise ValueError("x_self_cond must be None, since a UNet2DModel would not read it")
        return self.unet(x, time, class_labels=classes, return_dict=False)[0]


def from_diffusers(folder: Any, *, accelerate: bool = True, **options: Any) -> GaussianDiffusion:
    """The network and the scheduler of a diffusers pipeline as a process of this package.

    The process has the scheduler's betas, prediction type, clipping and variance; it draws images by the scheduler's
    sampler and trains on the squared error of the network's output, as diffusers' examples do.

    Args:
        folder: of `DDPMPipeline.save_pretrained`, `DDIMPipeline.save_pretrained` or `to_diffusers`; the name of a
            repository, which diffusers downloads; or such a pipeline, whose network the process then shares.
        accelerate: let the blocks of its network run fused ops.
        options: of `GaussianDiffusion`, in place of what the scheduler says, and `image_size`.

    Returns:
        A `LearnedGaussianDiffusion` for the variance "learned_range", else a `GaussianDiffusion`. Its `model` is a
        `DiffusersNetwork` around the `UNet2DModel`, or the network that `to_diffusers` wrote.

    Raises:
        FileNotFoundError: there is no such folder, or it is of no pipeline.
        ValueError: the scheduler or the network does what no process of this package does.
    """
    with needed_for("from_diffusers"):
        import diffusers
    is_path = isinstance(folder, (str, os.PathLike))
    if is_path:
        _check_path(folder)
    from ddpm_fast.integrations.diffusers_network import in_own_memory  # diffusers finds its class where it is imported

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(os.fspath(folder)) if is_path else folder
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if unet is None or scheduler is None:
        raise TypeError(f"folder must be of a pipeline with unet and scheduler, got {type(pipeline).__name__}")
    if is_path:
        in_own_memory(unet)
    network = unet._modules.get("net")  # of a `FastUnet2D`
    model = (
        network if isinstance(network, UnetBase) else DiffusersNetwork(accelerate_model(unet) if accelerate else unet)
    )
    arguments = process_options(scheduler) | {"image_size": unet.config.sample_size} | options
    if arguments["image_size"] is None:
        raise ValueError("image_size must be given where the network's config has no sample_size")
    is_learned = getattr(scheduler.config, "variance_type", None) == "learned_range"
    cls = LearnedGaussianDiffusion if is_learned and model.out_dim == 2 * model.channels else GaussianDiffusion
    return cls(model, **arguments)


def _check_path(folder: str | os.PathLike) -> None:
    """Raise FileNotFoundError for a path with nothing for diffusers to load."""
    if not os.path.isdir(folder):
        check_repository(folder)
    elif not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise FileNotFoundError(f"folder {os.fspath(folder)} has no model_index.json, so it is of no pipeline")


def process_options(scheduler: Any) -> dict[str, Any]:
    """What a `DDPMScheduler` or `DDIMScheduler` says, as arguments of `GaussianDiffusion`.

    Raises:
        ValueError: it does what no table does, named in one sentence.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"scheduler must be a DDPMScheduler or a DDIMScheduler, got a {kind}")
    if config.thresholding:
        raise ValueError("thresholding must be False, since a step of a table does not see a whole image")
    if config.clip_sample and config.clip_sample_range != 1:
        raise ValueError(f"clip_sample_range must be 1, the range of the images, got {config.clip_sample_range}")
    if len(scheduler.betas) != config.num_train_timesteps:
        raise ValueError(
            f"num_train_timesteps must be the number of betas, {len(scheduler.betas)}, got {config.num_train_timesteps}"
        )
    options = {
        "timesteps": config.num_train_timesteps,
        "objective": OBJECTIVES[config.prediction_type],
        "clip_x_start": bool(config.clip_sample),
        "loss_weighting": "uniform",
        **_schedule_options(scheduler.betas.double()),
    }
    if config.timestep_spacing == "leading" and config.steps_offset:
        raise ValueError(f"steps_offset must be 0, got {config.steps_offset}: give the times as spacing instead")
    spacing = _SPACINGS[config.timestep_spacing]
    if kind == "DDIMScheduler":
        steps = min(_DDIM_STEPS, config.num_train_timesteps)
        return options | {"sampler": "ddim", "sampling_timesteps": steps, "spacing": spacing}
    if config.variance_type not in VARIANCES:
        raise ValueError(f"variance_type must be one of {', '.join(VARIANCES)}, got {config.variance_type!r}")
    large = VARIANCES[config.variance_type]
    return options | {"sampler": "ddpm", "spacing": spacing, "sampler_options": {"large": large} if large else None}


def _schedule_options(betas: torch.Tensor) -> dict[str, Any]:
    """Betas as the arguments of a schedule: by its name where they are that, to float32's rounding, else given."""
    for name in SCHEDULES:
        ours = make_betas(name, len(betas)) if name != "linear" or len(betas) > 20 else None
        if ours is None:
            continue
        if torch.allclose(ours, betas, rtol=1e-6, atol=1e-9):
            return {"beta_schedule": name}
        # Their rescaled ᾱ is rounded to float32, which the ratios of the last ones magnify.
        rescaled = Schedule(ours).with_zero_terminal_snr().betas
        if betas[-1] == 1 and torch.allclose(rescaled, betas, rtol=1e-3, atol=1e-6):
            return {"beta_schedule": name, "zero_terminal_snr": True}
    return {"beta_schedule": GIVEN, "schedule_fn_kwargs": {"betas": betas.tolist()}}


def to_diffusers(diffusion: GaussianDiffusion, folder: str | os.PathLike) -> None:
    """Write a process as a folder that diffusers' `DDPMPipeline` or `DDIMPipeline` loads.

    The scheduler has the process's betas, objective, clipping and variance; it is a `DDIMScheduler` where the process
    samples by DDIM, else a `DDPMScheduler`.

    Args:
        diffusion: a `GaussianDiffusion` or a `LearnedGaussianDiffusion`. A `UNet2DModel` in it is written as it is. A
            network of this package, which no `UNet2DModel` computes, is written as a `FastUnet2D`: before loading it,
            import `ddpm_fast.integrations.diffusers_network`.

    Raises:
        TypeError, ValueError: a process or network that no pipeline runs, named in one sentence.
    """
    with needed_for("to_diffusers"):
        import diffusers
    kinds = (GaussianDiffusion, LearnedGaussianDiffusion)
    if getattr(type(diffusion), "process_name", None) not in [kind.process_name for kind in kinds]:
        raise TypeError(
            f"diffusion must be a GaussianDiffusion or a LearnedGaussianDiffusion, which diffusers' schedulers step, "
            f"got {type(diffusion).__name__}"
        )
    if diffusion.normalize(torch.zeros(1)).item() != -1:
        raise ValueError("auto_normalize must be True, since a pipeline gives images in [0, 1] for [−1, 1]")
    height, width = diffusion.image_size
    sample_size = height if height == width else (height, width)
    scheduler, is_ddim = _scheduler(diffusion, diffusers)
    pipeline = diffusers.DDIMPipeline if is_ddim else diffusers.DDPMPipeline
    component = _component(diffusion.model, sample_size)
    pipeline(unet=component, scheduler=scheduler).save_pretrained(os.fspath(folder))


def _component(model: Any, sample_size: int | tuple[int, int]) -> Any:
    """What a pipeline has as its `unet`."""
    if isinstance(model, DiffusersNetwork):
        unet: Any = model.unet
        if unet.config.sample_size != sample_size:
            unet.register_to_config(sample_size=sample_size)
        return unet
    if not isinstance(model, UnetBase):
        raise TypeError(
            f"model must be a UNet2DModel of diffusers or a Unet of this package, got {type(model).__name__}"
        )
    refused = {"self_condition": model.self_condition, "cond_dim": model.cond_dim, "cond_channels": model.cond_channels}
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"{name} must not be set, since a pipeline tells its network the timestep alone, got {value}"
            )
    from ddpm_fast.integrations.diffusers_network import FastUnet2D

    return FastUnet2D.around(model, sample_size)


def _scheduler(diffusion: GaussianDiffusion, diffusers: Any) -> tuple[Any, bool]:
    """The scheduler that steps as a process does, and whether it is DDIM's."""
    betas = diffusion.noise_scale.betas
    config: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in OBJECTIVES.items()}[diffusion.objective],
        "clip_sample": diffusion.clip_x_start,
    }
    sampler = diffusion.sampler or diffusion.default_sampler
    is_ddim = sampler == "ddim"
    cls: Callable[..., Any] = diffusers.DDIMScheduler if is_ddim else diffusers.DDPMScheduler
    spacings = {ours: theirs for theirs, ours in _SPACINGS.items()}
    if isinstance(diffusion.spacing, str) and diffusion.spacing in spacings:
        config["timestep_spacing"] = spacings[diffusion.spacing]
    if not is_ddim:
        config["variance_type"] = _variance_type(diffusion, sampler)
    return cls(**config, **_betas_config(cls, betas)), is_ddim


def _variance_type(diffusion: GaussianDiffusion, sampler: str) -> str:
    if diffusion.learned_variance:
        return "learned_range"
    large = diffusion.sampler_options.get("large", 0.0) if sampler == "ddpm" else 0.0
    kinds = {0.0: "fixed_small", 1.0: "fixed_large"}
    if large not in kinds:
        raise ValueError(f"large must be 0 or 1, which diffusers has variances for, got {large}")
    return kinds[large]


def _betas_config(cls: Callable[..., Any], betas: torch.Tensor) -> dict[str, Any]:
    """The betas as diffusers' schedulers take them: by name where a name gives them, to float32's rounding."""
    for theirs in SCHEDULES.values():
        made = cls(num_train_timesteps=len(betas), beta_schedule=theirs).betas.double()
        if torch.allclose(made, betas, rtol=1e-6, atol=1e-9):
            return {"beta_schedule": theirs}
    return {"trained_betas": betas.tolist()}
