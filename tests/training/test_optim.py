"""ddpm_fast.optim: torch's Adam and AdamW in one pass, and a first step that imports no more than it needs."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from forks import run_code
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from ddpm_fast import optim
from ddpm_fast.training import optimizer_step
from ddpm_fast.training.optimizer_step import OptimizerStep, is_adam


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 2))


def backward(model, i):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i))
    loss = model(x).square().sum()
    loss.backward()
    return loss


def pair(name, **options):
    ours, theirs = network(), network()
    return ours, theirs, getattr(optim, name)(ours.parameters(), 1e-2, **options), getattr(torch.optim, name)(
        theirs.parameters(), 1e-2, **options
    )  # fmt: skip


def assert_equal(ours, theirs):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_needs_no_import_of_its_own(tmp_path):
    source = "import ddpm_fast; print(ddpm_fast.optim.AdamW.__name__, ddpm_fast.classifier_free_guidance.Unet.__name__)"
    assert run_code(source, tmp_path).stdout.split() == ["AdamW", "Unet"]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "fused": True}, {"amsgrad": True}], ids=str)
def test_steps_and_states_are_those_of_torch(name, options):
    ours, theirs, mine, torchs = pair(name, **options)
    for i in range(4):
        if i == 2:  # each goes on from the other's state, the one of ours pickled
            states = pickle.loads(pickle.dumps(mine)).state_dict(), copy.deepcopy(torchs.state_dict())
            mine.load_state_dict(states[1])
            torchs.load_state_dict(states[0])
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            backward(model, i)
            assert optimizer.step() is None
        assert_equal(ours, theirs)
    assert mine._one_pass.last_reason == ("the optimizer has amsgrad=True" if "amsgrad" in options else None)
    assert is_adam(mine) and isinstance(mine, getattr(torch.optim, name))


def test_closures_hooks_and_schedules_are_called_once():
    ours, theirs, mine, torchs = pair("Adam")
    calls = []
    for model, optimizer in ((ours, mine), (theirs, torchs)):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append(optimizer))
        for i in range(3):

            def closure(model=model, optimizer=optimizer, i=i):
                optimizer.zero_grad()
                return backward(model, i)

            assert optimizer.step(closure) > 0
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
    assert_equal(ours, theirs)
    assert calls == [mine] * 3 + [torchs] * 3 and mine._one_pass.last_reason == "the optimizer has hooks on its step"


def test_tensors_that_hold_others_are_left_to_torch():
    """Such as DTensor, which FSDP makes of parameters: a kernel would count a step for each tensor inside."""
    weights = []
    for module in (optim, torch.optim):
        parameter = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
        optimizer = module.Adam([parameter], 1e-2)
        for _ in range(3):
            parameter.grad = TwoTensor(torch.ones(3), torch.ones(3))
            optimizer.step()
        weights.append(parameter)
    assert torch.equal(weights[0].a, weights[1].a) and torch.equal(weights[0].b, weights[1].b)
    parameter.grad = TwoTensor(torch.ones(3), torch.ones(3))
    assert "a parameter is a TwoTensor" in OptimizerStep(optimizer).why_not()


def test_a_rate_of_another_dtype_is_left_to_torch():
    ours, theirs, mine, torchs = pair("Adam")
    for model, optimizer in ((ours, mine), (theirs, torchs)):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25, dtype=torch.float16)
        backward(model, 0)
        optimizer.step()
    assert_equal(ours, theirs)
    assert mine._one_pass.last_reason == "the optimizer's learning rate is a tensor of torch.float16"


def test_a_scale_in_the_optimizer_is_left_to_torch():
    """GradScaler hands a fused optimizer its scale, to divide by in the step."""
    ours, theirs, mine, torchs = pair("Adam", fused=True)
    for model, optimizer in ((ours, mine), (theirs, torchs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_equal(ours, theirs)


def test_groups_are_added_as_in_torch():
    model = network()
    optimizer = optim.Adam([{"params": model[0].parameters()}], 1e-2)
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.1]
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": model[0].parameters()})


def test_a_subclass_steps_by_its_own_code():
    class Own(optim.Adam):
        pass

    assert not is_adam(Own(network().parameters()))


def test_methods_are_torchs_own_where_it_compiles(monkeypatch):
    called = []
    marked = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: called.append(self) or marked(self))
    method = optimizer_step._without_compiler("zero_grad")
    optimizer = optim.Adam(network().parameters())
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch._dynamo)
    method(optimizer)
    assert called == [optimizer]


RUN = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import ddpm_fast
from ddpm_fast import optim

def network():
    return ddpm_fast.GaussianDiffusion(ddpm_fast.Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=4)
"""
LOOP = """
diffusion = network()
optimizer = optim.Adam(diffusion.parameters())
for _ in range(2):
    diffusion(torch.rand(2, 3, 8, 8)).backward()
    optimizer.step()
    optimizer.zero_grad()
for _ in range(2):
    diffusion.sample(batch_size=2)
"""
TRAINER = """
trainer = ddpm_fast.Trainer(
    network(), torch.rand(16, 3, 8, 8), train_batch_size=16, train_num_steps=3, results_folder='.',
    calculate_fid=False, num_workers=0, progress=False, num_samples=4, save_and_sample_every=3,
)
trainer.train()
"""


@pytest.mark.parametrize("work", [LOOP, TRAINER], ids=["a loop", "the trainer"])
def test_training_and_sampling_import_no_compiler(tmp_path, work):
    """Each of these takes 0.1 to 1.2 s to import, and the CPU needs none of them."""
    if work is TRAINER:
        pytest.importorskip("accelerate")
    check = """
heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton"}
print(sorted(heavy & set(sys.modules)))
"""
    ran = run_code(RUN + work + check, tmp_path, OMP_NUM_THREADS="1", MPLBACKEND="agg")
    assert ran.stdout.splitlines()[-1] == "[]"
