"""Upstream's networks, accelerated: outputs, every gradient, and the same bits as this package's own networks."""

from __future__ import annotations

import copy

import pytest
import torch

import ddpm_fast
from ddpm_fast import classifier_free_guidance as ours_with_classes
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.testing.accelerated import assert_same_bits, check_accelerated, outputs_and_gradients, randomise_all

upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
with_classes = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")

UNETS = {
    "plain": {},
    "self-condition": {"self_condition": True, "channels": 1},
    "full attention, flash": {"full_attn": (True, True), "flash_attn": True, "attn_heads": (1, 2)},
    "learned frequencies": {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6, "learned_variance": True},
}
UNETS_WITH_CLASSES = {"plain": {}, "random frequencies": {"random_fourier_features": True, "init_dim": 12}}


def unet(**options):
    torch.manual_seed(0)
    return upstream.Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, **options})


def unet_with_classes(**options):
    torch.manual_seed(0)
    return with_classes.Unet(**{"dim": 8, "num_classes": 5, "dim_mults": (1, 2), **options})


def inputs(channels=3, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, channels, 8, 8), torch.randint(0, 1000, (batch,))


def double(argument):
    """Upstream's embedding of an integer is float32, which its float64 layers do not take."""
    is_class = not isinstance(argument, torch.Tensor) or (argument.dtype == torch.int64 and argument.max() < 5)
    return argument if is_class else argument.double()


@pytest.mark.parametrize("name", UNETS)
def test_networks(name):
    options = UNETS[name]
    x, t = inputs(options.get("channels", 3))
    args = (x, t, x.flip(0)) if options.get("self_condition") else (x, t)
    runs = {"Unet", "resnet_block", "attention_block", "downsample_conv", "upsample_conv", "conv3x3", "time_mlp"}
    check_accelerated(unet(**options), args, runs=runs, double=lambda a: a.double())


@pytest.mark.parametrize("name", UNETS_WITH_CLASSES)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_networks_with_classes(name, drop):
    model, args = unet_with_classes(**UNETS_WITH_CLASSES[name]), (*inputs(), torch.tensor([0, 4]), drop)
    check_accelerated(model, args, runs={"Unet", "resnet_block"}, double=double)


def test_a_network_computes_the_bits_of_ours():
    theirs = randomise_all(unet())
    ours = ddpm_fast.Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8})
    ours.load_state_dict(theirs.state_dict())
    args = inputs()
    assert_same_bits(outputs_and_gradients(ddpm_fast.accelerate(theirs), args), outputs_and_gradients(ours, args))
    diffusions = [ddpm_fast.GaussianDiffusion(network, image_size=8, timesteps=4) for network in (theirs, ours)]
    samples = [diffusion.sample(2, seed=3, progress=False) for diffusion in diffusions]
    assert torch.equal(*samples)


def test_a_network_with_classes_computes_the_bits_of_ours():
    theirs = randomise_all(unet_with_classes())
    ours = ours_with_classes.Unet(dim=8, num_classes=5, dim_mults=(1, 2))
    ours.load_state_dict(theirs.state_dict())
    args = (*inputs(), torch.tensor([2, 4]), 0.5)
    assert_same_bits(outputs_and_gradients(ddpm_fast.accelerate(theirs), args), outputs_and_gradients(ours, args))
    kept = {"cond_keep_mask": torch.tensor([True, False])}
    assert torch.equal(theirs(*args[:3], **kept), ours(*args[:3], **kept))
    guided = theirs.forward_with_cond_scale(*args[:3], cond_scale=3.0)
    for one, other in zip(guided, ours.forward_with_cond_scale(*args[:3], cond_scale=3.0), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_process_of_upstream_trains_and_samples_it():
    model = unet()
    process = upstream.GaussianDiffusion(model, image_size=8, timesteps=4)
    images = torch.rand(2, 3, 8, 8)

    def loss_and_sample():
        torch.manual_seed(0)
        loss = process(images)
        loss.backward()
        with torch.no_grad():
            return loss.detach(), process.sample(2)

    expected = loss_and_sample()
    ddpm_fast.accelerate(process)  # a process is a module with a network inside
    for actual, value in zip(loss_and_sample(), expected, strict=True):
        assert torch.allclose(actual, value, atol=1e-4)


def test_inputs_that_only_upstream_takes_go_to_its_own_forward():
    model, eager = ddpm_fast.accelerate(unet()), unet()
    x, t = inputs()
    with pytest.raises(AssertionError, match="need to be divisible by 2"):
        model(torch.randn(2, 3, 7, 7), t)
    model, eager = ddpm_fast.accelerate(unet_with_classes()), unet_with_classes()
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([1, 5]))
    block, own = model.mid_block1, eager.mid_block1
    maps = torch.randn(2, 16, 4, 4)
    assert torch.allclose(block(maps), own(maps), atol=1e-5)


def test_dropout():
    model = ddpm_fast.accelerate(unet(dropout=0.4))
    args = inputs()
    torch.manual_seed(0)
    first, second = model(*args), model(*args)
    torch.manual_seed(0)
    assert torch.equal(model(*args), first) and not torch.equal(first, second)
    assert torch.equal(model.eval()(*args), model(*args))
    model.train().mid_attn.attend.attn_dropout.p = 0.3
    reasons = {line.path: line.reason for line in table(model) if line.reason}
    assert list(reasons) == ["mid_attn", "mid_attn.to_qkv", "mid_attn.to_out", "final_conv"]


def test_weights_move_for_another_device_alone():
    eager, model = unet(), ddpm_fast.accelerate(unet())
    strides = {name: p.stride() for name, p in eager.named_parameters()}
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    moved = copy.deepcopy(model).to("meta")
    convolutions = [module.weight for module in moved.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    others = {name for name, p in moved.named_parameters() if not any(p is w for w in convolutions)}
    assert all(p.stride() == strides[name] for name, p in moved.named_parameters() if name in others)
    with ddpm_fast.inference_weights(model, 1000), torch.no_grad():
        model(*inputs())
    ddpm_fast.restore(model)
    assert not {"_tensors", "_slots", "_inside"} & {key for module in model.modules() for key in module.__dict__}
