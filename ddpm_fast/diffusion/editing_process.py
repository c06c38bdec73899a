"""Sampling that starts from given images: between two, unknown pixels of one, and large images of small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.diffusion.sampled_process import SampledProcess, check_names
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling_run import SamplingRun
from ddpm_fast.ops.forward_diffusion.op import q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.runtime.plain import as_number

# Shares of interpolation: those outside of [0, 1] go on beyond an image.
_SHARES = (-1e6, 1e6)

# Steps of inpainting at most, where nobody says how many (Lugmayr et al. 2022, section 5.1).
_STEPS = 250


class EditingProcess(SampledProcess):
    """What a process does with given images besides training on them."""

    super_resolution: int | None
    noise_augmentation: float | None

    def interpolate(
        self,
        x1: torch.Tensor,
        x2: torch.Tensor,
        t: float | None = None,
        lam: float = 0.5,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """Images between x1 and x2: both are noised to t, mixed, and denoised from t on (Ho et al. 2020, section 4.2).

        Args:
            x1, x2: (B, C, H, W) images, in [0, 1] with `auto_normalize`.
            t: a time of the process; that of the most noise if None.
            lam: 0 gives x1's side, 1 gives x2's.
            seed, start_index, progress, graph, conditioning: as in `sample`.

        Returns:
            (B, C, H, W) images in the range of x1.
        """
        check_names(conditioning)
        self._check_images("x1", x1)
        self._check_images("x2", x2)
        if x1.shape != x2.shape:
            raise ValueError(f"x2 must have x1's shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        lam = as_number("lam", lam, *_SHARES)
        plan, given = self._conditioned(self._interpolation_plan(t), x1.shape[0], **conditioning)
        seed = self._seed(seed)
        noised = []
        for image, stream in (
            (x1, noise_function.STREAM_TRAINING),
            (x2, noise_function.STREAM_INTERPOLATE),
        ):
            noise = normal(image.shape, seed=seed, stream=stream, start_index=start_index, device=image.device)
            with torch.inference_mode():
                noised.append(self._noised_to(self.normalize(image.float()), t, noise))
        x = ((1 - lam) * noised[0] + lam * noised[1]).contiguous()
        run = SamplingRun(plan, seed, start_index, progress=progress, graph=graph, clip_x_start=self.clip_x_start)
        run.conditioning = given
        run.first_step, run.desc = self._interpolation_start(plan, t), "interpolation sample time step"
        x = self._denoise(x, run)
        with torch.inference_mode():
            result = self.unnormalize(self._clipped(x, run))
        return result.clone()

    def _interpolation_plan(self, t: float | None) -> SamplerTable:
        """Ancestral sampling from t on."""
        scale = self.noise_scale
        first = scale.first if t is None else as_number("t", t, *sorted((scale.first, scale.last)))
        times = scale.own_times(self.sampling_timesteps)
        later = times[times > first] if scale.last > scale.first else times[times < first]
        return self._make_plan("ddpm", self.sampling_timesteps, (first, *later.tolist()), {})

    def _interpolation_start(self, plan: SamplerTable, t: float | None) -> int:
        return 0

    def _noised_to(self, x_start: torch.Tensor, t: float | None, noise: torch.Tensor) -> torch.Tensor:
        """Normalised images at time t."""
        time = torch.full((), self.noise_scale.first if t is None else t, device=x_start.device)
        rows = self._rows(time.expand(x_start.shape[0]))
        return q_sample(x_start, rows.of_images, rows.forward_table, noise)

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
        from ddpm_fast.diffusion.inpainting import Resampling, as_mask

        check_names(conditioning)
        self._check_images("image", image, bytes_too=True)
        mask = as_mask(mask, image)
        resampling = Resampling(num_resamples, jump_length)
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
        from ddpm_fast.diffusion.inpainting import with_known

        return self._kept((plan, "known"), lambda: with_known(plan))

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
        from ddpm_fast.diffusion.super_resolution import sampling_condition

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
        condition: dict[str, Any] = sampling_condition(low, factor, level, seed, start_index)
        condition["cond_image"] = self.unnormalize(condition["cond_image"])  # `sample` takes images as training does
        return self.sample(batch_size=batch, seed=seed, start_index=start_index, **condition, **options)
