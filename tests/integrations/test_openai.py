"""OpenAI's UNet, as torchcfm has it, accelerated: outputs, every gradient, and what keeps its own forward."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torchcfm.models.unet import unet
from torchcfm.models.unet.unet import AttentionBlock, ResBlock, UNetModel, UNetModelWrapper

import ddpm_fast
from ddpm_fast.integrations import openai as family
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.testing.accelerated import check_accelerated, outputs_and_gradients, randomise_all
from ddpm_fast.testing.truth import assert_draws_close_to_truth

PRE, ATTENTION = {"preactivation_block"}, {"group_norm_attention_block"}
RES_BLOCKS = {
    "plain": {},
    "wider": {"out_channels": 96},
    "wider by 3×3": {"out_channels": 96, "use_conv": True},
    "scale and shift": {"use_scale_shift_norm": True},
    "up": {"up": True},
    "up, wider": {"up": True, "out_channels": 96, "use_scale_shift_norm": True},
    "down": {"down": True},
    "dropout": {"dropout": 0.3},
}


def res_block(**options):
    return ResBlock(**{"channels": 64, "emb_channels": 20, "dropout": 0.0, **options})


def unet_model(**options):
    small = {
        "image_size": 8, "in_channels": 3, "model_channels": 64, "out_channels": 3, "num_res_blocks": 1,
        "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 2,
    }  # fmt: skip
    return UNetModel(**{**small, **options})


def run(model, *args):
    """The output; a model in float64 computes all in it, where the package converts to float32."""
    if next(model.parameters()).dtype != torch.float64:
        return model(*args)
    model.dtype = torch.float64
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return model(*args)


def block_inputs(side=8):
    torch.manual_seed(0)
    return torch.randn(2, 64, side, side), torch.randn(2, 20)


def network_inputs():
    torch.manual_seed(0)
    return torch.rand(2), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", RES_BLOCKS)
def test_residual_blocks(name):
    torch.manual_seed(0)
    block = res_block(**RES_BLOCKS[name])
    if name == "dropout":
        block.eval()  # the eager block draws other numbers
    check_accelerated(block, block_inputs(side=7 if name == "down" else 8), runs=PRE, call=run)


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"num_head_channels": 8, "use_new_attention_order": True}])
def test_attention(options):
    torch.manual_seed(0)
    check_accelerated(AttentionBlock(64, **options), block_inputs(6)[:1], runs=ATTENTION, call=run)


NETWORKS = {
    "plain": {},
    "scale, shift and blocks that resample": {"use_scale_shift_norm": True, "resblock_updown": True},
    "resampling without weights": {"conv_resample": False, "use_new_attention_order": True},
    "classes": {"num_classes": 5},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    network, args = unet_model(**NETWORKS[name]), network_inputs()
    if name == "classes":
        args = (*args, torch.tensor([0, 4]))
    check_accelerated(network, args, runs=PRE | ATTENTION, call=run)


def test_the_cifar10_network():
    torch.manual_seed(0)
    network = UNetModelWrapper(
        (3, 32, 32), num_channels=32, num_res_blocks=1, channel_mult=[1, 1], num_heads=2, num_head_channels=16,
        attention_resolutions="16", dropout=0.1,
    )  # fmt: skip
    ddpm_fast.accelerate(randomise_all(network))
    fused = {line.cls for line in table(network) if line.runs}
    assert fused >= {"UNetModelWrapper", "ResBlock", "AttentionBlock", "Upsample"}
    network.train()
    x = torch.randn(1, 3, 32, 32)
    with mock.patch.object(family, "own_forward", side_effect=AssertionError):
        first, second = network(torch.tensor(0.5), x), network(torch.tensor(0.5), x)
        assert not torch.equal(first, second)  # fresh dropout
        network.eval()
        assert torch.equal(network(torch.tensor(0.5), x), network(torch.tensor(0.5), x))


@pytest.mark.parametrize("make", [lambda **o: res_block(**o), lambda **o: AttentionBlock(64, 2, **o)])
def test_checkpoints_give_the_same_bits(make):
    torch.manual_seed(0)
    block = randomise_all(make(use_checkpoint=False))
    other = make(use_checkpoint=True)
    other.load_state_dict(block.state_dict())
    args = block_inputs()[: 1 if isinstance(block, AttentionBlock) else 2]
    expected = outputs_and_gradients(ddpm_fast.accelerate(block), args)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        other = ddpm_fast.accelerate(other)
        other(*args)
    assert not kept
    found = outputs_and_gradients(other, args)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("how", ["converted to float16", "bfloat16 autocast"])
def test_half_precision(how):
    def call(network, *args):
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "converted to float16"):
            return network(*args)

    truths, eager, fused = [], [], []
    for seed in range(4):
        network, args = unet_model(use_scale_shift_norm=True), network_inputs()
        randomise_all(network, seed=seed)
        truths.append(outputs_and_gradients(copy.deepcopy(network).double(), [a.double() for a in args], call=run))
        if how == "converted to float16":
            network.convert_to_fp16()
            network.dtype = torch.float16
        eager.append(outputs_and_gradients(network, args, call=call))
        fused.append(outputs_and_gradients(ddpm_fast.accelerate(network), args, call=call))
    assert_draws_close_to_truth(fused, eager, truths)


class Other(nn.Conv2d):
    """A user's own convolution."""


