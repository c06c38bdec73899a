"""diffusers' blocks and networks, accelerated: outputs, every gradient, and what keeps its own forward."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.fx.experimental.proxy_tensor import make_fx

import ddpm_fast
from ddpm_fast.integrations import diffusers as family
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.testing.accelerated import check_accelerated, outputs_and_gradients, randomise_all
from ddpm_fast.testing.truth import assert_draws_close_to_truth

PRE = {"preactivation_block"}
RESNETS = {
    "plain": {},
    "wider": {"out_channels": 24, "groups_out": 3},
    "shortcut without bias": {"out_channels": 24, "conv_shortcut_bias": False},
    "shortcut of the same width": {"use_in_shortcut": True, "output_scale_factor": np.sqrt(2.0)},
    "scale and shift": {"time_embedding_norm": "scale_shift", "skip_time_act": True},
    "no embedding": {"temb_channels": None, "eps": 1e-3},
    "dropout": {"dropout": 0.3},
    "up": {"up": True},
    "up, wider": {"up": True, "out_channels": 24, "time_embedding_norm": "scale_shift"},
    "up, sde_vp": {"up": True, "kernel": "sde_vp"},
    "down": {"down": True, "output_scale_factor": 2.0},
    "down, wider": {"down": True, "out_channels": 8},
    "down, sde_vp": {"down": True, "kernel": "sde_vp"},
}


def resnet(**options):
    return ResnetBlock2D(**{"in_channels": 16, "temb_channels": 20, "groups": 4, **options})


def inputs(width=16, size=8, batch=2):
    return torch.randn(batch, width, size, size), torch.randn(batch, 20)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_blocks(name):
    torch.manual_seed(0)
    block, (x, temb) = resnet(**RESNETS[name]), inputs(size=7 if "down" in name else 8)
    has_dropout = name == "dropout"
    if has_dropout:
        block.eval()  # the eager network draws other numbers
    check_accelerated(block, (x, None if block.time_emb_proj is None else temb), runs=PRE)


def test_one_embedding_for_all_images():
    x, temb = inputs()
    check_accelerated(resnet(), (x, temb[:1]), runs=PRE)


def test_dropout_draws_fresh_numbers_and_keeps_the_mean():
    torch.manual_seed(0)
    block, (x, temb) = ddpm_fast.accelerate(resnet(dropout=0.5, temb_channels=None)), (inputs(batch=1)[0], None)
    with torch.no_grad():
        expected = block.eval()(x, temb)
        block.train()
        first, second = block(x, temb), block(x, temb)
        mean = torch.stack([block(x, temb) for _ in range(400)]).mean(0)
    assert not torch.equal(first, second)
    assert (mean - expected).abs().max() < 0.25 * (first - expected).abs().max()


RESNET_REFUSALS = {
    "FIR filter up": (lambda: resnet(up=True, kernel="fir"), "its upsampling is not"),
    "FIR filter down": (lambda: resnet(down=True, kernel="fir"), "its downsampling is not"),
    "other activation": (lambda: resnet(non_linearity="mish"), "nonlinearity: it is a Mish"),
    "second width": (lambda: resnet(conv_2d_out_channels=8), "conv2 gives 8 channels and conv1 16"),
    "convolution in a wrapper": (lambda: replaced(resnet(), "conv1"), "conv1: it is a Wrapper"),
    "hook on a norm": (lambda: hooked(resnet(), "norm2"), "norm2: it has hooks"),
    "hook on a projection": (lambda: hooked(resnet(), "time_emb_proj"), "time_emb_proj: it has hooks"),
    "hook on the upsampling": (lambda: hooked(resnet(up=True), "upsample"), "its upsampling is not"),
    "other stride": (lambda: strided(resnet()), "conv1: it has other settings"),
    "partial of another function": (
        lambda: changed(resnet(up=True), upsample=functools.partial(F.interpolate, scale_factor=2.0, mode="bilinear")),
        "its upsampling is not",
    ),
}


class Wrapper(torch.nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def replaced(block, name):
    setattr(block, name, Wrapper(getattr(block, name)))
    return block


def hooked(block, name):
    getattr(block, name).register_forward_hook(lambda module, args, out: 2 * out)
    return block


def strided(block):
    block.conv1.padding_mode = "circular"
    block.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return block


def changed(block, **attributes):
    for name, value in attributes.items():
        del block._modules[name]
        setattr(block, name, value)
    return block


@pytest.mark.parametrize("name", RESNET_REFUSALS)
def test_resnet_blocks_that_keep_their_own_forward(name):
    make, reason = RESNET_REFUSALS[name]
    torch.manual_seed(0)
    block, (x, temb) = make(), inputs()
    expected = block(x, temb)
    assert reason in " ".join(line.reason or "" for line in table(block))
    torch.testing.assert_close(ddpm_fast.accelerate(block)(x, temb), expected, rtol=1e-4, atol=1e-4)
    assert "preactivation_block" not in [line.runs for line in table(block)]


def test_a_module_that_changes_after_accelerate_is_called():
    torch.manual_seed(0)
    block, (x, temb) = ddpm_fast.accelerate(resnet()), inputs()
    hooked(block, "norm1")
    expected = ddpm_fast.restore(block)(x, temb)
    torch.testing.assert_close(ddpm_fast.accelerate(block)(x, temb), expected)
    assert "norm1: it has hooks" in ddpm_fast.explain(model=block)


ATTENTIONS = {
    "one head": {"heads": 1, "dim_head": 32},
    "heads": {"heads": 4, "dim_head": 8, "rescale_output_factor": np.sqrt(2.0)},
    "no residual": {"heads": 2, "dim_head": 16, "residual_connection": False},
    "no bias": {"heads": 2, "dim_head": 16, "bias": False, "out_bias": False},
    "other processor of diffusers'": {"heads": 2, "dim_head": 16, "processor": AttnProcessor()},
    "inactive dropout": {"heads": 2, "dim_head": 8, "dropout": 0.0},
}


def attention(**options):
    defaults = {"norm_num_groups": 8, "bias": True, "residual_connection": True, "eps": 1e-4, "upcast_softmax": True}
    return Attention(32, **{**defaults, **options})


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    torch.manual_seed(0)
    check_accelerated(attention(**ATTENTIONS[name]), (torch.randn(2, 32, 4, 8),), runs={"group_norm_attention_block"})


class OtherProcessor(AttnProcessor2_0):
    """A processor of a user's."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 2 * super().__call__(attn, hidden_states, *args, **kwargs)


