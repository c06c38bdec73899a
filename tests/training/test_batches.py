"""Batches as bytes, and their way to a CUDA device: on a stream that here is a stand-in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch

from ddpm_fast.training import batches
from ddpm_fast.training.batches import BatchOrder, BatchStream
from ddpm_fast.training.items import Unbound, collate, collate_items

INDEX = torch.arange(40, dtype=torch.uint8)


class Bytes(torch.utils.data.Dataset):
    """Image i has the byte i everywhere, but for its left column of zeros; it notes when it is read."""

    def __init__(self, dtype=torch.uint8):
        self.images = INDEX[:, None, None, None].repeat(1, 1, 2, 3).contiguous()
        self.images[:, :, :, 0] = 0
        self.images = self.images if dtype == torch.uint8 else self.images.to(dtype) / 255
        self.read: list[int] = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


def make_stream(dataset, device="cpu", **options) -> BatchStream:
    given = {"augment_horizontal_flip": True, "num_workers": 0, "as_bytes": True, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pinned memory needs a device
        return BatchStream(dataset, BatchOrder(40, 8, seed=3), device=torch.device(device), **given)


def expected(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices, flips = BatchOrder(40, 8, seed=3).batch_at(position)
    return Bytes().images[indices], flips


class TestCollate:
    def test_bytes_stay_bytes(self):
        batch = collate([torch.full((1, 2, 2), value, dtype=torch.uint8) for value in (3, 255)])
        assert batch.dtype == torch.uint8 and batch[:, 0, 0, 0].tolist() == [3, 255]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
    def test_floats_become_float32(self, dtype):
        batch = collate([torch.full((1, 2, 2), 0.5, dtype=dtype)] * 2)
        assert batch.dtype == torch.float32 and (batch == 0.5).all()

    def test_bytes_among_floats_are_divided_by_255(self):
        batch = collate([torch.full((1, 2, 2), 51, dtype=torch.uint8), torch.full((1, 2, 2), 0.25).double()])
        assert batch.dtype == torch.float32 and batch[:, 0, 0, 0].tolist() == [torch.tensor(51 / 255).item(), 0.25]

    def test_a_batch_that_is_whole_is_not_copied(self):
        whole = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        assert collate(Unbound(whole)) is whole
        with pytest.raises(ValueError, match=r"one shape; it gives \(1, 2, 2\) and \(1, 3, 2\)"):
            collate([torch.rand(1, 2, 2), torch.rand(1, 3, 2)])
        assert torch.equal(torch.utils.data.default_collate(Unbound(whole)), whole)


class Conditioned(Bytes):
    """With the class i % 7, the vector (i, -i), and the image itself as its condition."""

    def __getitem__(self, index):
        image = super().__getitem__(index)
        return {"image": image, "classes": index % 7, "cond": [index, -index], "cond_image": image}


class TestConditions:
    def test_they_are_those_of_their_images(self):
        stream = make_stream(Conditioned(), reads_ahead=True)
        for step in range(12):
            images, flips, conditions = stream.next_batch()
            indices = images[:, 0, 0, 1].long()
            assert torch.equal(images, expected(8 * step)[0]) and torch.equal(flips, expected(8 * step)[1])
            assert torch.equal(conditions["classes"], indices % 7) and conditions["classes"].dtype == torch.int64
            assert torch.equal(conditions["cond"], torch.stack((indices, -indices), 1).float())
            assert torch.equal(conditions["cond_image"], images)  # whoever mirrors the images mirrors it

    def test_floats_are_mirrored_with_their_images(self):
        stream = make_stream(Conditioned(), as_bytes=False)
        for step in range(4):
            images, flips = expected(8 * step)
            batch = stream.next_batch()
            assert batch.flips is None and torch.equal(batch.conditions["cond_image"], batch.images)
            assert (batch.images[:, 0, 0, 0] != 0).equal(flips & (images[:, 0, 0, 1] != 0))
            assert batch.options.keys() == {"classes", "cond", "cond_image"}

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_ranks_have_their_shares_and_any_position_can_be_sought(self, num_workers):
        def batches_of(rank, world_size, position):
            order = BatchOrder(40, 8, 3, rank, world_size)
            options = {"augment_horizontal_flip": True, "num_workers": num_workers, "as_bytes": True}
            stream = BatchStream(Conditioned(), order, device=torch.device("cpu"), **options)
            stream.seek(position, seed=3)
            return [stream.next_batch() for _ in range(3)]

        for together, *parts in zip(*(batches_of(*of, 16) for of in ((0, 1), (0, 2), (1, 2))), strict=True):
            for name, values in together.conditions.items():
                assert torch.equal(values, torch.cat([part.conditions[name] for part in parts])), name
        assert torch.equal(batches_of(0, 1, 24)[0].conditions["cond"], batches_of(0, 1, 16)[1].conditions["cond"])

    def test_a_class_beyond_the_network_s_is_named_with_its_image(self):
        stream = make_stream(Conditioned(), num_classes=6)
        with pytest.raises(
            ValueError, match=r"image (6|13|20|27|34) of the dataset has the class 6, and .* means 0 to 5"
        ):
            for _ in range(5):
                stream.next_batch()

    @pytest.mark.parametrize("reads_ahead", [True, False])
    def test_they_arrive_with_their_images(self, monkeypatch, reads_ahead):
        cuda = PretendedStreams(monkeypatch)
        stream = make_stream(Conditioned(), "cuda", reads_ahead=reads_ahead)
        for step in range(5):
            images, flips, conditions = stream.next_batch()
            assert torch.equal(images, expected(8 * step)[0])
            assert torch.equal(conditions["classes"], images[:, 0, 0, 1].long() % 7)
            for tensor in (images, flips, *conditions.values()):
                assert cuda.recorded[id(tensor)] == [cuda.default]

    def test_a_whole_batch_is_not_copied(self):
        whole, classes = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3)
        images, conditions = collate_items(Unbound(whole, {"classes": classes}))
        assert images is whole and conditions["classes"] is classes
        assert torch.equal(torch.utils.data.default_collate(Unbound(whole, {"classes": classes}))["classes"], classes)


class TestOnTheCpu:
    def test_bytes_and_flips_go_as_they_are(self):
        stream = make_stream(Bytes())
        for step in range(12):
            images, flips, _ = stream.next_batch()
            assert images.dtype == torch.uint8 and flips.dtype == torch.bool
            assert torch.equal(images, expected(8 * step)[0]) and torch.equal(flips, expected(8 * step)[1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_as_floats_they_are_mirrored_and_divided(self, dtype):
        stream = make_stream(Bytes(dtype), as_bytes=False)
        for step in range(6):
            images, flips = expected(8 * step)
            floats = torch.where(flips[:, None, None, None], images.flip(-1), images).float() / 255
            batch = stream.next_batch()
            assert torch.equal(batch.images, floats) and batch.flips is None and batch.options == {}

    def test_the_iterator_gives_floats(self):
        images, flips = expected(0)
        first = next(make_stream(Bytes()))
        assert torch.equal(first, torch.where(flips[:, None, None, None], images.flip(-1), images).float() / 255)

    def test_without_flips(self):
        batch = make_stream(Bytes(), augment_horizontal_flip=False).next_batch()
        assert batch.flips is None and torch.equal(batch.images, expected(0)[0])

    def test_nothing_is_read_ahead(self):
        dataset = Bytes()
        make_stream(dataset, reads_ahead=True).next_batch()
        assert len(dataset.read) == 8


class PretendedStreams:
    """CUDA's streams: work is put into a queue and runs when somebody waits for it, which orders the streams.

    A tensor that is on its way holds 255 until the copy has run. `memory` says for each tensor of the device which
    streams it was recorded for.
    """

    def __init__(self, patch):
        self.default, self.log = Queue("computing"), []
        self.current = self.default
        self.recorded: dict[int, list[Queue]] = {}
        self.kept: list[torch.Tensor] = []
        patch.setattr(torch.cuda, "Stream", lambda device: Queue("copying"))
        patch.setattr(torch.cuda, "stream", self._inside)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.recorded[id(tensor)].append(stream))
        patch.setattr(batches, "send", self._send)

    @contextlib.contextmanager
    def _inside(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def _send(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        there = torch.full_like(tensor, 255) if tensor.dtype == torch.uint8 else torch.zeros_like(tensor)
        self.recorded[id(there)] = []
        self.kept.append(there)
        self.log.append((self.current.name, tensor.dtype))
        self.current.work.append(lambda: there.copy_(tensor))
        return there


class Queue:
    def __init__(self, name: str):
        self.name = name
        self.work: list[Callable[[], object]] = []

    def wait_event(self, event: Event) -> None:
        """What this stream does next comes after the event: here at once."""
        while event.before:
            event.before.pop(0)()


class Event:
    def record(self, stream: Queue) -> None:
        self.before, stream.work = stream.work, []


class TestOnCuda:
    @pytest.mark.parametrize("reads_ahead", [True, False])
    def test_each_batch_arrives_before_it_is_read(self, monkeypatch, reads_ahead):
        cuda = PretendedStreams(monkeypatch)
        stream = make_stream(Bytes(), "cuda", reads_ahead=reads_ahead)
        for step in range(12):
            images, flips, _ = stream.next_batch()
            assert torch.equal(images, expected(8 * step)[0]) and torch.equal(flips, expected(8 * step)[1])
            assert cuda.recorded[id(images)] == cuda.recorded[id(flips)] == [cuda.default]
        assert {name for name, _ in cuda.log} == {"copying"}
        assert {dtype for _, dtype in cuda.log} == {torch.uint8, torch.bool}

    def test_without_the_wait_the_bytes_would_not_be_there(self, monkeypatch):
        PretendedStreams(monkeypatch)
        monkeypatch.setattr(Queue, "wait_event", lambda queue, event: None)
        assert not torch.equal(make_stream(Bytes(), "cuda").next_batch().images, expected(0)[0])

    def test_one_batch_is_on_its_way_ahead(self, monkeypatch):
        cuda = PretendedStreams(monkeypatch)
        dataset = Bytes()
        stream = make_stream(dataset, "cuda", reads_ahead=True)
        for step in range(1, 5):
            stream.next_batch()
            assert len(dataset.read) == 8 * (step + 1) and len(cuda.log) == 2 * (step + 1)
            assert stream.position == 8 * step

    def test_a_dataset_that_draws_is_read_at_its_own_step(self, monkeypatch):
        PretendedStreams(monkeypatch)
        dataset = Bytes()
        stream = make_stream(dataset, "cuda")
        stream.next_batch()
        assert len(dataset.read) == 8

    def test_seek_drops_what_is_on_its_way(self, monkeypatch):
        PretendedStreams(monkeypatch)
        stream = make_stream(Bytes(), "cuda", reads_ahead=True)
        for _ in range(3):
            stream.next_batch()
        stream.seek(8, seed=3)
        for position in (8, 16, 24):
            images, flips, _ = stream.next_batch()
            assert torch.equal(images, expected(position)[0]) and torch.equal(flips, expected(position)[1])

    def test_floats_are_mirrored_on_the_computing_stream(self, monkeypatch):
        PretendedStreams(monkeypatch)
        stream = make_stream(Bytes(), "cuda", reads_ahead=True, as_bytes=False)
        for step in range(4):
            images, flips = expected(8 * step)
            floats = torch.where(flips[:, None, None, None], images.flip(-1), images).float() / 255
            assert torch.equal(stream.next_batch().images, floats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_whole_on_a_device(num_workers):
    """Large batches, each summed while the next is copied and the memory of those before is given away."""
    images = torch.randint(0, 256, (96, 3, 256, 256), dtype=torch.uint8)
    order = BatchOrder(96, 32, seed=3)
    options = {"augment_horizontal_flip": True, "num_workers": num_workers, "as_bytes": True, "reads_ahead": True}
    stream = BatchStream(list(images), order, device=torch.device("cuda"), **options)
    busy = torch.rand(2048, 2048, device="cuda")
    sums, expected = [], []
    for step in range(24):
        batch = stream.next_batch()
        indices, flips = order.batch_at(32 * step)
        assert batch.images.is_cuda and batch.images.dtype == torch.uint8
        for _ in range(8):  # the batch is read long after the host has gone on
            busy = (busy @ busy).clamp(0, 1)
        sums.append(batch.images.sum((1, 2, 3)) + batch.flips.long())
        expected.append(images[indices].sum((1, 2, 3)) + flips.long())
        del batch
    assert torch.equal(torch.cat(sums).cpu(), torch.cat(expected))
