"""The order of a run's images, a function of its seed: endless, sharded by rank, and resumable at any position."""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from ddpm_fast.training.captured_step import send


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2⁶³) that is a hash of the parts: unlike sums, it does not repeat for neighbouring parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
