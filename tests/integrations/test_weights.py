"""Weights of accelerated networks in the layout of their device: what a user does with them gives what it gave."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import ddpm_fast
from ddpm_fast.integrations import weights
from ddpm_fast.testing.accelerated import assert_same_bits, outputs_and_gradients, randomise_all
from ddpm_fast.testing.foreign_packages import small_diffusers_unet, small_edm_unet, small_openai_unet
from ddpm_fast.training.captured_step import lay_out_state

NETWORKS = {"diffusers": small_diffusers_unet, "torchcfm": small_openai_unet, "EDM": small_edm_unet}
both = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_all(NETWORKS[name]())


def arguments(name: str) -> tuple:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 7])
    return (t / 10, x) if name == "torchcfm" else (x, t)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The processor's convolutions take either layout of a weight."""
    monkeypatch.setattr(weights, "weights_format", lambda device: torch.channels_last)


def assert_laid_out(model: nn.Module, are: bool = True) -> None:
    taps = [p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert taps and all(p.is_contiguous(memory_format=torch.channels_last) is are for p in taps)
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in taps)


@both
def test_on_meta_tensors_which_stand_for_cuda(name):
    model = network(name).to("meta")
    parameters, shapes = list(model.parameters()), [p.shape for p in model.parameters()]
    ddpm_fast.accelerate(model)
    assert_laid_out(model)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [p.shape for p in model.parameters()] == shapes
    copied = copy.deepcopy(model)
    ddpm_fast.restore(model)
    assert_laid_out(model, False)
    assert_laid_out(copied)
    assert_laid_out(ddpm_fast.restore(copied), False)


@both
def test_they_follow_the_network_to_its_device(name):
    model = ddpm_fast.accelerate(network(name))
    assert_laid_out(model, False)
    assert_laid_out(model.to("meta"))
    assert_laid_out(nn.Sequential(model).to_empty(device="cpu"), False)


@both
def test_a_layout_of_the_user_s_stays(name):
    model = network(name).to("meta").to(memory_format=torch.channels_last)
    assert_laid_out(ddpm_fast.restore(ddpm_fast.accelerate(model)))


@both
def test_outputs_gradients_and_files(name, as_on_cuda):
    expected = outputs_and_gradients(
        ddpm_fast.accelerate(network(name).to(memory_format=torch.channels_last)), arguments(name)
    )
    model = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs_and_gradients(model, arguments(name))  # leaves gradients
    assert_same_bits(outputs_and_gradients(ddpm_fast.accelerate(model), arguments(name)), expected)
    assert_laid_out(model)
    assert_same_bits(dict(model.state_dict()), before)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = NETWORKS[name]()
    plain.load_state_dict(torch.load(file))
    assert_same_bits(dict(plain.state_dict()), before)
    randomise_all(model)
    model.load_state_dict(plain.state_dict())
    assert_laid_out(model)
    assert_same_bits(dict(model.state_dict()), before)
    ddpm_fast.restore(model)
    assert_laid_out(model, False)
    eager = outputs_and_gradients(network(name), arguments(name))
    assert_same_bits(outputs_and_gradients(model, arguments(name)), eager)


def test_pretrained_files(as_on_cuda, tmp_path):
    model = ddpm_fast.accelerate(network("diffusers"))
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert_same_bits(dict(loaded.state_dict()), dict(network("diffusers").state_dict()))


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "fused adam": lambda p: torch.optim.Adam(p, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_and_averages(optimizer, as_on_cuda):
    """The same numbers as those of a network whose weights are contiguous."""
    found = {}
    for is_laid_out in (False, True):
        model = network("diffusers").to(torch.float64)
        model = ddpm_fast.accelerate(model) if is_laid_out else model
        assert_laid_out(model, is_laid_out)
        average = torch.optim.swa_utils.AveragedModel(model)
        optimise = OPTIMIZERS[optimizer](model.parameters())
        args = tuple(a.double() if a.is_floating_point() else a for a in arguments("diffusers"))
        for _ in range(2):
            outputs_and_gradients(model, args)
            optimise.step()
            average.update_parameters(model)
        found[is_laid_out] = {**model.state_dict(), **average.module.state_dict(prefix="average.")}
    for key, value in found[False].items():
        torch.testing.assert_close(found[True][key], value, msg=key)


@pytest.mark.parametrize("optimizer", ["adam", "foreach adamw", "momentum"])
def test_an_optimizer_that_is_older_than_the_layout(optimizer, as_on_cuda):
    found = {}
    for is_laid_out in (False, True):
        model = network("diffusers").to(torch.float64)
        args = tuple(a.double() if a.is_floating_point() else a for a in arguments("diffusers"))
        optimise = OPTIMIZERS[optimizer](model.parameters())
        for step in range(3):
            if step == 1 and is_laid_out:
                ddpm_fast.accelerate(model)
            outputs_and_gradients(model, args)
            optimise.step()
        assert_laid_out(model, is_laid_out)
        found[is_laid_out] = dict(model.state_dict())
    for key, value in found[False].items():
        torch.testing.assert_close(found[True][key], value, msg=key)


def test_moments_of_a_run_without_accelerate_are_laid_out(as_on_cuda):
    """Loading keeps the layout that was saved, which fused Adam refuses on CUDA."""
    model = network("diffusers")
    earlier = torch.optim.Adam(model.parameters())
    outputs_and_gradients(model, arguments("diffusers"))
    earlier.step()
    optimise = torch.optim.Adam(ddpm_fast.accelerate(model).parameters())
    optimise.load_state_dict(earlier.state_dict())
    moments = {p: state["exp_avg"].clone() for p, state in optimise.state.items()}
    assert any(moment.stride() != p.stride() for p, moment in moments.items())
    lay_out_state(optimise)
    for p, moment in moments.items():
        assert optimise.state[p]["exp_avg"].stride() == p.stride()
        assert torch.equal(optimise.state[p]["exp_avg"], moment)


def test_data_parallel(as_on_cuda, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = ddpm_fast.accelerate(network("diffusers"))
        expected = outputs_and_gradients(model, arguments("diffusers"))
        parallel = nn.parallel.DistributedDataParallel(model)
        found = outputs_and_gradients(parallel, arguments("diffusers"))
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key.removeprefix("module.")], msg=key)
        assert_laid_out(model)
    finally:
        torch.distributed.destroy_process_group()