def replaced(block):
    block.in_layers[2] = Other(64, 64, 3, padding=1)


def strided(block):
    block.out_layers[3].stride = (2, 2)


def longer(block):
    block.out_layers.append(nn.SiLU())


def hooked(block):
    block.emb_layers[1].register_forward_hook(lambda module, args, out: out)


def patched(block):
    block.in_layers[0].forward = lambda x: x


REFUSALS = {
    replaced: "in_layers.2: it is a Other",
    strided: "out_layers.3: it has other settings",
    longer: "out_layers has 5 modules",
    hooked: "emb_layers.1: it has hooks",
    patched: "in_layers.0: it has a forward of its own",
}


@pytest.mark.parametrize("change", REFUSALS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changed_modules_are_called(change, when):
    torch.manual_seed(0)
    network, args = randomise_all(unet_model()), network_inputs()
    eager = copy.deepcopy(network)
    if when == "after":
        ddpm_fast.accelerate(network)
    for model in (eager, network):
        torch.manual_seed(1)
        change(model.input_blocks[1][0])
    if when == "before":
        ddpm_fast.accelerate(network)
    (line,) = [line for line in table(network) if line.path == "input_blocks.1.0"]
    assert line.runs is None and REFUSALS[change] in line.reason
    if change is strided:
        return  # its output no longer fits
    torch.testing.assert_close(network(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_hooks_inside_a_network_are_called():
    network, args = ddpm_fast.accelerate(unet_model()), network_inputs()
    calls = []
    places = {"block": network.output_blocks[0][0], "sequence": network.input_blocks[1], "last": network.out[0]}
    for name, module in places.items():
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    network(*args)
    assert sorted(calls) == sorted(places)


def test_a_subclass_keeps_its_own_forward():
    class Mine(UNetModel):
        def forward(self, t, x):
            return 2 * super().forward(t, x)

    torch.manual_seed(0)
    network = randomise_all(Mine(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2)))
    eager, args = copy.deepcopy(network), network_inputs()
    ddpm_fast.accelerate(network)
    assert type(network) is Mine and any(line.runs in PRE for line in table(network))
    torch.testing.assert_close(network(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_errors_are_the_package_s():
    network, (t, x) = ddpm_fast.accelerate(unet_model(num_classes=3)), network_inputs()
    with pytest.raises(AssertionError, match="must specify y"):
        network(t, x)
    with pytest.raises(AssertionError):
        network(t, x, torch.tensor([1]))


def test_sequences_keep_their_own_forward():
    block = ddpm_fast.accelerate(res_block(dims=1))
    assert type(block) is ResBlock
    attention = ddpm_fast.accelerate(randomise_all(AttentionBlock(32)))
    x = torch.randn(2, 32, 9)
    assert torch.equal(attention(x), unet.AttentionBlock.forward(ddpm_fast.restore(copy.deepcopy(attention)), x))
