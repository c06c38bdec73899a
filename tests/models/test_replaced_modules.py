"""Modules of the network that users replace or hook: the fused forms do not replace them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, Unet, inference_weights
from ddpm_fast.runtime import recording
from ddpm_fast.testing.recorders import FrozenRecorder

PLACES = [
    "downs.0.2.to_qkv", "downs.0.2.to_out.0", "downs.0.2.norm", "mid_attn.to_qkv", "mid_attn.to_out",
    "mid_block1.block1.proj", "mid_block1.block2.norm", "ups.0.0.res_conv", "final_conv", "final_res_block.block1.act",
    "mid_block1.mlp.1",
]  # fmt: skip


def other(x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * x.square()


class Adapter(nn.Module):
    """Another function of what the module gives, behind its weight and bias, as adapters such as LoRA's have them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    @property
    def g(self):
        return self.inner.g

    def forward(self, x):
        return other(self.inner(x))


def make(**kwargs) -> Unet:
    torch.manual_seed(0)
    return Unet(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4, **kwargs).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([3, 7])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_replaced_module_is_called(place, memory):
    """Equal to the network whose module does the same by a hook, in output and gradients."""
    network = make(memory=memory)
    expected = copy.deepcopy(network)
    expected.get_submodule(place).register_forward_hook(lambda module, args, output: other(output))
    parent, _, name = place.rpartition(".")
    setattr(network.get_submodule(parent), name, Adapter(network.get_submodule(place)))
    outputs = [net(*inputs()) for net in (network, expected, make(memory=memory))]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-6, "the adapter did nothing"
    for output in outputs[:2]:
        output.square().mean().backward()
    ours, theirs = ([p.grad for p in net.parameters()] for net in (network, expected))
    assert all(gradient is not None for gradient in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_every_module_that_is_listened_to_is_called(norm):
    network = make(norm=norm, resnet_block_groups=4)
    plain = network(*inputs())
    called = set()
    leaves = {name: m for name, m in network.named_modules() if not list(m.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    torch.testing.assert_close(network(*inputs()), plain, rtol=1e-10, atol=1e-10)
    assert called == set(leaves)
    called.clear()
    with torch.no_grad(), inference_weights(network, 10):
        torch.testing.assert_close(network(*inputs()), plain, rtol=1e-10, atol=1e-10)
    assert called == set(leaves)


def make_diffusion(**kwargs) -> GaussianDiffusion:
    torch.manual_seed(0)
    network = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4)
    return GaussianDiffusion(network, image_size=4, timesteps=30, **kwargs)


def test_a_recording_knows_modules_without_weights():
    diffusion = make_diffusion()
    diffusion.graphs = recording.GraphCache(recorder=FrozenRecorder)
    before = recording.weights_of(diffusion.model)
    diffusion.model.time_mlp[2] = nn.ReLU()
    replaced = recording.weights_of(diffusion.model)
    assert replaced != before
    diffusion.model.mid_block1.block1.proj.padding_mode = "circular"
    assert recording.weights_of(diffusion.model) != replaced
    keys = []
    for _ in range(2):  # a tensor in a tuple has no truth value to compare by
        diffusion.model.mid_block1.kept = (torch.ones(3), torch.zeros(3))
        keys.append(recording.weights_of(diffusion.model))
    assert keys[0] == keys[1]


def test_threads_that_sample_from_one_diffusion_do_not_meet():
    diffusion = make_diffusion()
    diffusion.graphs = recording.GraphCache(recorder=FrozenRecorder)
    expected = {seed: diffusion.sample(2, seed=seed, progress=False) for seed in range(4)}
    found, errors = {}, []

    def run(seed: int) -> None:
        try:
            found[seed] = diffusion.sample(2, seed=seed, progress=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, images in expected.items():
        torch.testing.assert_close(found[seed], images, rtol=1e-4, atol=1e-4)


def test_methods_set_on_the_object_are_called():
    diffusion, calls = make_diffusion(), []
    original = diffusion.model_predictions

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    diffusion.model_predictions = counted
    images = diffusion.sample(2, seed=1, progress=False)
    assert len(calls) == 30 and images.isfinite().all()


def test_subclasses_with_upstreams_signatures():
    class Mine(GaussianDiffusion):
        def p_sample_loop(self, shape, return_all_timesteps=False):
            return super().p_sample_loop(shape, return_all_timesteps)

    torch.manual_seed(0)
    mine = Mine(Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4), image_size=4, timesteps=30)
    assert mine.sample(batch_size=2).shape == (2, 3, 4, 4)


def test_a_model_may_write_into_its_timesteps():
    class Writes(nn.Module):
        channels, self_condition, out_dim = 3, False, 3
        random_or_learned_sinusoidal_cond = False

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t, x_self_cond=None):
            t += 0
            return self.weight * x

    diffusion = GaussianDiffusion(Writes(), image_size=4, timesteps=5)
    assert diffusion.sample(3, seed=0, progress=False).shape == (3, 3, 4, 4)


def test_weights_may_be_plain_tensors():
    """As where parameters are made elsewhere, by FSDP or a hypernetwork."""
    torch.manual_seed(0)
    unet = Unet(8, dim_mults=(1, 2))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 5])
    expected = unet(x, t)
    for block in unet._blocks():
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, parameter.detach().clone())
    torch.testing.assert_close(unet(x, t), expected, rtol=0, atol=0)
