"""Super-resolution: the condition of a process is its image at low resolution, with noise (Ho et al. 2021, CDM).

Training makes the condition from the image itself: the mean over squares of `factor` pixels, then
z_s = √(1 − s²)·z + s·ε, the conditioning augmentation of section 4.2 at a level s that is drawn evenly from
[0, noise_augmentation], then bicubic enlargement to the image's size (Saharia et al. 2021, SR3, section 2). The network
gets z_s as `cond_image` and s as `cond`, so that sampling may choose s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.noise import STREAM_AUGMENTATION
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.runtime.plain import as_int, as_number

# The largest level of training where none is asked for; 1 would be noise alone.
LARGEST_LEVEL = 0.5

# Steps of the noise function's stream: what is drawn under one seed.
_OF_PIXELS, _OF_LEVELS = 0, 1


def unet_arguments(channels: int = 3, **others: Any) -> dict[str, Any]:
    """Arguments of a `Unet` that fit a process with super_resolution=factor.

    Args:
        channels: of the images.
        others: further arguments of the `Unet`. Without `num_classes` no condition is left out in training, since
            there is nothing to guide by.

    Returns:
        `channels`, `cond_channels`, `cond_dim` and perhaps `cond_drop_prob` beside `others`.
    """
    drop = {} if others.get("num_classes") else {"cond_drop_prob": 0.0}
    return {"channels": channels, "cond_channels": channels, "cond_dim": 1, **drop, **others}


def super_resolution_options(factor: Any, noise_augmentation: Any, image_size: Sequence[int]) -> tuple[int, float]:
    """`super_resolution` and `noise_augmentation` of a process as plain numbers.

    Raises:
        TypeError, ValueError: they do not fit each other or the image size, named in one sentence.
    """
    if factor is None:
        raise TypeError("noise_augmentation must be None where super_resolution is")
    factor = as_int("super_resolution", factor, 1)
    if factor == 1 or any(size % factor for size in image_size):
        raise ValueError(f"super_resolution must be at least 2 and divide image_size {tuple(image_size)}, got {factor}")
    level = LARGEST_LEVEL if noise_augmentation is None else as_number("noise_augmentation", noise_augmentation, 0, 1)
    return factor, float(level)


def check_network(network: Any, channels: int) -> None:
    """Raise ValueError unless the network takes the condition."""
    got = (getattr(network, "cond_channels", 0), getattr(network, "cond_dim", None))
    if got != (channels, 1):
        raise ValueError(
            f"model must have cond_channels={channels} and cond_dim=1 for super_resolution, as "
            f"Unet(..., **super_resolution.unet_arguments({channels})) has, got {got[0]} and {got[1]}"
        )


def shrunk(images: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, H, W) → (B, C, H/factor, W/factor), the mean over squares."""
    return F.avg_pool2d(images, factor)


def enlarged(low: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, h, w) → (B, C, h·factor, w·factor) by bicubic interpolation."""
    return F.interpolate(low, scale_factor=factor, mode="bicubic", align_corners=False)


def augmented(low: torch.Tensor, levels: torch.Tensor, seed: torch.Tensor, start_index: int = 0) -> torch.Tensor:
    """√(1 − s²)·low + s·ε (Ho et al. 2021, CDM, section 4.2).

    Args:
        low: (B, C, h, w), in [−1, 1].
        levels: (B,) s, in [0, 1].
    """
    options: dict[str, Any] = {"seed": seed, "start_index": start_index, "device": low.device}
    noise = normal(low.shape, stream=STREAM_AUGMENTATION, step=_OF_PIXELS, **options)
    s = levels[:, None, None, None]
    return (1 - s**2).sqrt() * low + s * noise


def random_levels(batch_size: int, largest: float, seed: torch.Tensor) -> torch.Tensor:
    """(B,) float32 evenly in [0, largest], from the noise function: Φ of a normal number is uniform."""
    numbers = normal((batch_size, 1), seed=seed, stream=STREAM_AUGMENTATION, step=_OF_LEVELS, device=seed.device)
    return largest * torch.special.ndtr(numbers[:, 0])


@torch.no_grad()
def training_condition(
    images: torch.Tensor, factor: int, largest_level: float, seed: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The condition of a training step; nothing waits for the host.

    Args:
        images: (B, C, H, W), in [−1, 1].

    Returns:
        `cond_image` (B, C, H, W) and `cond` (B, 1).
    """
    levels = random_levels(images.shape[0], largest_level, seed)
    low = augmented(shrunk(images.float(), factor), levels, seed)
    return {"cond_image": enlarged(low, factor), "cond": levels[:, None]}


@torch.no_grad()
def sampling_condition(
    low: torch.Tensor, factor: int, level: float, seed: torch.Tensor, start_index: int = 0
) -> dict[str, torch.Tensor]:
    """The condition of a sampling run; the noise of an image depends on the seed and its index alone.

    Args:
        low: (B, C, h, w), in [−1, 1].
        level: s of all images.

    Returns:
        `cond_image` (B, C, h·factor, w·factor) and `cond` (B, 1).
    """
    levels = torch.full((low.shape[0],), level, dtype=torch.float32, device=low.device)
    noised = augmented(low.float(), levels, seed, start_index) if level else low.float()
    return {"cond_image": enlarged(noised, factor), "cond": levels[:, None]}
