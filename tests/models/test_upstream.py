"""Unet equals upstream's: parameters, output and every gradient."""

from __future__ import annotations

import copy
import inspect
import pickle
import random

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.models.derived_weights import inference_weights
from ddpm_fast.testing.networks import UNETS, assert_equal_networks, inputs, randomise


def drawn_unet(seed: int) -> dict:
    """A random small UNet configuration."""
    rng = random.Random(seed)
    stages = rng.randint(1, 3)
    config = dict(
        dim=rng.choice([8, 12, 20]),
        dim_mults=tuple(rng.choice([1, 2, 3]) for _ in range(stages)),
        channels=rng.choice([1, 2, 3, 4]),
        self_condition=rng.random() < 0.4,
        flash_attn=rng.random() < 0.5,
        sinusoidal_pos_emb_theta=rng.choice([100, 10000]),
        attn_heads=tuple(rng.randint(1, 4) for _ in range(stages)),
        attn_dim_head=tuple(rng.choice([4, 6, 8]) for _ in range(stages)),
        full_attn=tuple([rng.random() < 0.5 for _ in range(stages - 1)] + [True]),
    )
    if rng.random() < 0.3:
        config["init_dim"] = rng.choice([8, 10])
    return config


@pytest.mark.parametrize("name", UNETS)
def test_equals_upstream(upstream, name):
    config = UNETS[name]
    torch.manual_seed(3)
    theirs = upstream.Unet(**config)
    torch.manual_seed(3)
    ours = Unet(**config)
    factor = ours.downsample_factor
    assert factor == theirs.downsample_factor
    for a, b in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]), "one seed must give both the same initial weights"
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_networks(theirs, ours, config, (2 * factor, 3 * factor))


@pytest.mark.parametrize("seed", range(8))
def test_equals_upstream_drawn(upstream, seed):
    config = drawn_unet(seed)
    theirs, ours = upstream.Unet(**config), Unet(**config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    factor = ours.downsample_factor
    assert_equal_networks(theirs, ours, config, (factor * (1 + seed % 3), factor * 2))


@pytest.mark.parametrize("groups", [2, 4])
def test_group_norm_network_equals_upstream_1x(upstream_1x, groups):
    config = dict(dim=16, dim_mults=(1, 2), resnet_block_groups=groups)
    torch.manual_seed(3)
    theirs = upstream_1x.Unet(**config)
    torch.manual_seed(3)
    ours = Unet(**config, norm="group")
    for a, b in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_networks(theirs, ours, config, (4, 6))


def test_signature_begins_with_upstream(upstream):
    theirs = inspect.signature(upstream.Unet).parameters
    ours = inspect.signature(Unet).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


def test_attributes_are_upstream(upstream):
    for config in UNETS.values():
        theirs, ours = upstream.Unet(**config), Unet(**config)
        for name in ("channels", "out_dim", "self_condition", "random_or_learned_sinusoidal_cond", "downsample_factor"):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_dropout_drops_in_training_only():
    model = Unet(8, dim_mults=(1,), dropout=0.5)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_config_rebuilds_the_network():
    config = UNETS["full_attn_per_stage"]
    ours = Unet(**config)
    again = Unet(**ours.config)
    again.load_state_dict(ours.state_dict(), strict=True)


def test_copies_and_pickles():
    model = Unet(8, dim_mults=(1, 2))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    expected = model(x, t)
    assert torch.equal(copy.deepcopy(model)(x, t), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, t), expected)


def test_compiles_without_graph_breaks():
    model = Unet(8, dim_mults=(1, 2))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t), model(x, t), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = Unet(8, dim_mults=(1, 2))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([4, 5])
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t)
        out.float().sum().backward()
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())
    assert (out.float() - model(x, t)).abs().max() < 0.1


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_bfloat16_trains_and_samples_close_to_float32(upstream, norm):
    config = dict(dim=16, dim_mults=(1, 2, 4), dropout=0.2)
    torch.manual_seed(3)
    model = Unet(**config, norm=norm)
    theirs = upstream.Unet(**config).eval()
    randomise(model)
    x, t, _ = inputs(config, (16, 16))
    results = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(4)  # of the dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model.train()(x, t)
            (out.float() * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
            with torch.no_grad(), inference_weights(model.eval(), 1000):
                sampled = model(x, t)
            expected = theirs(x, t).dtype
        assert out.dtype == sampled.dtype == expected
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([out, sampled, torch.cat([gradient.flatten() for gradient in gradients])])
    for half, single in zip(results[1], results[0], strict=True):
        assert (half.float() - single).norm() < 0.03 * single.norm()


WRONG = {
    "channels": (
        lambda: (torch.randn(1, 4, 8, 8), torch.tensor([1])),
        ValueError,
        r"x must have shape \(B, 3, H, W\), got \(1, 4, 8, 8\)",
    ),
    "dims": (lambda: (torch.randn(3, 8, 8), torch.tensor([1])), ValueError, r"x must have shape"),
    "size": (lambda: (torch.randn(1, 3, 9, 8), torch.tensor([1])), ValueError, r"divisible by 2 .* got \(9, 8\)"),
    "integers": (
        lambda: (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([1])),
        TypeError,
        "x must be floating point, got torch.uint8",
    ),
    "time": (lambda: (torch.randn(2, 3, 8, 8), torch.tensor([1, 2, 3])), ValueError, r"time must have shape \(2,\)"),
    "device": (
        lambda: (torch.randn(1, 3, 8, 8), torch.tensor([1], device="meta")),
        ValueError,
        "time must be on the Unet's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        Unet(8, dim_mults=(1, 2))(*make())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(dim=7), "dim must be even"),
        (dict(dim=8, dim_mults=()), "dim_mults must have at least one"),
        (dict(dim=8, dim_mults=(1, 2), full_attn=(True,)), "full_attn must be one value or 2"),
        (dict(dim=8, norm="batch"), "norm must be one of rms, group, got 'batch'"),
        (dict(dim=12, norm="group"), "resnet_block_groups must divide"),
        (dict(dim=8, norm="group", resnet_block_groups=0), "resnet_block_groups must be a positive integer; got 0"),
        (dict(dim=-8), "^dim must be a positive integer; got -8"),
        (dict(dim=8, init_dim=0), "init_dim must be a positive integer; got 0"),
        (dict(dim=8, out_dim=0), "out_dim must be a positive integer; got 0"),
        (dict(dim=8, channels=0), "channels must be a positive integer; got 0"),
        (dict(dim=8, dim_mults=(1, 0)), "each entry of dim_mults must be a positive integer; got 0"),
        (dict(dim=8, attn_heads=0), "attn_heads must be a positive integer; got 0"),
        (dict(dim=8, dim_mults=(1, 2), attn_heads=(4, 0)), "each entry of attn_heads must be a positive integer"),
        (dict(dim=8, attn_dim_head=-32), "attn_dim_head must be a positive integer; got -32"),
        (dict(dim=8, dropout=1.5), r"dropout must be a number in \[0, 1\]; got 1.5"),
        (dict(dim=8, sinusoidal_pos_emb_theta=0), "sinusoidal_pos_emb_theta must be a number in"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Unet(**kwargs)
