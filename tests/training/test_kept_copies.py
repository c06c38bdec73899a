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


@pytest.fixture
def gradients(monkeypatch):
    """The dtypes of the gradients of each step that `adam_step` makes."""
    dtypes, real = [], optimizer_step.adam_step

    def watched(params, grads, *rest, **options):
        dtypes.append([grad.dtype for grad in grads])
        return real(params, grads, *rest, **options)

    monkeypatch.setattr(optimizer_step, "adam_step", watched)
    return dtypes


def copied_run(recorder, keep_copies, change=None, accumulate=1, steps=4, process=GaussianDiffusion):
    """Losses and weights of a small Unet under autocast; `change` is called with step and diffusion after two steps."""
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4)
    diffusion = process(model, image_size=4, timesteps=10)
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
    monkeypatch.setattr(OptimizerStep, "_why_not", lambda step, *gradients: "not asked")
    _, expected = copied_run(EagerRecorder, False)
    step, found = copied_run(FrozenRecorder, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and kept.refreshed > 4
    assert step.explain_optimizer() == "torch clips gradients and moves weights: not asked"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_copies_stay_in_the_half_type(kept, gradients, accumulate):
    """But where several batches add them up; nobody could see them in `.grad`, which is None after a step."""
    step, _ = copied_run(FrozenRecorder, True, accumulate=accumulate)
    halves = [types.count(torch.float16) for types in gradients]
    assert len(set(halves)) == 1 and (halves[0] > 30) == (accumulate == 1)
    assert all(p.grad is None for p in step.diffusion.parameters())


class ReadsTwice(GaussianDiffusion):
    """A process that calls its network twice, and reads a weight itself."""

    def forward(self, images, **options):
        twice = super().forward(images, **options) + super().forward(images, **options)
        return twice + self.model.final_conv.weight.square().sum()


def test_a_weight_that_is_read_twice_has_the_sum(kept, gradients):
    """One reader's gradient arrives in the half type, all others' in `.grad`."""
    _, expected = copied_run(EagerRecorder, False, process=ReadsTwice)
    gradients.clear()
    _, found = copied_run(EagerRecorder, True, process=ReadsTwice)
    assert gradients and all(set(types) == {torch.float32} for types in gradients)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_see_float32_gradients(kept, gradients, register):
    seen = []

    def watch(step, diffusion):
        getattr(diffusion.model.final_conv.weight, register)(lambda given: seen.append(given.dtype))

    copied_run(EagerRecorder, True, watch)
    assert seen == [torch.float32] * 2
    assert [torch.float16 in types for types in gradients] == [True, True, False, False]
