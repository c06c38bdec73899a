"""Samples of a trainer's average: for the picture of a milestone, and for FID."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.diffusion.super_resolution import shrunk
from ddpm_fast.training.conditioning import plan_grid, spread
from ddpm_fast.training.images_out import save_image_grid
from ddpm_fast.training.items import Given, collate
from ddpm_fast.training.trained import factor_of, network_of


def draw(
    sampler: Any,
    dataset: Any,
    indices: Sequence[int],
    conditions: dict[str, torch.Tensor],
    device: torch.device,
    **options: Any,
) -> torch.Tensor:
    """Samples with these conditions; of super-resolution, those of these images at low resolution."""
    factor = factor_of(sampler)
    options |= {name: values.to(device) for name, values in conditions.items()} | {"progress": False}
    if factor is None:
        return sampler.sample(batch_size=len(indices), **options)
    images = as_floats(collate([dataset[index] for index in indices]))
    return sampler.upscale(shrunk(images, factor).to(device), **options)


def save_grid(
    path: Path,
    sampler: Any,
    dataset: Any,
    given: Given,
    device: torch.device,
    *,
    count: int,
    batch_size: int,
    seed: int,
) -> None:
    """A picture of `count` samples, from the same noise and conditions for a seed."""
    num_classes = getattr(network_of(sampler), "num_classes", None)
    grid = plan_grid(dataset, given, num_classes, count, of_images=factor_of(sampler) is not None)
    indices = spread(len(dataset), grid.size)
    images = []
    for start in range(0, grid.size, batch_size):
        part = slice(start, min(start + batch_size, grid.size))
        conditions = {name: values[part] for name, values in grid.conditions.items()}
        images.append(draw(sampler, dataset, indices[part], conditions, device, seed=seed, start_index=start))
    save_image_grid(torch.cat(images), path, nrow=grid.columns)
