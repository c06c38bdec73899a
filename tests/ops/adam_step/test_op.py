"""adam_step's reference against torch.optim, and its checks."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.adam_step.op import AdamSettings, adam_step, why_not_fused
from ddpm_fast.testing.adam_cases import CASES, Model, assert_same_as_torch


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    assert_same_as_torch("cpu", **CASES[case])


def test_float64():
    model = Model("cpu", dtype=torch.float64)
    before = [p.clone() for p in model.params]
    adam_step(*model.lists, [AdamSettings(len(before), 1e-2)])
    for p, old in zip(model.params, before, strict=True):
        assert p.dtype is torch.float64 and (p.numel() == 0 or not torch.equal(p, old))


def test_a_first_step_moves_by_the_learning_rate():
    """Adam's first step is lr·sign(g), whatever the gradient's size."""
    p, g = torch.zeros(3), torch.tensor([1e-3, -5.0, 2.0])
    norm, skipped = adam_step([p], [g], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())], [AdamSettings(1, 0.1)])
    torch.testing.assert_close(p, torch.tensor([-0.1, 0.1, -0.1]), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm, g.norm())
    assert skipped == 0


def test_why_not_fused():
    model = Model("cpu")
    assert "CUDA" in why_not_fused(model.params, model.steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None)
        assert why_not_fused(model.params, model.steps) is None
        assert "float64" in why_not_fused([p.double() for p in model.params], model.steps)
        assert "gaps" in why_not_fused([torch.zeros(4, 4)[:, :2]], model.steps[:1])
        assert "count" in why_not_fused(model.params, [step.double() for step in model.steps])
        assert "half" in why_not_fused(model.params, model.steps, copies=model.params)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(params=[]), "params must not be empty"),
        (dict(grads=lambda m: m.grads[:-1]), "grads must be 6"),
        (dict(grads=lambda m: [g.half() for g in m.grads]), "grads must be torch.float32"),
        (dict(exp_avgs=lambda m: [e.flatten() for e in m.exp_avgs]), "exp_avgs must be"),
        (dict(steps=lambda m: m.steps[1:]), "steps must be"),
        (dict(settings=[AdamSettings(2, 0.1)]), "settings must be of 6 parameters"),
        (dict(copies=lambda m: m.params[1:]), "copies must be"),
        (dict(average_weight=torch.zeros(2)), "average_weight must be one element"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    model = Model("cpu")
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
    given = dict(zip(names, model.lists, strict=True)) | {"settings": [AdamSettings(len(model.params), 0.1)]}
    given |= {name: value(model) if callable(value) else value for name, value in change.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        adam_step(**given)
