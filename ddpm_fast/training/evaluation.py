"""Fréchet inception distance (Heusel et al. 2017) between the training images and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.runtime.extras import MissingExtraError, needed_for
from ddpm_fast.training.atomic_files import write_atomically

with needed_for("FID"):
    import numpy as np
    from tqdm.auto import tqdm


class FIDUnavailableError(ValueError):
    """pytorch_fid or its network weights are missing, or it does not take images of this kind."""


class FIDEvaluation:
    """FID of `sampler` against the images of `dl`, upstream's class and arguments.

    dl: iterable of image batches (B, C, h, w), floats in [0, 1] or uint8, read once; the statistics stay in
    stats_dir/dataset_stats.npz.
    draw: the samples from number `start` up to `end`; by default `sampler.sample` draws them.
    feature_extractor: maps float32 (B, 3, h, w) in [0, 1] to features (B, D); by default pytorch_fid's InceptionV3,
    which raises FIDUnavailableError where the package or its weights are missing, or where C is not 1 or 3.
    """

    def __init__(
        self,
        batch_size: int,
        dl: Iterable[torch.Tensor],
        sampler: Any,
        channels: int = 3,
        accelerator: Any = None,
        stats_dir: str | Path = "./results",
        device: torch.device | str = "cuda",
        num_fid_samples: int = 50000,
        inception_block_idx: int = 2048,
        feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None = None,
        draw: Callable[[int, int], torch.Tensor] | None = None,
    ):
        if feature_extractor is None and channels not in (1, 3):
            raise FIDUnavailableError(f"InceptionV3 takes grey or RGB images, and these have {channels} channels")
        self.batch_size = batch_size
        self.n_samples = num_fid_samples
        self.device = device
        self.channels = channels
        self.dl = dl
        self.sampler = sampler
        self.draw = draw
        self.stats_path = Path(stats_dir) / "dataset_stats.npz"
        self.print_fn = print if accelerator is None else accelerator.print
        self.feature_extractor = feature_extractor or load_inception(inception_block_idx, device)
        self._dataset_statistics: tuple[np.ndarray, np.ndarray] | None = None

    @torch.inference_mode()
    def fid_score(self) -> float:
        """Distance of `num_fid_samples` samples to the data, a float."""
        if self._dataset_statistics is None:
            self._dataset_statistics = self._load_or_compute_statistics()
        self.sampler.eval()
        self.print_fn(f"computing features of {self.n_samples} samples")
        batches = map(self._draw, range(0, self.n_samples, self.batch_size))
        return frechet_distance(*mean_and_covariance(self._features(batches)), *self._dataset_statistics)

    def _draw(self, start: int) -> torch.Tensor:
        """A batch of samples (B, C, h, w) from number `start` on."""
        count = min(self.batch_size, self.n_samples - start)
        if self.draw is not None:
            return self.draw(start, start + count)
        return self.sampler.sample(batch_size=count, progress=False)

    def _load_or_compute_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D) of the data's features, from the file of an earlier run if there is one."""
        if self.stats_path.exists():
            with np.load(self.stats_path) as stored:
                return stored["m2"], stored["s2"]
        self.print_fn(f"computing features of up to {self.n_samples} images of the dataset")
        statistics = mean_and_covariance(self._features(self.dl))
        with write_atomically(self.stats_path) as file:
            # savez wants a seekable file; an open archive in memory is small next to the features.
            file.write(_as_npz(m2=statistics[0], s2=statistics[1]))
        return statistics

    def _features(self, batches: Iterable[torch.Tensor]) -> np.ndarray:
        """Features (N, D) in float64 of at most `num_fid_samples` images."""
        collected, count = [], 0
        for images in tqdm(batches, total=math.ceil(self.n_samples / self.batch_size), disable=None):
            images = as_floats(images[: self.n_samples - count].to(self.device))
            if self.channels == 1:
                images = images.expand(-1, 3, -1, -1)
            collected.append(self.feature_extractor(images).cpu().double())
            count += len(images)
            if count >= self.n_samples:
                break
        return torch.cat(collected).numpy()


def load_inception(inception_block_idx: int, device: torch.device | str) -> Callable[[torch.Tensor], torch.Tensor]:
    """pytorch_fid's InceptionV3 as a function to features (B, inception_block_idx)."""
    try:
        with needed_for("FID"):
            from pytorch_fid.inception import InceptionV3
    except MissingExtraError as error:
        raise FIDUnavailableError(str(error)) from error
    sizes = InceptionV3.BLOCK_INDEX_BY_DIM
    if inception_block_idx not in sizes:
        raise ValueError(f"inception_block_idx must be one of {', '.join(map(str, sizes))}; got {inception_block_idx}")
    try:
        network = InceptionV3([sizes[inception_block_idx]]).to(device).eval()
    except OSError as error:
        raise FIDUnavailableError(f"the weights of pytorch_fid could not be fetched ({error})") from error
    return lambda images: network(images)[0].mean(dim=(2, 3))


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), N at least 2."""
    if len(features) < 2:
        raise ValueError(f"FID needs at least 2 images on each side; got {len(features)}")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Squared Wasserstein-2 distance of two Gaussians: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    tr (Σ₁Σ₂)^½ is taken from the symmetric Σ₁^½ Σ₂ Σ₁^½, which has the same eigenvalues and stays real when singular.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance_1)
    root = vectors * np.sqrt(eigenvalues.clip(min=0)) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ covariance_2 @ root).clip(min=0)
    difference = np.asarray(mean_1) - np.asarray(mean_2)
    trace = np.trace(covariance_1) + np.trace(covariance_2) - 2 * np.sqrt(overlap).sum()
    return float(difference @ difference + trace)


def _as_npz(**arrays: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
