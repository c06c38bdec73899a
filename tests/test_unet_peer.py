"""Unet equals the peer's: parameters, output and every gradient."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import UNETS, drawn_unet
from helpers import assert_close_to_truth

from ddpm_fast import Unet, use_backend
from ddpm_fast.frozen import frozen_weights


def randomise(module: torch.nn.Module) -> None:
    """Random numbers in every parameter, gains included: ones and zeros hide wrong gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim < 2 or p.shape[0] == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def inputs(config: dict, size: tuple[int, int], batch: int = 3):
    generator = torch.Generator().manual_seed(2)
    channels = config.get("channels", 3)
    x = torch.randn(batch, channels, *size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    x_self_cond = torch.randn(x.shape, generator=generator) if config.get("self_condition") else None
    return x, t, x_self_cond


def run(model, x, t, x_self_cond):
    """Output, and the gradient with respect to the input and every parameter."""
    dtype = next(model.parameters()).dtype
    x = x.detach().clone().to(dtype).requires_grad_()
    x_self_cond = None if x_self_cond is None else x_self_cond.to(dtype)
    out = model(x, t, x_self_cond)
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), {"x": x.grad, **grads}


def assert_equal_networks(theirs, ours, config, size):
    truth_model = copy.deepcopy(theirs).double()
    args = inputs(config, size)
    truth, truth_grads = run(truth_model, args[0], args[1].double(), args[2])
    expected, expected_grads = run(theirs, *args)
    # A whole network rounds in other places than the peer, and more where native code convolves by Winograd's method;
    # a wrong formula is off by far more than this many ulp.
    for backend, floor in (("reference", 128), (None, 256)):
        ours.zero_grad()
        with use_backend(backend):
            actual, actual_grads = run(ours, *args)
        assert_close_to_truth(actual, expected, truth, name="output")
        assert actual_grads.keys() == expected_grads.keys()
        for name in expected_grads:
            assert_close_to_truth(actual_grads[name], expected_grads[name], truth_grads[name], name=name, floor=floor)


@pytest.mark.parametrize("name", UNETS)
def test_equals_peer(peer, name):
    config = UNETS[name]
    torch.manual_seed(3)
    theirs = peer.Unet(**config)
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
def test_equals_peer_drawn(peer, seed):
    config = drawn_unet(seed)
    theirs, ours = peer.Unet(**config), Unet(**config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    factor = ours.downsample_factor
    assert_equal_networks(theirs, ours, config, (factor * (1 + seed % 3), factor * 2))


@pytest.mark.parametrize("groups", [2, 4])
def test_group_norm_network_equals_peer_1x(peer_1x, groups):
    config = dict(dim=16, dim_mults=(1, 2), resnet_block_groups=groups)
    torch.manual_seed(3)
    theirs = peer_1x.Unet(**config)
    torch.manual_seed(3)
    ours = Unet(**config, norm="group")
    for a, b in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_networks(theirs, ours, config, (4, 6))


def test_signature_begins_with_the_peers(peer):
    theirs = inspect.signature(peer.Unet).parameters
    ours = inspect.signature(Unet).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


def test_attributes_are_the_peers(peer):
    for config in UNETS.values():
        theirs, ours = peer.Unet(**config), Unet(**config)
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
    explanation = torch._dynamo.explain(model)(x, t)
    assert explanation.graph_break_count == 0, explanation.break_reasons
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
def test_bfloat16_trains_and_samples_close_to_float32(peer, norm):
    config = dict(dim=16, dim_mults=(1, 2, 4), dropout=0.2)
    torch.manual_seed(3)
    model = Unet(**config, norm=norm)
    theirs = peer.Unet(**config).eval()
    randomise(model)
    x, t, _ = inputs(config, (16, 16))
    results = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(4)  # of the dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model.train()(x, t)
            (out.float() * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
            with torch.no_grad(), frozen_weights(model.eval(), 1000):
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
    "time": (lambda: (torch.randn(2, 3, 8, 8), torch.tensor([1])), ValueError, r"time must have shape \(2,\)"),
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
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Unet(**kwargs)
