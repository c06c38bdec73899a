"""EDM's networks, as physicsnemo has them, accelerated: outputs, every gradient, and what keeps its own forward."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.utils.checkpoint

import ddpm_fast
from ddpm_fast.integrations import edm as family
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.testing.accelerated import check_accelerated, outputs_and_gradients, randomise_all
from ddpm_fast.testing.foreign_packages import import_edm
from ddpm_fast.testing.truth import assert_draws_close_to_truth

edm = import_edm()
PRE = {"preactivation_block"}
ATTENTION = {"attention": True, "num_heads": 2}
BLOCKS = {
    "plain": {},
    "wider, skip scale": {"out_channels": 48, "skip_scale": 0.5**0.5, "eps": 1e-6},
    "embedding added": {"adaptive_scale": False},
    "attention": {**ATTENTION, "skip_scale": 0.5**0.5},
    "up": {"up": True},
    "up, projected": {"up": True, "resample_proj": True, **ATTENTION},
    "down": {"down": True, "out_channels": 48},
    "bias in the convolution": {"fused_conv_bias": True},
}


def block(**options):
    from physicsnemo.nn.module.unet_layers import UNetBlock

    torch.manual_seed(0)
    return UNetBlock(**{"in_channels": 32, "out_channels": 32, "emb_channels": 20, **options})


def block_inputs(batch=2, side=8):
    torch.manual_seed(1)
    return torch.randn(batch, 32, side, side), torch.randn(batch, 20)


def network(name, **options):
    torch.manual_seed(0)
    small = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_blocks": 1}
    return getattr(edm, name)(**{**small, "channel_mult": [1, 2], "attn_resolutions": [4], "dropout": 0.0, **options})


def network_inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), torch.rand(2)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "unbiased variance"])
def test_blocks(name, training):
    check_accelerated(block(**BLOCKS[name]).train(training), block_inputs(), runs=PRE)


@pytest.mark.parametrize("name", ["SongUNet", "DhariwalUNet"])
def test_networks(name):
    options = {"encoder_type": "skip", "decoder_type": "skip"} if name == "SongUNet" else {"model_channels": 64}
    check_accelerated(network(name, **options), network_inputs(), runs=PRE)


ROWS = {
    "added": ("SongUNet", {}),
    "scale and shift": ("DhariwalUNet", {"model_channels": 64}),
    "blocks that run again in backward": ("SongUNet", {"checkpoint_level": 1}),
    "one noise level for all images": ("SongUNet", {}),
}


@pytest.mark.parametrize("kind", ROWS)
def test_one_product_makes_the_rows_of_all_blocks(kind, monkeypatch):
    name, options = ROWS[kind]
    x, t = network_inputs()
    args, products = (x, t[:1] if "one" in kind else t), []
    made = network(name, **options)
    product = family.linears_of_one_input
    monkeypatch.setattr(family, "linears_of_one_input", lambda *a: products.append(len(a[1])) or product(*a))
    check_accelerated(made, args, runs=PRE)
    blocks = [module for module in made.modules() if type(module).__name__ == "UNetBlock"]
    # Accelerated, and a copy of it; not as it was, by reference, or restored.
    assert products == ([] if "again" in kind else [len(blocks)] * 2)


def test_a_block_that_is_called_outside_makes_its_own_row():
    made, args = ddpm_fast.accelerate(randomise_all(network("SongUNet"))), network_inputs()
    inside, alone = [], []
    first = next(module for module in made.modules() if type(module).__name__ == "UNetBlock")
    hook = first.register_forward_hook(lambda block, given, out: inside.append((given, out)))
    made(*args)
    hook.remove()
    ((given, out),) = inside
    alone = first(*given)
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)
    first.affine.register_forward_hook(lambda layer, given, out: out + 1)
    eager = ddpm_fast.restore(copy.deepcopy(made))
    torch.testing.assert_close(made(*args), eager(*args), rtol=1e-4, atol=1e-4)


def _in_a_checkpoint(block):
    block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def _in_a_reentrant_checkpoint(block):
    block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=True)


def _without_gradients(block):
    block.forward = torch.no_grad()(block.forward)


def _with_hooks_that_stop_gradients(block):
    block.register_forward_pre_hook(lambda *_: (torch.set_grad_enabled(False), None)[1])
    block.register_forward_hook(lambda *_: (torch.set_grad_enabled(True), None)[1])


CHANGES = (_in_a_checkpoint, _in_a_reentrant_checkpoint, _without_gradients, _with_hooks_that_stop_gradients)


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["SongUNet", "DhariwalUNet"])
def test_blocks_that_are_called_in_another_way(name, change, which):
    """Rows of the other blocks have their gradients whatever is done around one of them."""
    found = []
    for is_accelerated in (False, True):
        made = randomise_all(network(name))
        made = ddpm_fast.accelerate(made) if is_accelerated else made
        change([module for module in made.modules() if type(module).__name__ == "UNetBlock"][which])
        found.append(outputs_and_gradients(made, network_inputs()))
    eager, fast = found
    assert fast.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=key)


def test_a_block_in_two_places_draws_twice(monkeypatch):
    made = ddpm_fast.accelerate(network("SongUNet", dropout=0.5))
    seeds, block_op = [], family.unchecked_preactivation_block
    monkeypatch.setattr(
        family, "unchecked_preactivation_block", lambda *a, **k: seeds.append(int(k["seed"])) or block_op(*a, **k)
    )
    names = [name for name in made.enc if "block" in name and made.enc[name].attn is None]
    made.dec["8x8_twice"] = made.enc[names[0]]
    made(*network_inputs())
    assert len(set(seeds)) == len(seeds)


def test_an_error_inside_leaves_nothing_behind():
    made, (x, t) = ddpm_fast.accelerate(network("SongUNet")), network_inputs()
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        made(x[:, :2], t)
    assert not family._running
    assert made(x, t).shape == x.shape


def test_dropout_of_a_network_draws_fresh_numbers():
    made, args = ddpm_fast.accelerate(randomise_all(network("SongUNet", dropout=0.5))), network_inputs()
    torch.manual_seed(3)
    first, second = made(*args), made(*args)
    torch.manual_seed(3)
    assert torch.equal(made(*args), first) and not torch.equal(first, second)


def test_first_and_last_layers():
    made, args = randomise_all(network("SongUNet")), network_inputs()
    runs = {line.path: line.runs for line in table(ddpm_fast.accelerate(made))}
    assert (runs["enc.8x8_conv"], runs["dec.8x8_aux_norm"]) == ("stem_conv", "group_norm_silu")
    assert runs["dec.8x8_aux_conv"] == "conv3x3"
    for training in (True, False):
        eager = ddpm_fast.restore(copy.deepcopy(made))
        for each in (made, eager):
            each.train(training)
        torch.testing.assert_close(made(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_dropout_draws_fresh_numbers_in_training():
    made = ddpm_fast.accelerate(randomise_all(block(dropout=0.5)))
    args = block_inputs()
    assert not torch.equal(made(*args), made(*args))
    made.eval()
    assert torch.equal(made(*args), made(*args))


def test_bfloat16_autocast():
    def call(network, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return network(*args)

    truths, eager, fused = [], [], []
    for seed in range(4):
        made, args = network("SongUNet"), network_inputs()
        randomise_all(made, seed=seed)
        made.amp_mode = True
        truths.append(outputs_and_gradients(copy.deepcopy(made).double(), [a.double() for a in args]))
        eager.append(outputs_and_gradients(made, args, call=call))
        fused.append(outputs_and_gradients(ddpm_fast.accelerate(made), args, call=call))
    assert_draws_close_to_truth(fused, eager, truths)


def test_autocast_without_amp_mode_is_refused_as_by_the_package():
    made = ddpm_fast.accelerate(block())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="amp_mode"):
        made(*block_inputs())


def test_a_filter_of_other_taps_keeps_its_own_forward():
    made, args = randomise_all(network("SongUNet", resample_filter=[1, 3, 3, 1])), network_inputs()
    eager = copy.deepcopy(made)
    reasons = {line.reason for line in table(ddpm_fast.accelerate(made)) if line.cls == "UNetBlock"}
    assert reasons == {None, "conv0: its resampling filter is not of two equal taps"}
    torch.testing.assert_close(made(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_a_filter_is_read_again_after_it_was_written():
    made, (x, emb) = ddpm_fast.accelerate(randomise_all(block(up=True))), block_inputs()
    eager = ddpm_fast.restore(copy.deepcopy(made))
    made(x, emb)
    for each in (made, eager):
        with torch.no_grad():
            each.conv0.resample_filter.mul_(torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(made(x, emb), eager(x, emb), rtol=1e-4, atol=1e-4)
    (line,) = [line for line in table(made) if line.cls == "UNetBlock"]
    assert line.reason == "conv0: its resampling filter is not of two equal taps"


REFUSALS = {
    "norm0: it has hooks": lambda made: made.norm0.register_forward_hook(lambda module, args, out: 2 * out),
    "norm1: its activation is silu": lambda made: (setattr(made.norm1, "act", "silu"), None)[1],
    "conv1: it is a Identity": lambda made: setattr(made, "conv1", torch.nn.Identity()),
    "profile_mode marks its parts": None,
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_changed_modules_are_called(reason):
    if REFUSALS[reason] is None:
        made = block(profile_mode=True)
        assert type(ddpm_fast.accelerate(made)).__dict__.get("_ddpm_fast") is None
        return
    made = randomise_all(block())
    eager, args = copy.deepcopy(made), block_inputs()
    ddpm_fast.accelerate(made)
    for each in (made, eager):
        REFUSALS[reason](each)
    (line,) = [line for line in table(made) if line.cls == "UNetBlock"]
    assert line.runs is None and line.reason == reason
    torch.testing.assert_close(made(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_a_hook_on_the_attention_inside_is_called():
    made, calls = ddpm_fast.accelerate(block(**ATTENTION)), []
    made.attn.register_forward_hook(lambda module, args, out: calls.append(1))
    made(*block_inputs())
    assert calls == [1]
