"""A fast drop-in backend for `denoising-diffusion-pytorch`.

Importing touches no device, compiles nothing and prints nothing; the compiled extension is loaded by the first op that
can use it, and the trainer's libraries by the first use of the trainer.
"""

from importlib import import_module
from warnings import warn as _warn

from ddpm_fast import noise
from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion, ModelPrediction
from ddpm_fast.diffusion.schedules import cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from ddpm_fast.models.derived_weights import inference_weights
from ddpm_fast.models.unet import Unet
from ddpm_fast.runtime.dispatch import explain, use_backend
from ddpm_fast.runtime.extension import empty_cache
from ddpm_fast.runtime.measured import use_form

__version__ = "0.1.0"

_LAZY = {
    "ContinuousTimeGaussianDiffusion": "ddpm_fast.diffusion.continuous_time",
    "ElucidatedDiffusion": "ddpm_fast.diffusion.elucidated_diffusion",
    "Guidance": "ddpm_fast.diffusion.guidance",
    "LearnedGaussianDiffusion": "ddpm_fast.diffusion.learned_gaussian_diffusion",
    "RectifiedFlow": "ddpm_fast.diffusion.rectified_flow",
    "VParamContinuousTimeGaussianDiffusion": "ddpm_fast.diffusion.continuous_time",
    "WeightedObjectiveGaussianDiffusion": "ddpm_fast.diffusion.weighted_objective",
    "XMWrapper": "ddpm_fast.diffusion.xm",
    "accelerate": "ddpm_fast.integrations.accelerate",
    "from_openai_options": "ddpm_fast.diffusion.openai",
    "from_diffusers": "ddpm_fast.integrations.diffusers_folders",
    "to_diffusers": "ddpm_fast.integrations.diffusers_folders",
    "Checkpoint": "ddpm_fast.training.checkpoint",
    "Dataset": "ddpm_fast.training.data",
    "PreparedDataset": "ddpm_fast.training.prepared",
    "Trainer": "ddpm_fast.training.trainer",
    "capture_training_step": "ddpm_fast.training.captured_step",
    "load_checkpoint": "ddpm_fast.training.checkpoint",
    "restore": "ddpm_fast.integrations.accelerate",
}

# Modules that need no import of their own: `ddpm_fast.optim.Adam`, as of torch.
_MODULES = ("classifier_free_guidance", "optim")

_OTHER_NETWORK = "its fast networks are 2D with time alone"
# Names of upstream that are not here, and why.
_OF_UPSTREAM = {
    **dict.fromkeys(("Unet1D", "KarrasUnet", "KarrasUnet1D", "KarrasUnet3D"), _OTHER_NETWORK),
    "GaussianDiffusion1D": "its processes are of images",
    **dict.fromkeys(("Dataset1D", "Trainer1D", "InvSqrtDecayLRSched"), "its training is Trainer's"),
}


__all__ = [
    "GaussianDiffusion",
    "ModelPrediction",
    "Unet",
    "__version__",
    "cosine_beta_schedule",
    "empty_cache",
    "explain",
    "inference_weights",
    "linear_beta_schedule",
    "noise",
    "sigmoid_beta_schedule",
    "use_backend",
    "use_form",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "frozen_weights":  # the old name, for one release
        _warn("frozen_weights is now inference_weights", FutureWarning, stacklevel=2)
        globals()[name] = inference_weights  # one warning per process
        return inference_weights
    if name in _OF_UPSTREAM:  # an AttributeError would lose its text in `from ddpm_fast import NAME`
        raise ImportError(
            f"{__name__} has no {name}: {_OF_UPSTREAM[name]}; use `from denoising_diffusion_pytorch import {name}`"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
