"""A fast drop-in backend for `denoising-diffusion-pytorch`.

Importing touches no device, compiles nothing and prints nothing; the compiled extension is loaded by the first op that
can use it, and the trainer's libraries by the first use of the trainer.
"""

from importlib import import_module

from ddpm_fast import noise
from ddpm_fast._extension import empty_cache
from ddpm_fast._version import __version__
from ddpm_fast.dispatch import explain, use_backend
from ddpm_fast.frozen import frozen_weights
from ddpm_fast.gaussian_diffusion import GaussianDiffusion, ModelPrediction
from ddpm_fast.schedules import cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from ddpm_fast.unet import Unet

_LAZY = {
    "Checkpoint": "ddpm_fast.checkpoint",
    "Dataset": "ddpm_fast.data",
    "Trainer": "ddpm_fast.trainer",
    "capture_training_step": "ddpm_fast.training_step",
    "load_checkpoint": "ddpm_fast.checkpoint",
}

__all__ = [
    "GaussianDiffusion",
    "ModelPrediction",
    "Unet",
    "__version__",
    "cosine_beta_schedule",
    "empty_cache",
    "explain",
    "frozen_weights",
    "linear_beta_schedule",
    "noise",
    "sigmoid_beta_schedule",
    "use_backend",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
