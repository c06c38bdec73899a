"""Conditions of a captured training step: static inputs of its recording, with the bits of a step without one."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import GaussianDiffusion, RectifiedFlow, Unet, XMWrapper
from ddpm_fast.runtime import recording
from ddpm_fast.testing.adam_cases import move_weights
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep

SHAPE = (3, 2, 4, 4)


def make(kind: str = "classes", process: str = "ddpm", **options):
    torch.manual_seed(1)
    conditions = {"classes": {"num_classes": 4}, "all": {"num_classes": 4, "cond_dim": 3, "cond_channels": 1}}[kind]
    network = Unet(
        8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, channels=2, cond_drop_prob=0.5, **conditions, **options
    )
    if process == "flow":
        return RectifiedFlow(network, image_size=4)
    return GaussianDiffusion(network, image_size=4, timesteps=20)


def batches(steps: int, kind: str) -> list[tuple]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(steps):
        conditions = {"classes": torch.randint(0, 5, (3,), generator=generator)}
        if kind == "all":
            conditions["cond"] = torch.randn(3, 3, generator=generator)
            conditions["cond_image"] = torch.rand(3, 1, 4, 4, generator=generator)
        images, flips = torch.rand(SHAPE, generator=generator), torch.rand(3, generator=generator) < 0.5
        found.append((images, flips, conditions))
    return found


def adam(diffusion):
    return torch.optim.Adam(diffusion.parameters(), torch.tensor(1e-2), fused=True, capturable=True)


@pytest.mark.parametrize("recorder", [recording.EagerRecorder, FrozenRecorder])
@pytest.mark.parametrize("process", ["ddpm", "flow", "candidates"])
@pytest.mark.parametrize("kind", ["classes", "all"])
def test_a_step_with_conditions_equals_the_plain_one(kind, process, recorder):
    plain, ours = make(kind, process), make(kind, process)
    if process == "candidates":
        plain, ours = XMWrapper(plain, candidates=2), XMWrapper(ours, candidates=2)
    optimizer = adam(plain)
    step = TrainingStep(ours, adam(ours), SHAPE, recorder=recorder, max_grad_norm=None)
    FrozenRecorder.recorded = 0
    for seed, (images, flips, conditions) in enumerate(batches(3, kind)):
        torch.manual_seed(seed)
        expected = plain(images, flip=flips, **conditions)
        expected.backward()
        move_weights(optimizer)
        optimizer.zero_grad()
        torch.manual_seed(seed)
        assert torch.equal(step((images, flips, conditions)), expected.detach())
        for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b), (seed, name)
    assert FrozenRecorder.recorded == (1 if recorder is FrozenRecorder else 0), "one recording of all classes"


def test_conditions_of_another_layout_are_recorded_anew():
    diffusion = make()
    step = TrainingStep(diffusion, adam(diffusion), SHAPE, recorder=FrozenRecorder)
    FrozenRecorder.recorded = 0
    keep = torch.tensor([True, False, True])
    for conditions in ({}, {"cond_keep_mask": keep}, {"cond_keep_mask": ~keep}, {}):
        step((torch.rand(SHAPE), None, {"classes": torch.tensor([0, 3, 1]), **conditions}))
    assert FrozenRecorder.recorded == 2


WRONG = {
    "conditions must be of classes, cond, cond_image, cond_keep_mask, got 'labels'": {"labels": torch.zeros(3)},
    "classes must be a tensor, got list": {"classes": [0, 1, 2]},
    r"classes must have one entry per image, 3, got shape \(2,\)": {"classes": torch.tensor([0, 1])},
    r"classes must be in \[0, 4\], 4 being no class, got values from 0 to 7": {"classes": torch.tensor([0, 7, 1])},
    "classes must be given, since the network, a Unet, takes classes; got None": {},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_conditions_of_a_step_are_named(message):
    diffusion = make()
    step = TrainingStep(diffusion, adam(diffusion), SHAPE, recorder=recording.EagerRecorder)
    with pytest.raises((TypeError, ValueError), match=message):
        step((torch.rand(SHAPE), None, WRONG[message]))


def test_a_wrong_class_leaves_the_weights_as_they_were():
    diffusion = make()
    step = TrainingStep(diffusion, adam(diffusion), SHAPE, recorder=FrozenRecorder)
    before = [p.detach().clone() for p in diffusion.parameters()]
    with pytest.raises(ValueError, match="classes must be in"):
        step((torch.rand(SHAPE), None, {"classes": torch.tensor([0, 9, 1])}))
    assert all(torch.equal(p, kept) for p, kept in zip(diffusion.parameters(), before, strict=True))
    step((torch.rand(SHAPE), None, {"classes": torch.tensor([0, 3, 1])}))
    assert not all(torch.equal(p, kept) for p, kept in zip(diffusion.parameters(), before, strict=True))