ATTENTION_REFUSALS = {
    "processor of a user's": ({"processor": OtherProcessor()}, "its processor is a OtherProcessor"),
    "norm of queries": ({"qk_norm": "layer_norm"}, "it has a norm_q"),
    "no norm": ({"norm_num_groups": None}, "there is no group_norm"),
    "active dropout": ({"dropout": 0.5}, "it drops out after its last layer"),
    "fewer heads of keys": ({"kv_heads": 1}, "query, key and value are not of one shape"),
    "other scale": ({"scale_qk": False}, "its scale is 1.0"),
}


@pytest.mark.parametrize("name", ATTENTION_REFUSALS)
def test_attention_that_keeps_its_own_forward(name):
    options, reason = ATTENTION_REFUSALS[name]
    module = ddpm_fast.accelerate(attention(heads=4, dim_head=8, **options))
    assert reason in " ".join(line.reason or "" for line in table(module))


def test_attention_whose_weights_have_symbolic_sizes():
    block = ddpm_fast.accelerate(attention(heads=4, dim_head=8))
    names, weights = zip(*block.named_parameters(), strict=True)
    x = torch.randn(2, 32, 4, 4)

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    graph = make_fx(run, tracing_mode="symbolic")(x, *weights)
    torch.testing.assert_close(graph(x, *weights), block(x))


def test_attention_to_something_else_keeps_its_own_forward():
    torch.manual_seed(0)
    module, x = attention(heads=4, dim_head=8), torch.randn(2, 32, 4, 4)
    other, mask = torch.randn(2, 5, 32), torch.zeros(8, 1, 16)
    calls = [((x, other), {}), ((x, None, mask), {}), ((x.flatten(2).transpose(1, 2),), {})]
    expected = [module(*args, **kwargs) for args, kwargs in calls]
    ddpm_fast.accelerate(module)
    for (args, kwargs), value in zip(calls, expected, strict=True):
        torch.testing.assert_close(module(*args, **kwargs), value)


