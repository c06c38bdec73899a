"""Buffers of a network in recorded training steps: their numbers, and who writes them."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, Guidance, accelerate
from ddpm_fast.runtime import recording
from ddpm_fast.testing.foreign_packages import import_edm
from ddpm_fast.testing.recorders import FrozenRecorder, PretendedCuda, PretendedCudaRecorder
from ddpm_fast.training.captured_step import TrainingStep

edm = import_edm()
SHAPE = (2, 3, 8, 8)
RECORDERS = [FrozenRecorder]
RECORDERS += [recording.TapeRecorder] if recording.TapeRecorder.why_not(torch.device("cpu")) is None else []
BOTH = pytest.mark.parametrize("recorder", RECORDERS)

_numbers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Net(nn.Module):
    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x, t, x_self_cond=None):
        return self.conv(x) * self.factor


class ReadsOnce(Net):
    """A number of the buffer is part of the call, read once for each version, as EDM's blocks read their filters."""

    def forward(self, x, t, x_self_cond=None):
        known = _numbers.get(self)
        if known is None or known[0] != self.factor._version:
            known = _numbers[self] = (self.factor._version, self.factor.item())
        return self.conv(x) * known[1]


class Running(Net):
    """Writes its buffer in every call, and reads it."""

    def forward(self, x, t, x_self_cond=None):
        self.factor.lerp_(x.detach().square().mean(), 0.1)
        return self.conv(x) / self.factor


def song_unet():
    network = edm.SongUNet(
        img_resolution=8, in_channels=3, out_channels=3, model_channels=32, num_blocks=1, channel_mult=[1, 2],
        attn_resolutions=[4], dropout=0.0,
    )  # fmt: skip
    network.channels = network.out_dim = 3
    return accelerate(network)


def counting(recorder):
    """The recorder, which counts what it records."""

    class Counted(recorder):
        recordings = 0

        def record(self, body, reset):
            Counted.recordings += 1
            return super().record(body, reset)

    return Counted


def pair(network, recorder):
    """Steps of two equal processes, the first recorded and the second not, and their networks."""
    steps = []
    for kind in (recorder, recording.EagerRecorder):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(network(), image_size=8, timesteps=10)
        optimizer = torch.optim.Adam(diffusion.parameters(), torch.tensor(1e-2), fused=True, capturable=True)
        steps.append(TrainingStep(diffusion, optimizer, SHAPE, recorder=kind, any_module=True))
    return steps, [step.diffusion.model for step in steps]


def run(steps, index):
    losses = []
    for step in steps:
        torch.manual_seed(index)
        losses.append(step(torch.rand(SHAPE)))
    assert torch.equal(*losses), index
    states = [step.diffusion.state_dict() for step in steps]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), (index, name)


def filters(network):
    return [buffer for name, buffer in network.named_buffers() if "resample_filter" in name or name == "factor"]


@BOTH
@pytest.mark.parametrize("network", [ReadsOnce, song_unet])
def test_a_number_that_was_written_between_steps_is_read_again(network, recorder):
    counted = counting(recorder)
    steps, networks = pair(network, counted)
    for index in range(8):
        if index == 5:
            for each in networks:
                for buffer in filters(each):
                    buffer.mul_(1.5)
        run(steps, index)
    assert counted.recordings == 2 and len(steps[0]._recordings) == 1


@pytest.mark.parametrize("takes_part", ["the network", "the guide"])
def test_sampling_reads_a_number_that_was_written_again(takes_part):
    """Recordings are kept from one run to the next, as on CUDA."""
    torch.manual_seed(0)
    diffusion, guide = GaussianDiffusion(ReadsOnce(), image_size=8, timesteps=4), ReadsOnce()
    counted = counting(FrozenRecorder)
    diffusion.graphs = recording.GraphCache(recorder=counted)
    options = {"guidance": Guidance(scale=2.0, network=guide)} if takes_part == "the guide" else {}

    def sample(graph):
        return diffusion.sample(2, seed=1, graph=graph, progress=False, **options)

    for expected in (1, 1):
        assert torch.equal(sample(True), sample(False)) and counted.recordings == expected
    (guide if options else diffusion.model).factor.mul_(1.5)
    for expected in (2, 2):
        assert torch.equal(sample(True), sample(False)) and counted.recordings == expected


@BOTH
def test_a_buffer_that_steps_write_themselves_is_recorded_once(recorder):
    counted = counting(recorder)
    steps, networks = pair(Running, counted)
    for index in range(6):
        run(steps, index)
    assert counted.recordings == 1
    for each in networks:
        each.factor.fill_(2.0)
    for index in range(6, 9):
        run(steps, index)
    assert counted.recordings == 2


@BOTH
def test_a_buffer_that_is_written_between_all_steps_is_recorded_less_and_less_often(recorder):
    counted = counting(recorder)
    steps, networks = pair(ReadsOnce, counted)
    for index in range(40):
        for each in networks:
            each.factor.fill_(1 + index / 10)
        run(steps, index)
    assert counted.recordings <= 7
    for index in range(40, 75):  # and recorded again once nobody writes it
        run(steps, index)
    assert len(steps[0]._recordings) == 1


def test_a_capture_does_not_read_again_what_its_warm_ups_have_read(monkeypatch):
    """It would wait for the device. Nothing else has written the buffer since."""
    PretendedCuda((2, 13)).install(monkeypatch)
    steps, _ = pair(ReadsOnce, PretendedCudaRecorder)
    steps[0](torch.rand(SHAPE))
    assert len(steps[0]._recordings) == 1
