"""The images of a run: their order, a function of its seed, endless, sharded by rank and resumable; and their way.

On CUDA a batch travels in pinned memory on a stream of its own while the step before it runs.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from ddpm_fast.diffusion.images import as_floats
from ddpm_fast.training.items import Items, collate_items
from ddpm_fast.training.transfers import send


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


class Batch(NamedTuple):
    """What a step trains on.

    images: (B, C, h, w), uint8 or float32.
    flips: (B,) bool, the images that the diffusion is to mirror, with `cond_image`; None if they are mirrored already.
    conditions: by the names of a process's arguments.
    """

    images: torch.Tensor
    flips: torch.Tensor | None
    conditions: dict[str, torch.Tensor] = {}

    @property
    def options(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a process's `forward`, besides the images."""
        return self.conditions if self.flips is None else {"flip": self.flips, **self.conditions}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that there are."""
        return [self.images, *([] if self.flips is None else [self.flips]), *self.conditions.values()]

    def on(self, device: torch.device) -> Batch:
        """This batch on a device, without waiting for the device."""
        conditions = {name: send(values, device) for name, values in self.conditions.items()}
        return Batch(send(self.images, device), None if self.flips is None else send(self.flips, device), conditions)

    def mirrored(self) -> Batch:
        """With images and condition images as floats, and mirrored."""
        conditions = dict(self.conditions)
        if "cond_image" in conditions:
            conditions["cond_image"] = as_floats(conditions["cond_image"], self.flips)
        return Batch(as_floats(self.images, self.flips), None, conditions)


class BatchStream:
    """Endless batches on `device`, which it waits for never; as an iterator, float32 (B, C, h, w), mirrored at random.

    With `as_bytes`, `next_batch` leaves uint8 images as they are, and mirroring to the diffusion. `position` counts
    the images that all ranks have consumed; `seek` goes to any position.

    On CUDA batches are copied on a stream of their own. With `reads_ahead`, which needs worker processes or a dataset
    without randomness of its own, the copy of a batch begins while the step before it is still to come.

    num_classes: of the network; an image of another class ends the run with a ValueError that names it.
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
        num_classes: int | None = None,
    ):
        self.order = order
        self.num_classes = num_classes
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
            collate_fn=collate_items,
            worker_init_fn=ignore_interrupts,
        )
        self._batches: Iterator[Items] | None = None
        self._copies = CopyStream(device) if device.type == "cuda" else None
        self.reads_ahead = reads_ahead and self._copies is not None
        self._ahead: Copy | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> torch.Tensor:
        batch = self.next_batch()
        return as_floats(batch.images, batch.flips)

    def next_batch(self) -> Batch:
        """The batch at `position`."""
        if self._copies is None:
            batch = self._read(0).on(self.device)
        else:
            copy = self._ahead or self._copies.start(self._read(0))
            self._ahead = self._copies.start(self._read(1)) if self.reads_ahead else None
            batch = copy.result()
        self.position += self.order.global_batch_size
        return batch if self.as_bytes else batch.mirrored()

    def _read(self, ahead: int) -> Batch:
        """The batch at `position`, or as many further on, in memory of the host."""
        if self._batches is None:
            self._batches = iter(self._loader)
        images, conditions = next(self._batches)
        position = self.position + ahead * self.order.global_batch_size
        self._check_classes(conditions.get("classes"), position)
        flips = self._flip_order.batch_at(position)[1] if self.augment_horizontal_flip else None
        return Batch(images, flips, conditions)

    def _check_classes(self, classes: torch.Tensor | None, position: int) -> None:
        """Raise ValueError for a class that the network has not, before a device looks it up."""
        if classes is None or self.num_classes is None:
            return
        is_wrong = (classes < 0) | (classes >= self.num_classes)
        if is_wrong.any():
            which = int(is_wrong.nonzero()[0])
            index = int(self._flip_order.batch_at(position)[0][which])
            raise ValueError(
                f"image {index} of the dataset has the class {int(classes[which])}, and the network's "
                f"num_classes={self.num_classes} means 0 to {self.num_classes - 1}"
            )

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
        for tensor in self.batch.tensors:
            # Its memory is the copying stream's: it must not be given away while this stream reads it.
            tensor.record_stream(stream)
        return self.batch


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too, while the main process still wants its current batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
