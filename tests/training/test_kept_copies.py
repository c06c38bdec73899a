"""Copies of the weights for autocast that the optimizer's pass writes, on the CPU with stand-ins for CUDA's parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ema_pytorch import EMA

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.models import narrow_weights
from ddpm_fast.models.narrow_weights import KeptCopies
from ddpm_fast.runtime.recording import EagerRecorder
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training import captured_step, optimizer_step
from ddpm_fast.training.captured_step import TrainingStep
from ddpm_fast.training.optimizer_step import OptimizerStep


class Counted(KeptCopies):
    made = refreshed = 0

    def __init__(self, *args):
        super().__init__(*args)
        Counted.made += 1

    def refresh(self):
        super().refresh()
        Counted.refreshed += 1


@pytest.fixture
def kept(monkeypatch, without_native):
    """Counts passes over kept copies, in a network that copies weights at once and an optimizer that writes copies."""
    there = SimpleNamespace(why_not_triton=lambda device: None)
    for module in (narrow_weights, captured_step):
        monkeypatch.setattr(module, "triton_launch", there)
    monkeypatch.setattr(optimizer_step, "why_not_fused", lambda *tensors: None)
    Counted.made = Counted.refreshed = 0
    monkeypatch.setattr(captured_step, "KeptCopies", Counted)
    return Counted


def copied_run(recorder, keep_copies, change=None, accumulate=1, steps=4):
    """Losses and weights of a small Unet under autocast; `change` is called with step and diffusion after two steps."""
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4)
    diffusion = GaussianDiffusion(model, image_size=4, timesteps=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), torch.tensor(1e-2), fused=True, capturable=True)
    step = TrainingStep(
        diffusion, optimizer, (2, 3, 4, 4), recorder=recorder, autocast=torch.float16, keep_copies=keep_copies,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8), accumulate=accumulate,
        ema=EMA(diffusion, update_every=2, update_after_step=1),
    )  # fmt: skip
    losses = []
    for index in range(steps):
        torch.manual_seed(index)
        losses.append(step(*(torch.rand(2, 3, 4, 4) for _ in range(accumulate))))
        if change is not None and index == 1:
            change(step, diffusion)
    averages = [p.detach() for p in step.ema.ema_model.parameters()]
    return step, [torch.stack(losses), *(p.detach() for p in diffusion.parameters()), *averages]


def halve(step, diffusion):
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.mul_(0.5)


def halve_unseen(step, diffusion):
    for parameter in diffusion.parameters():
        parameter.data.mul_(0.5)
    step.renew_copies()


def replace(step, diffusion):
    conv = diffusion.model.final_conv
    conv.weight = torch.nn.Parameter(conv.weight.detach() * 2)
    step.optimizer.param_groups[0]["params"] = list(diffusion.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_copies_are_written_in_the_same_pass(kept, accumulate):
    """Kept or made by every call, recorded or not: the same bits; after the first copies none is made again."""
    step, expected = copied_run(EagerRecorder, False, accumulate=accumulate)
    assert kept.made == 0 and "not their copies for autocast: keep_copies=False" in step.explain_optimizer()
    for recorder in (EagerRecorder, FrozenRecorder):
        kept.made = kept.refreshed = 0
        step, found = copied_run(recorder, True, accumulate=accumulate)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert kept.made == 1 and kept.refreshed == 0
        assert step.explain_optimizer() == (
            "one pass clips gradients and moves weights, their average and their copies for autocast"
        )


@pytest.mark.parametrize("change", [halve, halve_unseen, replace])
def test_copies_follow_weights_that_change_between_steps(kept, change):
    _, expected = copied_run(EagerRecorder, False, change)
    step, found = copied_run(FrozenRecorder, True, change)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert kept.refreshed == (0 if change is replace else 1) and kept.made == (2 if change is replace else 1)


def test_copies_follow_an_optimizer_of_torch(kept, monkeypatch):
    monkeypatch.setattr(OptimizerStep, "_why_not", lambda step: "not asked")
    _, expected = copied_run(EagerRecorder, False)
    step, found = copied_run(FrozenRecorder, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and kept.refreshed > 4
    assert step.explain_optimizer() == "torch clips gradients and moves weights: not asked"
