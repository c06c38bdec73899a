"""The images of a run: their order, a function of its seed, endless, sharded by rank and resumable; and their way.

On CUDA a batch travels in pinned memory on a stream of its own while the step before it runs.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, default_collate

from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.training.captured_step import send

# Items of a user's dataset that are read ahead, and how far resizing and rounding may lead out of a range.
_CHECKED_IMAGES = 8
_OVERSHOOT = 0.05


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2⁶³) that is a hash of the parts: unlike sums, it does not repeat for neighbouring parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_images(dataset: Any, shape: tuple[int, ...], value_range: tuple[float, float] | None) -> None:
    """Read a few items of a dataset; each must be a tensor of `shape` (C, h, w), floating point or uint8.

    Floats plainly outside of `value_range` get one warning that names those found; None looks at the first item only.
    Raises ValueError or TypeError for a dataset without images or with other items.
    """
    if len(dataset) == 0:
        raise ValueError("folder is a dataset without images")
    count = 1 if value_range is None else min(_CHECKED_IMAGES, len(dataset))
    images = [dataset[index * (len(dataset) - 1) // max(count - 1, 1)] for index in range(count)]
    for which, image in zip(["first item", *["item"] * count], images, strict=False):
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"folder must give image tensors; its {which} is a {type(image).__name__}")
        is_number = image.is_floating_point() or image.dtype == torch.uint8
        if not is_number or tuple(image.shape) != shape:
            raise ValueError(
                f"folder must give images of shape {shape}, floats in [0, 1] or uint8 in 0..255; its "
                f"{which.removesuffix(' item')} is {image.dtype} {tuple(image.shape)}"
            )
    images = [image for image in images if image.is_floating_point()]
    if value_range is None or not images:
        return
    least, largest = min(image.min().item() for image in images), max(image.max().item() for image in images)
    low, high = value_range
    if least < low - _OVERSHOOT or largest > high + _OVERSHOOT:
        warnings.warn(
            f"folder gives images with values from {least:.4g} to {largest:.4g}, and the diffusion expects them in "
            f"[{low}, {high}]: scale them in the dataset",
            stacklevel=3,
        )


class Unbound(list[torch.Tensor]):
    """The images of one tensor `batch` (B, C, h, w), which `collate` takes as it is."""

    def __init__(self, batch: torch.Tensor):
        super().__init__(batch.unbind())
        self.batch = batch


def collate(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (C, h, w) as one batch (B, C, h, w): uint8 if all are, else float32, to which bytes are 1/255."""
    if isinstance(images, Unbound):
        batch = images.batch
    elif len({image.dtype for image in images}) == 1:
        batch = default_collate(images)
    else:
        batch = default_collate([as_floats(image).float() for image in images])
    return batch if batch.dtype == torch.uint8 else batch.to(torch.float32)


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


class Batch(NamedTuple):
    """What a step trains on.

    images: (B, C, h, w), uint8 or float32.
    flips: (B,) bool, the images that the diffusion is to mirror; None if they are mirrored already.
    """

    images: torch.Tensor
    flips: torch.Tensor | None

    @property
    def options(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a process's `forward`, besides the images."""
        return {} if self.flips is None else {"flip": self.flips}

    def on(self, device: torch.device) -> Batch:
        """This batch on a device, without waiting for the device."""
        return Batch(send(self.images, device), None if self.flips is None else send(self.flips, device))


class BatchStream:
    """Endless batches on `device`, which it waits for never; as an iterator, float32 (B, C, h, w), mirrored at random.

    With `as_bytes`, `next_batch` leaves uint8 images as they are, and mirroring to the diffusion. `position` counts
    the images that all ranks have consumed; `seek` goes to any position.

    On CUDA batches are copied on a stream of their own. With `reads_ahead`, which needs worker processes or a dataset
    without randomness of its own, the copy of a batch begins while the step before it is still to come.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        order: BatchOrder,
        *,
        device: torch.device,
        augment_horizontal_flip: bool,
        num_workers: int,
        as_bytes: bool = False,
        reads_ahead: bool = False,
    ):
        self.order = order
        self.device = device
        self.augment_horizontal_flip = augment_horizontal_flip
        self.as_bytes = as_bytes
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
            collate_fn=collate,
            worker_init_fn=ignore_interrupts,
        )
        self._batches: Iterator[torch.Tensor] | None = None
        self._copies = CopyStream(device) if device.type == "cuda" else None
        self.reads_ahead = reads_ahead and self._copies is not None
        self._ahead: Copy | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> torch.Tensor:
        return as_floats(*self.next_batch())

    def next_batch(self) -> Batch:
        """The batch at `position`."""
        if self._copies is None:
            batch = self._read(0).on(self.device)
        else:
            copy = self._ahead or self._copies.start(self._read(0))
            self._ahead = self._copies.start(self._read(1)) if self.reads_ahead else None
            batch = copy.result()
        self.position += self.order.global_batch_size
        return batch if self.as_bytes else Batch(as_floats(batch.images, batch.flips), None)

    def _read(self, ahead: int) -> Batch:
        """The batch at `position`, or as many further on, in memory of the host."""
        if self._batches is None:
            self._batches = iter(self._loader)
        images = next(self._batches)
        if not self.augment_horizontal_flip:
            return Batch(images, None)
        return Batch(images, self._flip_order.batch_at(self.position + ahead * self.order.global_batch_size)[1])

    def seek(self, position: int, seed: int) -> None:
        """Go on from `position` in the order of `seed`."""
        self._batches = self._ahead = None
        self.position = self.order.start = position
        self.order.seed = self._flip_order.seed = seed


class CopyStream:
    """A CUDA stream that copies from pinned memory beside the stream that computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Copy:
        """Begin to copy a batch of the host; neither the host nor the computing stream waits."""
        with torch.cuda.stream(self._stream):
            # Torch keeps pinned memory until the copies that it knows of are done, so nobody has to hold it.
            copied = batch.on(self.device)
            done = torch.cuda.Event()
            done.record(self._stream)
        return Copy(copied, self.device, done)


class Copy(NamedTuple):
    """A batch on its way to the device."""

    batch: Batch
    device: torch.device
    done: torch.cuda.Event

    def result(self) -> Batch:
        """The batch, for the current stream, which waits for the copy; the host does not."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        for tensor in self.batch:
            if tensor is not None:
                # Its memory is the copying stream's: it must not be given away while this stream reads it.
                tensor.record_stream(stream)
        return self.batch


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too, while the main process still wants its current batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
