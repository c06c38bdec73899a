"""Nothing in a sampling or training step reads the device or sends to it: seen without CUDA, on tensors that pretend.

What waits for the device would break a capture there, whichever implementation of an op runs.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from recorders import FrozenRecorder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_fast import GaussianDiffusion, Unet, noise, use_backend
from ddpm_fast.samplers import SamplingState
from ddpm_fast.training_step import TrainingStep


class Contacts(TorchDispatchMode):
    """Operations that read a number, or that touch tensors of the host (other than numbers) and of the device."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.device.type != "cpu" or t.ndim > 0}
        self.operators += 1
        if len(devices) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(func))
        return result


def pretend(diffusion: torch.nn.Module) -> None:
    """Put a module on a CUDA device that is not there; inside a FakeTensorMode."""
    for module in diffusion.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, device="cuda")


def make(**kwargs) -> GaussianDiffusion:
    model = Unet(8, dim_mults=(1, 2), self_condition=True, **kwargs)
    return GaussianDiffusion(model, image_size=8, timesteps=6, offset_noise_strength=0.1)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_sampling_step(backend):
    diffusion = make()
    plan = diffusion._plan("ddpm", 6)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), use_backend(backend):
        pretend(diffusion)
        x = torch.zeros(2, 3, 8, 8, device="cuda")
        state = SamplingState(diffusion.model, x, 6, keeps_x_start=True, self_condition=True, start_index=0)
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 0)
        assert contacts.found, "tables come from the host once"
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 2)
            state.advance(state.x_start)
        assert contacts.found == [] and contacts.operators > 100


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_training_step_but_for_its_backward(backend, memory):
    """Autograd's engine needs a real device, so that gradients come from elsewhere."""
    diffusion = make(dropout=0.1, memory=memory)

    def backward(loss):
        assert loss.device.type == "cuda"
        for parameter in diffusion.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with FakeTensorMode(), use_backend(backend):
        pretend(diffusion)
        optimizer = torch.optim.Adam(diffusion.parameters(), capturable=True)
        options = {"ema": None, "max_grad_norm": 1.0, "autocast": None, "any_module": False}
        step = TrainingStep(diffusion, optimizer, (2, 3, 8, 8), recorder=FrozenRecorder, **options)
        step._hold_rates()
        with Contacts() as contacts, mock.patch.object(torch.Tensor, "backward", backward):
            step._body(True)
    assert contacts.found == [] and contacts.operators > 300


def test_noise_and_seeds_of_numbers():
    with FakeTensorMode(), Contacts() as contacts:
        noise.seed_tensor(2**64 - 1, "cuda")
        noise.normal((2, 3), seed=3, step=4, stream=noise.STREAM_STEP, device="cuda")
    assert contacts.found == []


def test_the_check_sees_contacts():
    with FakeTensorMode(), Contacts() as contacts:
        torch.zeros(3).to("cuda")
        torch.tensor([1, 2], device="cuda")
    assert len(contacts.found) == 2
