"""inference_weights: what a sampling run derives from the weights is made once, and is never stale."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import ddpm_fast
from ddpm_fast import Unet
from ddpm_fast.models import convolution, unet_base
from ddpm_fast.models.derived_weights import HasDerivedWeight, inference_weights
from ddpm_fast.ops.resample import composite

T = 20


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Unet(8, dim_mults=(1, 2)).eval()


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([4, 19])


def live(model):
    with torch.no_grad():
        return model(*batch())


def inside(model, num_timesteps=T):
    with torch.inference_mode(), inference_weights(model, num_timesteps):
        return model(*batch())


def deriving(model):
    return [module for module in model.modules() if isinstance(module, HasDerivedWeight)]


def test_equals_the_network_as_always(model):
    assert len(deriving(model)) == 3, "the Unet, one downsampling, one upsampling"
    for num_timesteps in (T, None):
        torch.testing.assert_close(inside(model, num_timesteps), live(model), rtol=1e-4, atol=1e-5)


def test_derives_once(model, monkeypatch, without_native):
    calls = []
    downsample, make_taps = deriving(model)[1], composite.upsampling_taps
    monkeypatch.setattr(downsample, "_kernel", lambda make=downsample._kernel: calls.append(0) or make())
    for module in (convolution, composite):  # without kept taps the op of upsampling makes them
        monkeypatch.setattr(module, "upsampling_taps", lambda weight: calls.append(0) or make_taps(weight))
    make_rows = unet_base._projections
    monkeypatch.setattr(unet_base, "_projections", lambda t, blocks: calls.append(0) or make_rows(t, blocks))
    with torch.no_grad():  # native code has no use for the taps of upsampling
        with inference_weights(model, T):
            for _ in range(3):
                model(*batch())
        assert len(calls) == 3
        model(*batch())
    assert len(calls) == 6


CHANGES = {
    "in place": lambda p: p.mul_(1.5),
    "through .data, which no version counter sees": lambda p: p.data.mul_(1.5),
    "another tensor": lambda p: setattr(p, "data", p.data * 1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_count_from_the_next_block_on(model, change):
    before = inside(model)
    addresses = [module._slots[key].data_ptr() for module in deriving(model) for key in module._slots]
    with torch.no_grad():
        for p in model.parameters():
            CHANGES[change](p)
    after = inside(model)
    torch.testing.assert_close(after, live(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before)
    assert [module._slots[key].data_ptr() for module in deriving(model) for key in module._slots] == addresses, (
        "a captured graph reads them there"
    )


def test_nothing_is_written_into_parameters(model):
    inside(model)
    old = [p.data for p in model.parameters()]
    values = [p.clone() for p in old]
    for p in model.parameters():
        p.data = p.data * 1.5
    inside(model)
    assert all(torch.equal(p, value) for p, value in zip(old, values, strict=True))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = Unet(8, dim_mults=(1, 2))
    first = inside(model)
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(1.1)
        expected = model(*batch())
    assert not torch.allclose(inside(model), first)
    torch.testing.assert_close(inside(model), expected, rtol=1e-4, atol=1e-4)


def test_another_dtype_has_its_own_tensors(model):
    expected = inside(model)
    slots = {id(tensor) for module in deriving(model) for tensor in module._slots.values()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside(model).dtype == torch.bfloat16
    assert torch.equal(inside(model), expected)
    assert slots <= {id(tensor) for module in deriving(model) for tensor in module._slots.values()}
    model.double()
    x, t = batch()
    with torch.no_grad(), inference_weights(model, T):
        torch.testing.assert_close(model(x.double(), t).float(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_inside(model):
    x, t = batch()
    with inference_weights(model, T):
        out = model(x, t)
        out.sum().backward()
    assert torch.equal(out, model(x, t))
    assert all(p.grad is not None for p in model.parameters())


def test_times_between_timesteps_are_computed(model):
    x, _ = batch()
    t = torch.tensor([3.5, 1e6])
    with torch.no_grad(), inference_weights(model, T):
        inside = model(x, t)
    with torch.no_grad():
        torch.testing.assert_close(inside, model(x, t), rtol=1e-4, atol=1e-5)


def test_ends_with_the_block_even_by_an_error(model):
    with pytest.raises(KeyError), inference_weights(model, T):
        raise KeyError
    with inference_weights(model, T), inference_weights(model, T):
        pass
    assert not any(module.is_inside() or module._tensors or module._latest is not None for module in deriving(model))


def test_copies_and_pickles_leave_it_out(model):
    expected = inside(model)
    with inference_weights(model, T):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert not any(hasattr(module, "_slots") or module.is_inside() for module in deriving(other))
        assert torch.equal(inside(other), expected)
    assert model.state_dict().keys() == Unet(8, dim_mults=(1, 2)).state_dict().keys()


def test_what_derives_nothing_runs_as_always():
    for network in (torch.nn.Linear(2, 2), lambda x, t, c: x):
        with inference_weights(network, T):
            pass


def test_compiles_whole():
    model = Unet(8, dim_mults=(1,)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), inference_weights(model, T):
        torch.testing.assert_close(compiled(*batch()), model(*batch()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*batch()), live(model))


def test_self_conditioning_and_fourier_features():
    for config in (dict(self_condition=True), dict(learned_sinusoidal_cond=True, learned_sinusoidal_dim=6)):
        model = Unet(8, dim_mults=(1, 2), **config)
        torch.testing.assert_close(inside(model), live(model), rtol=1e-4, atol=1e-5)


def test_the_old_name_warns_once(monkeypatch):
    monkeypatch.delitem(vars(ddpm_fast), "frozen_weights", raising=False)
    with pytest.warns(FutureWarning, match="frozen_weights is now inference_weights"):
        from ddpm_fast import frozen_weights
    assert frozen_weights is inference_weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ddpm_fast.frozen_weights is inference_weights
    assert "frozen_weights" not in ddpm_fast.__all__
