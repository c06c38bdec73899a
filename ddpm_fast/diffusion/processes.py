"""Every process of this package, by its name."""

from ddpm_fast.diffusion import (
    classifier_free_diffusion,
    continuous_time,
    elucidated_diffusion,
    gaussian_diffusion,
    learned_gaussian_diffusion,
    rectified_flow,
    weighted_objective,
)
from ddpm_fast.diffusion.diffusion_process import PROCESSES

__all__ = ["PROCESSES"]

# Importing them registers them.
_MODULES = (
    gaussian_diffusion,
    learned_gaussian_diffusion,
    weighted_objective,
    classifier_free_diffusion,
    elucidated_diffusion,
    continuous_time,
    rectified_flow,
)
