"""OptimizerStep does what torch's clipping and optimizer do, with their state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ddpm_fast.ops.adam_step.op import adam_step
from ddpm_fast.runtime import extension
from ddpm_fast.training import optimizer_step
from ddpm_fast.training.optimizer_step import OptimizerStep


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2))


def backward(model, i):
    generator = torch.Generator().manual_seed(i)
    model.zero_grad()
    model(torch.randn(2, 3, 4, 4, generator=generator)).square().sum().backward()


OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, 1e-2, betas=(0.9, 0.99)),
    "Adam with decay": lambda params: torch.optim.Adam(params, 1e-2, weight_decay=0.1),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, torch.tensor(1e-2), weight_decay=0.1, fused=True),
    "two groups": lambda params: torch.optim.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_torch_and_keeps_its_state(name):
    ours, theirs = network(), network()
    mine, torchs = (OPTIMIZERS[name](list(model.parameters())) for model in (ours, theirs))
    average = copy.deepcopy(theirs)
    averages = {p: p.detach().clone() for p in ours.parameters()}
    step, weight = OptimizerStep(mine), torch.tensor(0.25)
    for i in range(4):
        if i == 2:  # a checkpoint is read by the other
            states = mine.state_dict(), torchs.state_dict()
            mine.load_state_dict(copy.deepcopy(states[1]))
            torchs.load_state_dict(copy.deepcopy(states[0]))
        backward(ours, i)
        backward(theirs, i)
        norm, skipped = step(max_grad_norm=0.5, averages=averages, average_weight=weight)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        torchs.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), theirs.parameters(), strict=True):
                a.lerp_(p, 0.25)
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
        for p, q, a in zip(ours.parameters(), theirs.parameters(), average.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(averages[p], a.detach(), rtol=1e-5, atol=1e-6)
    for group, other in zip(mine.state_dict()["state"].values(), torchs.state_dict()["state"].values(), strict=True):
        assert group.keys() == other.keys() and group["step"] == other["step"] == 4
        torch.testing.assert_close(group["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_parameters_without_gradients_stay():
    model = network()
    frozen = model[2].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before = frozen.clone()
    backward(model, 0)
    OptimizerStep(optimizer)()
    assert torch.equal(frozen, before) and frozen not in optimizer.state and len(optimizer.state) == 5


def test_versions_count_up():
    """Autograd must notice that a weight was changed in place, whichever kernel wrote it."""
    model = network()
    backward(model, 0)
    versions = [p._version for p in model.parameters()]
    OptimizerStep(torch.optim.Adam(model.parameters()))()
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))


class Other(torch.optim.Adam):
    pass


def hooked(params):
    optimizer = torch.optim.Adam(params)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda params: torch.optim.SGD(params, 0.1), "the optimizer is a SGD"),
        (Other, "the optimizer is a Other"),
        (hooked, "hooks"),
        (lambda params: torch.optim.Adam(params, amsgrad=True), "amsgrad"),
        (lambda params: torch.optim.Adam(params, maximize=True), "maximize"),
    ],
)
def test_why_not(make, reason):
    model = network()
    optimizer = make(list(model.parameters()))
    assert OptimizerStep(optimizer).why_not() == "there is no gradient" or reason in OptimizerStep(optimizer).why_not()
    backward(model, 0)
    assert reason in OptimizerStep(optimizer).why_not()


def test_the_cpu_needs_the_extension(monkeypatch):
    model = network()
    backward(model, 0)
    step = OptimizerStep(torch.optim.Adam(model.parameters()))
    assert step.why_not() == extension.why_not(torch.device("cpu"))
    monkeypatch.setattr(extension, "why_not", lambda device: "there is none")
    assert step.why_not() == "there is none"


def test_tables_are_kept_between_calls(monkeypatch):
    """A recording reads them, so that they must not be of one call."""
    given = []
    monkeypatch.setattr(optimizer_step, "adam_step", lambda *a, tables, **k: given.append(tables) or adam_step(*a, **k))
    model = network()
    step = OptimizerStep(torch.optim.Adam(model.parameters()))
    for i in range(2):
        backward(model, i)
        step()
    assert given[0] is given[1] is not None