@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
def test_upsampling(name):
    torch.manual_seed(0)
    check_accelerated(Upsample2D(16, use_conv=True, out_channels=24, name=name), (torch.randn(2, 16, 5, 6),))


def test_upsampling_to_a_size_keeps_its_own_forward():
    torch.manual_seed(0)
    module, x = Upsample2D(16, use_conv=True), torch.randn(2, 16, 5, 5)
    expected = module(x, output_size=(9, 9))
    torch.testing.assert_close(ddpm_fast.accelerate(module)(x, output_size=(9, 9)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
def test_downsampling(name, padding):
    torch.manual_seed(0)
    module = Downsample2D(16, use_conv=True, out_channels=24, padding=padding, name=name)
    check_accelerated(module, (torch.randn(2, 16, 8, 9),), runs={"strided_conv"})


NETWORKS = {
    "ddpm": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "scale and shift, resampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
    },
    "skips of score-based networks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "mid_block_scale_factor": 2**0.5,
        "norm_num_groups": 8,
    },
    "no attention in the middle": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
}


def network(**options):
    defaults = {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return UNet2DModel(**{**defaults, **options})


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    unet = network(**NETWORKS[name])
    args = [torch.randn(2, 3, 8, 8), torch.tensor([3, 700])]
    if unet.config.num_class_embeds is not None:
        args.append(torch.tensor([1, 4]))
    check_accelerated(unet, args, runs=PRE | {"group_norm_attention_block"})


@pytest.mark.parametrize("name", ["ddpm", "scale and shift, resampling blocks"])
def test_projections_of_the_time_are_one_product(name, monkeypatch):
    torch.manual_seed(0)
    unet = ddpm_fast.accelerate(network(**NETWORKS[name])).eval()
    args = [torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), *([torch.tensor([1, 4])] if unet.class_embedding else [])]
    products = []
    make = family.linears_of_one_input

    def product(x, layers, added):
        products.append((len(layers), len(added)))
        return make(x, layers, added)

    monkeypatch.setattr(family, "linears_of_one_input", product)
    with torch.no_grad():
        expected = unet(*args).sample
        blocks = sum(isinstance(module, ResnetBlock2D) for module in unet.modules())
        assert products == [(blocks, blocks if name == "ddpm" else 0)]
        unet.mid_block.forward = unet.mid_block.forward  # somebody may call it again in backward
        torch.testing.assert_close(unet(*args, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(products) == 1


def test_gradient_checkpointing():
    torch.manual_seed(0)
    unet = randomise_all(network(**NETWORKS["ddpm"], dropout=0.2))
    args = (torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    ddpm_fast.accelerate(unet)
    expected = outputs_and_gradients(unet, args)
    unet.enable_gradient_checkpointing()
    found = outputs_and_gradients(unet, args)
    for name, value in expected.items():
        if "to_k.bias" not in name:  # whose gradient is 0 but for rounding
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)
    assert "computes its blocks again" in ddpm_fast.explain(model=unet)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "half weights"])
def test_half_precision(weights):
    def call(module, *args):
        with torch.autocast("cpu", torch.bfloat16, enabled=weights is torch.float32):
            return module(*args)

    truths, eager, fused = [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        unet = randomise_all(network(**NETWORKS["ddpm"]), seed=seed).to(weights)
        x, t = torch.randn(2, 3, 8, 8).to(weights), torch.tensor([3, 700])
        truths.append(outputs_and_gradients(copy.deepcopy(unet).double(), (x.double(), t)))
        eager.append(outputs_and_gradients(unet, (x, t), call=call))
        fused.append(outputs_and_gradients(ddpm_fast.accelerate(unet), (x, t), call=call))
        assert {name: value.dtype for name, value in fused[-1].items()} == {
            name: value.dtype for name, value in eager[-1].items()
        }
    zero = [name for name in truths[0] if "to_k.bias" in name]  # but for rounding
    for side in (truths, eager, fused):
        for draw in side:
            for name in zero:
                assert draw.pop(name).abs().max() < 0.05
    halves = [[{name: value.bfloat16() for name, value in draw.items()} for draw in side] for side in (fused, eager)]
    assert_draws_close_to_truth(*halves, truths)  # in units of the half type, also where gradients are float32


def test_networks_with_cross_attention():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    args = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16))
    check_accelerated(unet, args, runs=PRE | {"upsample_conv", "preactivation_block of a map and a skip"})
