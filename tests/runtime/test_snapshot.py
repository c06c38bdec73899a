"""`Snapshot.holds`: every kind of change is seen, in C++ and in Python, and none where there is none."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.runtime import extension, snapshot
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.runtime.snapshot import Snapshot


@pytest.fixture(params=["native", "python"])
def taken(request, monkeypatch):
    """A model, an optimizer with state, and a function that takes their snapshot."""
    if request.param == "python":
        monkeypatch.setattr(snapshot.extension, "load", lambda: None)
    elif extension.load() is None:
        pytest.skip("there is no extension")
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3)
    diffusion(torch.rand(2, 3, 8, 8)).backward()
    optimizer.step()

    def take() -> Snapshot:
        own = vars(optimizer)
        dicts = [own, *(v for v in own.values() if isinstance(v, dict)), *optimizer.state.values()]
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        lists = [optimizer.param_groups, *(group["params"] for group in optimizer.param_groups)]
        return Snapshot(diffusion, [*dicts, *optimizer.param_groups], lists, tensors)

    return diffusion, optimizer, take


class OtherUnet(Unet):
    pass


CHANGES = {
    "eval": lambda d, o: d.eval(),
    "one module's mode": lambda d, o: d.model.mid_attn.eval(),
    "a setting": lambda d, o: setattr(d, "objective", "pred_x0"),
    "a new attribute": lambda d, o: setattr(d.model, "note", 1),
    "a deleted attribute": lambda d, o: delattr(d.model, "config"),
    "a module": lambda d, o: setattr(d.model.mid_block1, "dropout", nn.Identity()),
    "a parameter": lambda d, o: setattr(d.model.final_conv, "bias", nn.Parameter(torch.zeros(3))),
    "no parameter": lambda d, o: setattr(d.model.final_conv, "bias", None),
    "a buffer": lambda d, o: setattr(d, "betas", d.betas.clone()),
    "data": lambda d, o: setattr(d.model.final_conv.weight, "data", d.model.final_conv.weight.data.clone()),
    "strides": lambda d, o: setattr(d.model.init_conv.weight, "data", d.model.init_conv.weight.data.transpose(2, 3)),
    "dtype": lambda d, o: d.model.final_conv.double(),
    "requires_grad": lambda d, o: d.model.final_conv.weight.requires_grad_(False),
    "a forward hook": lambda d, o: d.model.final_conv.register_forward_hook(lambda *args: None),
    "a forward pre-hook": lambda d, o: d.model.register_forward_pre_hook(lambda *args: None),
    "a backward hook": lambda d, o: d.model.final_conv.register_full_backward_hook(lambda *args: None),
    "a hook of a tensor": lambda d, o: d.model.final_conv.weight.register_hook(lambda grad: grad),
    "a hook after accumulation": lambda d, o: d.model.final_conv.weight.register_post_accumulate_grad_hook(print),
    "a forward of its own": lambda d, o: setattr(d.model, "forward", types.MethodType(Unet.forward, d.model)),
    "a method of its own": lambda d, o: setattr(d, "p_losses", types.MethodType(GaussianDiffusion.p_losses, d)),
    "a class": lambda d, o: setattr(d.model, "__class__", OtherUnet),
    "compiled": lambda d, o: d.model.compile(backend="eager"),
    "an option of the optimizer": lambda d, o: o.param_groups[0].update(betas=(0.5, 0.9)),
    "a group": lambda d, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "a moment": lambda d, o: o.state[d.model.final_conv.bias].update(exp_avg=torch.zeros(3)),
    "a moment's data": lambda d, o: setattr(o.state[d.model.final_conv.bias]["exp_avg"], "data", torch.zeros(3)),
    "a parameter of the optimizer": lambda d, o: o.param_groups[0]["params"].pop(),
    "a hook of the optimizer": lambda d, o: o.register_step_post_hook(lambda *args: None),
    "the optimizer's state": lambda d, o: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(taken, change):
    diffusion, optimizer, take = taken
    before = take()
    assert before.holds()
    CHANGES[change](diffusion, optimizer)
    assert not before.holds()
    assert take().holds()


def test_what_changes_in_place_holds(taken):
    diffusion, optimizer, take = taken
    before = take()
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.mul_(0.9)
    diffusion.train()
    optimizer.zero_grad()
    assert before.holds()


def test_what_is_not_the_models_own(taken, monkeypatch):
    """Hooks of every module, a patched class, and torch's settings."""
    diffusion, _, take = taken
    before = take()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not before.holds()
    handle.remove()
    assert before.holds()
    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv2d, "forward", lambda module, x: x)
        assert not before.holds()
    assert before.holds()
    with use_backend("reference"):
        assert not before.holds()
    assert before.holds()


def test_a_hook_in_a_dictionary_that_was_there(taken):
    diffusion, _, take = taken
    weight = diffusion.model.final_conv.weight
    weight.register_hook(lambda grad: grad).remove()  # leaves an empty dictionary
    before = take()
    weight.register_hook(lambda grad: grad)
    assert not before.holds()


def test_of_a_model_that_is_not_called_only_its_tensors_count(taken):
    diffusion, _, _ = taken
    snapshot = Snapshot(diffusion, is_called=False)
    diffusion.eval()
    diffusion.model.note = 1
    handle = diffusion.model.register_forward_hook(lambda *args: None)
    with use_backend("reference"):
        assert snapshot.holds()
    handle.remove()
    for name in ("a module", "a parameter", "a buffer", "data", "dtype"):
        snapshot = Snapshot(diffusion, is_called=False)
        CHANGES[name](diffusion, None)
        assert not snapshot.holds(), name
