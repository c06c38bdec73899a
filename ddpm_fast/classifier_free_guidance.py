"""Upstream's `denoising_diffusion_pytorch.classifier_free_guidance`: a class-conditional network and its process.

from ddpm_fast.classifier_free_guidance import Unet, GaussianDiffusion
"""

from importlib import import_module

_LAZY = {
    "GaussianDiffusion": ("ddpm_fast.diffusion.classifier_free_diffusion", "ClassifierFreeDiffusion"),
    "ModelPrediction": ("ddpm_fast.diffusion.discrete_process", "ModelPrediction"),
    "Unet": ("ddpm_fast.models.classifier_free_unet", "Unet"),
    "cosine_beta_schedule": ("ddpm_fast.diffusion.schedules", "cosine_beta_schedule"),
    "linear_beta_schedule": ("ddpm_fast.diffusion.schedules", "linear_beta_schedule"),
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
