"""What a process says of images besides making them: the variational bound, and images sent step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ddpm_fast.diffusion.images import identity, normalize_to_neg_one_to_one
from ddpm_fast.diffusion.registry import has_own
from ddpm_fast.diffusion.sampled_process import SampledProcess
from ddpm_fast.runtime.plain import as_flag, as_int

if TYPE_CHECKING:
    from ddpm_fast.diffusion.likelihood import BitsPerDim, LikelihoodRun, ProgressiveCoding
    from ddpm_fast.diffusion.likelihood_chain import Chain

# Methods that say how x0 is estimated, and the mean and the variance of a step.
_PREDICTING_METHODS = (
    "model_predictions",
    "p_mean_variance",
    "q_posterior",
    "predict_start_from_noise",
    "predict_start_from_v",
    "preconditioned_network_forward",
)


class MeasuredProcess(SampledProcess):
    """A process whose bound on the probability of images is known."""

    def bits_per_dim(
        self,
        images: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        timesteps: int | Sequence[float] | None = None,
        variance: str | None = None,
        clip_x_start: bool | None = None,
        start_index: int = 0,
        graph: bool | None = None,
        classes: torch.Tensor | Sequence[int] | None = None,
        cond: torch.Tensor | None = None,
        cond_image: torch.Tensor | None = None,
    ) -> BitsPerDim:
        """The variational bound on −log₂ of images' probability, in bits per dimension (Ho et al. 2020, eq. 5 and 13).

        Args:
            images: (N, C, H, W) uint8, or floats in [0, 1] ([−1, 1] without `auto_normalize`), which are rounded to
                8 bits. They may be on another device.
            seed: of the noise, one draw per image and level; None draws it from torch's generator.
            batch_size: images at once, 64 if None; does not change the result.
            progress: show a progress bar.
            timesteps: the chain: how many, or which. None: all T, or 1,000 in continuous time. Each chain has a bound
                of its own, that of the images which it samples.
            variance: of p(x_{t−1} | x_t): "small" is the posterior's, "large" is β, "learned" is the network's; None
                is "learned" where the network gives it, else "small".
            clip_x_start: clip estimates of x0 to [−1, 1]; None is the attribute.
            start_index: index of the first image, for the noise, as in `sample`.
            graph: False never records a step; None does so where it can.
            classes, cond, cond_image: the conditions of the images, on the process's device: the bound is that of their
                probability given these.

        Returns:
            `BitsPerDim`: the terms of every image.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        from ddpm_fast.diffusion import likelihood

        self._check_measured(images)
        run = likelihood.LikelihoodRun(self._seed(seed), start_index, progress=progress)
        run.batch_size = likelihood.BATCH_SIZE if batch_size is None else as_int("batch_size", batch_size, 1)
        run.told = self._conditions(len(images), classes, cond, cond_image).arguments(self.network)
        chain = self._chain(timesteps, variance)
        return likelihood.bits_per_dim(*self._bound_arguments(images, chain, run, clip_x_start, graph))

    def progressive_coding(
        self,
        images: torch.Tensor,
        num_columns: int = 10,
        *,
        seed: int | torch.Tensor | None = None,
        progress: bool = True,
        timesteps: int | Sequence[float] | None = None,
        variance: str | None = None,
        clip_x_start: bool | None = None,
        start_index: int = 0,
        graph: bool | None = None,
        classes: torch.Tensor | Sequence[int] | None = None,
        cond: torch.Tensor | None = None,
        cond_image: torch.Tensor | None = None,
    ) -> ProgressiveCoding:
        """Images sent step by step: what is received, x0 as estimated from it, its rate and its distortion.

        Args:
            images: a few, as `bits_per_dim` takes them.
            num_columns: K, evenly spaced along the chain, the most and the least noise among them.
            others: as in `bits_per_dim`.

        Returns:
            `ProgressiveCoding`: times, noised, estimates, rate, distortion.
        """
        from ddpm_fast.diffusion import likelihood

        self._check_measured(images)
        num_columns = as_int("num_columns", num_columns, 1)
        chain = self._chain(timesteps, variance)
        run = likelihood.LikelihoodRun(self._seed(seed), start_index, max(1, len(images)), progress=progress)
        run.told = self._conditions(len(images), classes, cond, cond_image).arguments(self.network)
        arguments = self._bound_arguments(images, chain, run, clip_x_start, graph)
        coding = likelihood.progressive_coding(*arguments, num_columns=num_columns)
        with torch.inference_mode():
            noised, estimates = (self.unnormalize(shown) for shown in (coding.noised, coding.estimates))
        return coding._replace(noised=noised.clone(), estimates=estimates.clone())

    def _check_measured(self, images: torch.Tensor) -> None:
        """Raise unless these are images of the process, on any device."""
        is_batch = isinstance(images, torch.Tensor) and images.ndim > 0
        self._check_images("images", images[:1].to(self.device) if is_batch else images, bytes_too=True)

    def _chain(self, timesteps: int | Sequence[float] | None, variance: str | None) -> Chain:
        from ddpm_fast.diffusion import likelihood

        own = "learned" if self.learned_variance else "small"
        variance = own if variance is None else variance
        if (
            not isinstance(variance, str)
            or variance not in likelihood.VARIANCES
            or (variance == "learned" and not self.learned_variance)
        ):
            allowed = likelihood.VARIANCES if self.learned_variance else likelihood.VARIANCES[:2]
            raise ValueError(f"variance must be one of {', '.join(allowed)} for this process, got {variance!r}")
        times = likelihood.chain_times(self.noise_scale, timesteps)
        return likelihood.make_chain(self.noise_scale, self.target, times, variance)

    def _bound_arguments(
        self, images: torch.Tensor, chain: Chain, run: LikelihoodRun, clip_x_start: bool | None, graph: bool | None
    ) -> tuple[Any, torch.Tensor, Chain, Callable[[torch.Tensor], torch.Tensor], LikelihoodRun]:
        """Arguments of the functions in `likelihood`, checked."""
        from ddpm_fast.diffusion import likelihood

        if graph not in (None, False):
            raise ValueError(f"graph must be None or False for a bound, got {graph!r}")
        own = [name for name in _PREDICTING_METHODS if hasattr(type(self), name) and has_own(self, name)]
        if own:
            raise ValueError(f"{type(self).__name__} has its own {', '.join(own)}, which the bound would leave out")
        if self.normalize not in (normalize_to_neg_one_to_one, identity):
            raise ValueError("normalize must be this package's, which gives 256 values in [−1, 1], for a bound")
        as_bytes = likelihood.as_bytes(images, is_signed=self.normalize is identity)
        run.self_condition = self.self_condition
        run.clip_x_start = as_flag("clip_x_start", self.clip_x_start if clip_x_start is None else clip_x_start)
        run.cache = None if graph is False or torch.compiler.is_compiling() else self.graphs
        return self._sampled_network(), as_bytes, chain, normalize_to_neg_one_to_one, run
