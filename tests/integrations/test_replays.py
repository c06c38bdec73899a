"""Calls of accelerated networks without gradients, replayed from tapes: same bits, and no change is missed."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import denoising_diffusion_pytorch as upstream
import pytest
import rectified_flow_pytorch
import torch
from denoising_diffusion_pytorch import classifier_free_guidance
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torchcfm.models.unet.unet import UNetModel

import ddpm_fast
from ddpm_fast.integrations import replays
from ddpm_fast.models.derived_weights import kept_by_block
from ddpm_fast.runtime import extension
from ddpm_fast.testing.accelerated import randomise_all
from ddpm_fast.testing.foreign_packages import import_edm

edm = import_edm()
EDM = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_blocks": 1,
    "channel_mult": [1, 2], "attn_resolutions": [4],
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    extension.why_not(torch.device("cpu")) is not None, reason="tapes are the extension's, which is not here"
)


def diffusers_network(**options) -> UNet2DModel:
    return UNet2DModel(
        **{
            "sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "num_class_embeds": 5, **options,
        }
    )  # fmt: skip


def openai_network(**options) -> UNetModel:
    return UNetModel(
        **{
            "image_size": 8, "in_channels": 3, "model_channels": 64, "out_channels": 3, "num_res_blocks": 1,
            "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 2, "num_classes": 5, **options,
        }
    )  # fmt: skip


def of_timesteps(seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 8, 8, generator=generator),
        torch.randint(1000, (2,), generator=generator),
        torch.randint(5, (2,), generator=generator),
    )


def of_times(seed: int) -> tuple:
    x, t, _ = of_timesteps(seed)
    return x, t / 1000


def taking_autocast(network):
    network.amp_mode = True
    return network


def call_openai(network: nn.Module, seed: int) -> torch.Tensor:
    x, t, y = of_timesteps(seed)
    return network(t / 1000, x, y)


# Name → the network and its call with the numbers of a seed.
NETWORKS = {
    "diffusers": (diffusers_network, lambda network, seed: network(*of_timesteps(seed)).sample),
    "diffusers, one timestep": (
        diffusers_network,
        lambda n, seed: n(of_timesteps(seed)[0], seed, torch.tensor([1, 2]))[0],
    ),
    "diffusers, resampling blocks": (
        lambda: diffusers_network(
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=8,
        ),
        lambda network, seed: network(*of_timesteps(seed)).sample,
    ),
    "torchcfm": (openai_network, call_openai),
    "torchcfm, one time": (
        lambda: openai_network(num_classes=None, resblock_updown=True),
        lambda network, seed: network(torch.tensor(seed / 7), of_timesteps(seed)[0]),
    ),
    "upstream": (
        lambda: upstream.Unet(8, dim_mults=(1, 2), self_condition=True),
        lambda network, seed: network(*of_timesteps(seed)[:2], of_timesteps(seed + 1)[0]),
    ),
    "rectified flow": (
        lambda: rectified_flow_pytorch.Unet(8, dim_mults=(1, 2), flash_attn=True),
        lambda network, seed: network(of_timesteps(seed)[0], times=of_timesteps(seed)[1] / 1000),
    ),
    "EDM's SongUNet": (
        lambda: taking_autocast(edm.SongUNet(**EDM, dropout=0.0, augment_dim=3)),
        lambda network, seed: network(*of_times(seed), augment_labels=torch.full((2, 3), seed / 5)),
    ),
    "EDM's DhariwalUNet": (
        lambda: taking_autocast(edm.DhariwalUNet(**EDM, label_dim=3)),
        lambda network, seed: network(*of_times(seed), torch.eye(3)[[seed % 3, 1]]),
    ),
    "upstream, classes": (
        lambda: classifier_free_guidance.Unet(8, num_classes=5, dim_mults=(1, 2), cond_drop_prob=0.0),
        lambda network, seed: network(*of_timesteps(seed)),
    ),
}


def made(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    make, call = NETWORKS[name]
    return ddpm_fast.accelerate(randomise_all(make()).eval()), call


def without_tapes(network: nn.Module) -> contextlib.AbstractContextManager:
    return ddpm_fast.inference_weights(None, record=False)


def replays_of(network: nn.Module) -> int:
    """How many kinds of calls have a tape."""
    calls = kept_by_block().get(network)
    return 0 if calls is None else sum(recorded._replay is not None for recorded in calls._recorded.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_replays_give_the_same_bits(name, autocast):
    network, call = made(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for seed in range(5):
            with without_tapes(network):
                expected = call(network, seed)
            found = call(network, seed)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert replays_of(network) == 1
    assert "are replayed from a tape, from the third" in ddpm_fast.explain(network)
    assert call(network, 0).requires_grad, "with gradients as always"


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_autocast_has_cast_are_cast_again(name):
    network, call = made(name)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):  # which keeps casts of weights until its end
            before = [call(network, 0) for _ in range(4)][-1]
        for parameter in network.parameters():
            parameter.mul_(1.05)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(network, 0)
        with torch.autocast("cpu", torch.bfloat16), without_tapes(network):
            assert torch.equal(call(network, 0), found) and not torch.equal(found, before)


@pytest.fixture
def network():
    return made("diffusers")[0]


def outputs(network: nn.Module, seeds=range(4)) -> list[torch.Tensor]:
    with torch.no_grad():
        return [network(*of_timesteps(seed)).sample for seed in seeds]


def check_seen(network: nn.Module, differs: bool = True) -> None:
    """What was done to a network that had been replayed counts in its next calls."""
    with without_tapes(network):
        expected = outputs(network)
    for a, b in zip(outputs(network), expected, strict=True):
        assert torch.equal(a, b)
    if differs:
        assert not torch.equal(expected[0], outputs_before(network))


def outputs_before(network: nn.Module) -> torch.Tensor:
    return network.__dict__["before"]


class Shift(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


def hook(network):
    network.mid_block.register_forward_hook(lambda module, args, out: out + 1)


def global_hook(network):
    return nn.modules.module.register_module_forward_hook(lambda module, args, out: None)


CHANGES = {
    "weights in place": lambda n: [p.add_(0.1) for p in n.conv_in.parameters()],
    "weights by data": lambda n: setattr(n.conv_in.weight, "data", n.conv_in.weight + 0.1),
    "another parameter": lambda n: setattr(n.conv_in, "bias", nn.Parameter(torch.ones(32))),
    "a state dict": lambda n: n.load_state_dict({k: v + 0.01 for k, v in n.state_dict().items()}),
    "a hook": hook,
    "a module around another": lambda n: setattr(n.mid_block.resnets[0], "conv1", Shift(n.mid_block.resnets[0].conv1)),
    "a forward": lambda n: setattr(n.conv_out, "forward", lambda x: torch.zeros_like(x[:, :3])),
    "a setting": lambda n: setattr(n.mid_block.resnets[0], "output_scale_factor", 2.0),
    "eps": lambda n: setattr(n.conv_norm_out, "eps", 1.0),
    "fewer blocks": lambda n: n.mid_block.attentions.__setitem__(0, None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name, network):
    network.before = outputs(network)[0]
    outputs(network)
    assert replays_of(network) == 1
    with torch.no_grad():
        CHANGES[name](network)
    check_seen(network)


def test_changes_that_keep_the_numbers_are_seen_too(network):
    outputs(network)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        check_seen(network, differs=False)
        assert seen.count(network) == 8
    finally:
        handle.remove()
    for attention in network.mid_block.attentions:
        attention.set_processor(AttnProcessor())
    check_seen(network, differs=False)
    ddpm_fast.restore(network)
    assert not hasattr(network, "why_not_replayed")
    outputs(network)


@pytest.mark.parametrize("what", ["a module around another", "a forward", "a hook"])
def test_a_network_with_foreign_code_is_called(what, network):
    CHANGES[what](network)
    outputs(network)
    assert replays_of(network) == 0
    assert "are replayed from a tape, not: " in ddpm_fast.explain(network)


def test_classes_that_no_family_knows_are_called():
    down, up = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D")
    unet = ddpm_fast.accelerate(diffusers_network(down_block_types=down, up_block_types=up).eval())
    outputs(unet)
    assert replays_of(unet) == 0
    assert "it is a SkipDownBlock2D, and what its forward does besides is not known" in ddpm_fast.explain(unet)


def test_dropout_draws_anew():
    torch.manual_seed(0)
    unet = ddpm_fast.accelerate(randomise_all(diffusers_network(dropout=0.3)).train())
    found = []
    for block in (contextlib.nullcontext(), without_tapes(unet)):
        torch.manual_seed(1)
        with block:
            found.append(outputs(unet, [0] * 5))
    for replayed, plain in zip(*found, strict=True):
        assert torch.equal(replayed, plain)
    assert replays_of(unet) == 1 and len({out.sum().item() for out in found[0]}) == 5


def test_outputs_are_the_callers(network):
    expected = outputs(network)[3].clone()
    with torch.inference_mode():
        network(*of_timesteps(3)).sample.zero_()
        assert torch.equal(network(*of_timesteps(3)).sample, expected)


def test_what_is_recorded_in_a_block_ends_with_it(network):
    with ddpm_fast.inference_weights(network):
        outputs(network)
        assert replays_of(network) == 1
    assert replays_of(network) == 0
    with torch.no_grad():
        network.conv_in.weight.mul_(2)
    check_seen(network, differs=False)
    assert replays_of(network) == 1


def test_a_network_is_freed_with_its_last_name(network):
    outputs(network)
    assert replays_of(network) == 1 and replays_of(copy.deepcopy(network)) == 0
    twin = copy.deepcopy(network)
    outputs(twin)
    gone = weakref.ref(twin)
    gc.collect()
    gc.disable()
    try:
        del twin
        assert gone() is None
    finally:
        gc.enable()
    assert replays_of(network) == 1


def test_a_wrong_call_is_refused_as_before(network):
    outputs(network)
    x, t, classes = of_timesteps(0)
    with torch.no_grad():
        with pytest.raises(ValueError, match="class_labels should be provided"):
            network(x, t)
        with pytest.raises(RuntimeError, match="to have 3 channels"):
            network(x[:, :2], t, classes)
        with pytest.raises(IndexError):
            network(x, t, classes + 7)
    check_seen(network, differs=False)


def test_modules_of_torch_whose_forward_was_replaced_are_not_trusted(network, monkeypatch):
    assert replays.untrusted_module(network) is None

    def forward(self, *modules):
        return None

    monkeypatch.setattr(nn.ModuleList, "forward", forward)
    assert replays.untrusted_module(network) == "down_blocks: the forward of ModuleList was replaced"


def test_arguments_that_a_tape_does_not_take_go_to_the_own_forward():
    network, call = made("rectified flow")
    with torch.no_grad():
        for seed in range(3):
            call(network, seed)
        x, t = of_times(0)
        expected = call(network, 0)
        assert torch.equal(network(x, t, None), expected)
        with pytest.raises(TypeError, match="unexpected keyword argument 'time'"):
            network(x, time=t)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            network(times=t)
        with pytest.raises(AssertionError, match="need to be divisible"):
            network(x[..., :7], t)


def test_a_filter_whose_numbers_were_changed_is_seen():
    network, call = made("EDM's SongUNet")
    with torch.no_grad():
        before = [call(network, 0) for _ in range(4)][-1]
        assert replays_of(network) == 1
        for name, buffer in network.named_buffers():
            if "resample_filter" in name:
                buffer.mul_(1.5)
        with without_tapes(network):
            expected = call(network, 0)
        assert torch.equal(call(network, 0), expected) and not torch.equal(expected, before)


def test_several_outputs_are_those_of_the_own_forward():
    torch.manual_seed(0)
    network = rectified_flow_pytorch.Unet(8, dim_mults=(1, 2), flash_attn=True, dim_proj_out_from_inner=4)
    ddpm_fast.accelerate(network)
    with torch.no_grad():
        found = [network(*of_times(0)) for _ in range(4)]
    assert all(len(out) == 2 for out in found) and replays_of(network) == 0


# Whole steps around a network


def process_around(kind: str):
    torch.manual_seed(0)
    if kind == "classes":
        network = classifier_free_guidance.Unet(8, num_classes=5, dim_mults=(1, 2))
        process = ddpm_fast.classifier_free_guidance.GaussianDiffusion
    else:
        network = upstream.Unet(8, dim_mults=(1, 2), self_condition=kind == "self-conditioned")
        process = ddpm_fast.GaussianDiffusion
    return process(ddpm_fast.accelerate(network), image_size=8, timesteps=8)


@pytest.mark.parametrize("kind", ["plain", "self-conditioned", "classes"])
def test_steps_around_upstreams_networks_are_recorded_with_the_same_bits(kind):
    found = []
    for graph in (False, None):
        process = process_around(kind)
        optimizer = torch.optim.Adam(process.parameters(), 1e-3)
        step = ddpm_fast.capture_training_step(process, optimizer, (2, 3, 8, 8), graph=graph)
        conditions = {"classes": torch.tensor([1, 4])} if kind == "classes" else {}
        torch.manual_seed(1)
        losses = [step((torch.rand(2, 3, 8, 8), None, conditions)).item() for _ in range(4)]
        images = process.sample(*([torch.tensor([1, 4])] if conditions else [2]), seed=3, progress=False, graph=graph)
        found.append((losses, images))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert step.explain_graphs() == "training replays a tape of operator calls"
    assert process.explain_graphs().startswith("sampling replays a tape of operator calls")


def test_steps_around_a_changed_network_are_not_recorded():
    process = process_around("plain")
    process.model.mid_block1.block1.norm = Shift(process.model.mid_block1.block1.norm)
    optimizer = torch.optim.Adam(process.parameters(), 1e-3)
    step = ddpm_fast.capture_training_step(process, optimizer, (2, 3, 8, 8))
    step(torch.rand(2, 3, 8, 8))
    assert step.explain_graphs().startswith("training runs step by step: of the model's model, mid_block1")
