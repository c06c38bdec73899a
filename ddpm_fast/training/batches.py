"""The order of a run's images, a function of its seed: endless, sharded by rank, and resumable at any position."""

from __future__ import annotations

import hashlib
import itertools
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ddpm_fast.training.captured_step import send

# Items of a user's dataset that are read ahead, and how far resizing and rounding may lead out of a range.
_CHECKED_IMAGES = 8
_OVERSHOOT = 0.05


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2⁶³) that is a hash of the parts: unlike sums, it does not repeat for neighbouring parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_images(dataset: Any, shape: tuple[int, ...], value_range: tuple[float, float] | None) -> None:
    """Read a few items of a dataset; each must be a float tensor of `shape` (C, h, w).

    Values plainly outside of `value_range` get one warning that names those found; None looks at the first item only.
    Raises ValueError or TypeError for a dataset without images or with other items.
    """
    if len(dataset) == 0:
        raise ValueError("folder is a dataset without images")
    count = 1 if value_range is None else min(_CHECKED_IMAGES, len(dataset))
    images = [dataset[index * (len(dataset) - 1) // max(count - 1, 1)] for index in range(count)]
    for which, image in zip(["first item", *["item"] * count], images, strict=False):
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"folder must give image tensors in [0, 1]; its {which} is a {type(image).__name__}")
        if not image.is_floating_point() or tuple(image.shape) != shape:
            raise ValueError(
                f"folder must give float images of shape {shape} in [0, 1]; its {which.removesuffix(' item')} is "
                f"{image.dtype} {tuple(image.shape)}"
            )
    if value_range is None:
        return
    least, largest = min(image.min().item() for image in images), max(image.max().item() for image in images)
    low, high = value_range
    if least < low - _OVERSHOOT or largest > high + _OVERSHOOT:
        warnings.warn(
            f"folder gives images with values from {least:.4g} to {largest:.4g}, and the diffusion expects them in "
            f"[{low}, {high}]: scale them in the dataset",
            stacklevel=3,
        )


def collate_float32(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (C, h, w) of any floating dtype as one batch (B, C, h, w) in float32."""
    return default_collate(images).to(torch.float32)


class BatchOrder(torch.utils.data.Sampler):
    """Endless batches of dataset indices: this rank's share of a shuffled order that all ranks agree on.

    The order is one permutation per epoch, each a function of (seed, epoch), strung together; batches run across the
    seams, so that all have one size. Global batch k holds positions [k·G, (k + 1)·G) and rank r its r-th part.
    """

    def __init__(self, dataset_size: int, global_batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.dataset_size = dataset_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.batch_size = global_batch_size // world_size
        self.start = 0
        self._epoch: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        for position in itertools.count(self.start, self.global_batch_size):
            yield self.batch_at(position)[0].tolist()

    def batch_at(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices int64 (B,) and flips bool (B,) of this rank in the global batch that begins at `position`."""
        first = position + self.rank * self.batch_size
        parts, end = [], first + self.batch_size
        while first < end:
            epoch, offset = divmod(first, self.dataset_size)
            count = min(end - first, self.dataset_size - offset)
            parts.append([values[offset : offset + count] for values in self._order_of(epoch)])
            first += count
        indices, flips = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(flips)

    def _order_of(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Permutation int64 (N,) and flips bool (N,) of an epoch; the last one asked for is kept."""
        if self._epoch != (self.seed, epoch):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            permutation = torch.randperm(self.dataset_size, generator=generator)
            flips = torch.rand(self.dataset_size, generator=generator) < 0.5
            self._epoch, self._order = (self.seed, epoch), (permutation, flips)
        return self._order


class BatchStream:
    """Endless iterator over float32 batches (B, C, h, w) on `device`, flipped at random there; it waits for no device.

    `position` counts the images that all ranks have consumed; `seek` goes to any position.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        order: BatchOrder,
        *,
        device: torch.device,
        augment_horizontal_flip: bool,
        num_workers: int,
    ):
        self.order = order
        self.device = device
        self.augment_horizontal_flip = augment_horizontal_flip
        self.position = 0
        self._flip_order = BatchOrder(order.dataset_size, order.global_batch_size, order.seed, order.rank)
        self._flip_order.batch_size = order.batch_size
        self._loader = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            # Its own generator: the loader draws a seed for its workers, and not from the global one.
            generator=torch.Generator().manual_seed(derive_seed(order.seed, "workers")),
            collate_fn=collate_float32,
            worker_init_fn=_ignore_interrupts,
        )
        self._batches: Iterator[torch.Tensor] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> torch.Tensor:
        if self._batches is None:
            self._batches = iter(self._loader)
        images = send(next(self._batches), self.device)
        if self.augment_horizontal_flip:
            flips = send(self._flip_order.batch_at(self.position)[1], self.device)
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        self.position += self.order.global_batch_size
        return images

    def seek(self, position: int, seed: int) -> None:
        """Go on from `position` in the order of `seed`."""
        self._batches = None
        self.position = self.order.start = position
        self.order.seed = self._flip_order.seed = seed


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too, while the main process still wants its current batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
