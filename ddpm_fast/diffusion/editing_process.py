"""Sampling that starts from given images: unknown pixels of an image, and large images of small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddpm_fast.diffusion import inpainting, super_resolution
from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.diffusion.sampled_process import SampledProcess, check_names
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.runtime.plain import as_number

# Steps of inpainting at most, where nobody says how many (Lugmayr et al. 2022, section 5.1).
_STEPS = 250


class EditingProcess(SampledProcess):
    """What a process does with given images besides training on them."""

    super_resolution: int | None
    noise_augmentation: float | None

    def inpaint(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        *,
        num_resamples: int = 10,
        jump_length: int = 10,
        sampler: str = "ddpm",
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        clip_x_start: bool | None = None,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """Images whose known pixels are those of `image`, by RePaint (Lugmayr et al. 2022).

        The walk jumps back again and again, so that the unknown pixels come to fit the known ones; each stretch of
        `jump_length` steps is taken `num_resamples` times.

        Args:
            image: (B, C, H, W), as training takes images; what is unknown in it is not read, but must be finite.
            mask: (B or 1, C or 1, H, W) bool or floating point, 1 where the pixel is known. Values between blend.
            num_resamples, jump_length: how often, and by how many steps it jumps; num_resamples=1 does not.
            sampler: one whose steps read their own x0 alone: ddpm, ddim, euler, euler_ancestral.
            sampling_timesteps: steps without those that are repeated; None is the attribute, and 250 at most.
            others: as in `sample`.

        Returns:
            (B, C, H, W) float32 images in the range of `image`; where the mask is 1 they are `image`, bit for bit.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        check_names(conditioning)
        self._check_images("image", image, bytes_too=True)
        mask = inpainting.as_mask(mask, image)
        resampling = inpainting.Resampling(num_resamples, jump_length)
        steps = min(self.sampling_timesteps, _STEPS) if sampling_timesteps is None else sampling_timesteps
        plan = self._inpainting_plan(self._plan(sampler, steps, spacing, sampler_options, resampling))
        image = as_floats(image).float().contiguous()
        run: dict[str, Any] = {"start_index": start_index, "progress": progress, "graph": graph, **conditioning}
        run |= {"known": self.normalize(image), "mask": mask, "desc": "inpainting time step"}
        run["clip_x_start"] = self.clip_x_start if clip_x_start is None else clip_x_start
        images = self._sample(plan, image.shape, seed=seed, **run)
        return torch.where(mask == 1, image, images)  # normalising and back rounds

    def _inpainting_plan(self, plan: SamplerTable) -> SamplerTable:
        """The table with known pixels in it, kept as the tables of samplers are."""
        return self._kept((plan, "known"), lambda: inpainting.with_known(plan))

    def upscale(
        self,
        low: torch.Tensor,
        *,
        noise_augmentation: float = 0.0,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        **options: Any,
    ) -> torch.Tensor:
        """Images of which `low` are the small ones, for a process made with `super_resolution`.

        Args:
            low: (B, C, H/factor, W/factor), as training takes images.
            noise_augmentation: standard deviation of the noise that is put on `low`, up to the constructor's; 0.1 to
                0.3 hides the faults of images that another model made (Ho et al. 2021, CDM, section 4.2).
            seed, start_index: as in `sample`; they fix this noise, too.
            options: of `sample`, such as `classes` and `guidance`.

        Returns:
            (B, C, H, W) images in the range of `low`.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        factor, largest = self.super_resolution, self.noise_augmentation
        if factor is None or largest is None:
            raise ValueError("super_resolution must be given to the process for upscale, got None")
        level = as_number("noise_augmentation", noise_augmentation, 0, largest)
        self._check_images("low", low, sized=False, bytes_too=True)
        batch, *size = self._shape(len(low))
        made = next((name for name in ("batch_size", "cond", "cond_image") if name in options), None)
        if made is not None:
            raise TypeError(f"upscale has no argument {made!r}, which it makes of low and noise_augmentation")
        expected = (size[0], *(length // factor for length in size[1:]))
        if tuple(low.shape[1:]) != expected:
            raise ValueError(f"low must have shape (B, {', '.join(map(str, expected))}), got {tuple(low.shape)}")
        seed = self._seed(seed)
        low = self.normalize(as_floats(low))
        condition: dict[str, Any] = super_resolution.sampling_condition(low, factor, level, seed, start_index)
        condition["cond_image"] = self.unnormalize(condition["cond_image"])  # `sample` takes images as training does
        return self.sample(batch_size=batch, seed=seed, start_index=start_index, **condition, **options)
