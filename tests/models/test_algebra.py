"""Layers that run another form of upstream's formula: each equals the plain form, output and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import Unet, use_backend
from ddpm_fast.models.attention import Attention, LinearAttention
from ddpm_fast.models.convolution import Downsample, Upsample
from ddpm_fast.models.embeddings import linears_of_one_input
from ddpm_fast.models.resnet import ResnetBlock
from ddpm_fast.ops.norm_linear.op import linears
from ddpm_fast.ops.resnet_block.composite import convs_of_parts
from ddpm_fast.testing.truth import assert_close_to_truth

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MEMORY_FORMATS = pytest.mark.parametrize("layout", LAYOUTS)


def gradients(function, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, or several side by side, and the gradient of every leaf."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    out = function(**leaves)
    if isinstance(out, tuple):
        out = torch.cat([part.flatten() for part in out])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def assert_same_function(ours, plain, leaves: dict[str, torch.Tensor]) -> None:
    """By the suite's rule of tolerance, against the plain form in float64."""
    actual, expected = gradients(ours, leaves), gradients(plain, leaves)
    truth = gradients(plain, {name: leaf.double() for name, leaf in leaves.items()})
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


def normal(*shape: int, layout: str = "nchw", seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x


def plain_upsample(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


@MEMORY_FORMATS
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 3, 1, 1), (1, 1, 1, 7), (3, 8, 8, 5)], ids=str)
def test_upsampling_is_one_transposed_convolution(shape, layout):
    module = Upsample(shape[1], 6)

    def ours(x, weight, bias):
        return torch.func.functional_call(module, {"1.weight": weight, "1.bias": bias}, (x,))

    leaves = {"x": normal(*shape, layout=layout), "weight": normal(6, shape[1], 3, 3, seed=1), "bias": normal(6)}
    assert_same_function(ours, plain_upsample, leaves)
    with torch.no_grad():
        truth = plain_upsample(**{name: leaf.double() for name, leaf in leaves.items()})
        assert_close_to_truth(ours(**leaves), plain_upsample(**leaves), truth)


def test_upsampling_keeps_neither_the_large_map_nor_its_taps():
    module, x = Upsample(4, 6), normal(2, 4, 8, 8).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), module[1].weight.data_ptr()}


@MEMORY_FORMATS
def test_downsampling_is_one_strided_convolution(upstream, layout):
    module, theirs = Downsample(5, 6), upstream.Downsample(5, 6)
    theirs.load_state_dict(module.state_dict())

    def run(module):
        return lambda x, **parameters: torch.func.functional_call(module, parameters, (x,))

    parameters = {f"1.{name}": parameter for name, parameter in module[1].named_parameters()}
    assert_same_function(run(module), run(theirs), {"x": normal(2, 5, 6, 8, layout=layout), **parameters})


@MEMORY_FORMATS
@pytest.mark.parametrize("widths", [(4, 6), (3, 5, 2)], ids=str)
def test_convolutions_of_maps_side_by_side(widths, layout):
    leaves = {f"part{i}": normal(2, width, 5, 4, layout=layout, seed=i) for i, width in enumerate(widths)}
    leaves |= {"w3": normal(7, sum(widths), 3, 3), "w1": normal(5, sum(widths), 1, 1), "bias": normal(5)}

    def parts_of(leaves):
        return tuple(leaves[f"part{i}"] for i in range(len(widths)))

    def ours(w3, w1, bias, **parts):
        return convs_of_parts(parts_of(parts), (w3, None), (w1, bias))

    def plain(w3, w1, bias, **parts):
        h = torch.cat(parts_of(parts), dim=1)
        return F.conv2d(h, w3, padding=1), F.conv2d(h, w1, bias)

    assert_same_function(ours, plain, leaves)
    kept = []
    tracked = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(**tracked)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for name, t in leaves.items() if name != "bias"}
    with torch.no_grad():
        for a, b in zip(ours(**leaves), plain(**leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["part0", "part1", "w3", "bias"])
def test_only_the_gradient_that_is_asked_for(wanted):
    leaves = {"part0": normal(2, 3, 4, 4), "part1": normal(2, 2, 4, 4), "w3": normal(4, 5, 3, 3), "bias": normal(4)}
    leaves[wanted].requires_grad_()

    def loss(out):
        return (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()

    parts = (leaves["part0"], leaves["part1"])
    (out,) = convs_of_parts(parts, (leaves["w3"], leaves["bias"]))
    plain = F.conv2d(torch.cat(parts, dim=1), leaves["w3"], leaves["bias"], padding=1)
    (actual,), (expected,) = (torch.autograd.grad(loss(y), leaves[wanted]) for y in (out, plain))
    torch.testing.assert_close(actual, expected)


def test_linear_layers_of_one_input():
    modules = [nn.Linear(6, width) for width in (4, 10, 2)]
    names = [f"{kind}{i}" for kind in ("weight", "bias") for i in range(3)]
    leaves = {"x": normal(3, 6)} | {name: getattr(modules[int(name[-1])], name[:-1]) for name in names}

    def ours(x, **parameters):
        return linears(x, *([parameters[f"{kind}{i}"] for i in range(3)] for kind in ("weight", "bias")))

    def plain(x, **parameters):
        return torch.cat([F.linear(x, parameters[f"weight{i}"], parameters[f"bias{i}"]) for i in range(3)], dim=1)

    assert_same_function(ours, plain, leaves)
    torch.testing.assert_close(linears_of_one_input(leaves["x"], modules), plain(**leaves))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_residual_block_takes_maps_side_by_side_and_rows_of_the_time_embedding(low_memory):
    block = ResnetBlock(9, 4, time_emb_dim=6, low_memory=low_memory)
    x, skip, t = normal(2, 5, 4, 4), normal(2, 4, 4, 4), normal(2, 6)
    expected = block(torch.cat((x, skip), dim=1), t)
    row = block.mlp(t).chunk(2, dim=1)
    torch.testing.assert_close(block.compute(x, row, skip), expected)
    conv = nn.Conv2d(4, 3, 1)
    torch.testing.assert_close(block.compute(x, row, skip, conv), conv(expected))
    one = block.mlp(t[:1]).chunk(2, dim=1)
    torch.testing.assert_close(block.compute(x, one, skip), block(torch.cat((x, skip), dim=1), t[:1]))


def test_a_replaced_projection_of_the_time_embedding_runs():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, expected = (Unet(8, dim_mults=(1, 2)) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    linear = model.mid_block1.mlp[1]
    model.mid_block1.mlp[1] = Doubled(linear.in_features, linear.out_features)
    model.mid_block1.mlp[1].load_state_dict(linear.state_dict())
    with torch.no_grad():
        for p in expected.mid_block1.mlp.parameters():
            p.mul_(2)
    x, t = normal(2, 3, 8, 8), torch.tensor([4, 500])
    torch.testing.assert_close(model(x, t), expected(x, t))


@pytest.mark.parametrize("attention", [Attention, LinearAttention])
def test_attention_adds_a_residual(upstream, attention):
    ours, theirs = attention(6, heads=2, dim_head=4), getattr(upstream, attention.__name__)(6, heads=2, dim_head=4)
    theirs.load_state_dict(ours.state_dict())
    x, residual = normal(2, 6, 3, 4), normal(2, 6, 3, 4, seed=1)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.compute(x, residual), theirs(x) + residual)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_backward_outside_of_autocast(memory):
    """What is kept has the dtype that forward ran in: backward needs no autocast of its own."""
    model = Unet(8, dim_mults=(1, 2), memory=memory)
    x, t = normal(2, 3, 8, 8), torch.tensor([4, 500])
    model(x, t).square().mean().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t)
    out.float().square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), name
    norm = sum(g.square().sum() for g in exact.values()).sqrt()
    distance = sum((p.grad - exact[name]).square().sum() for name, p in model.named_parameters()).sqrt()
    assert distance < 0.05 * norm


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_some_parameters_without_gradient(memory):
    model = Unet(8, dim_mults=(1, 2), memory=memory)
    expected = copy.deepcopy(model)
    x, t = normal(1, 3, 8, 8), torch.tensor([4])
    expected(x, t).square().mean().backward()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    model(x, t).square().mean().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        else:
            assert p.grad is None


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_network_under_torchs_checkpoint(backend):
    """Saved tensors may be asked for only once there."""
    torch.manual_seed(0)
    unet, images, t = Unet(16, dim_mults=(1, 2)), torch.randn(2, 3, 16, 16), torch.tensor([3, 5])
    gradients = []
    with use_backend(backend):
        for run in (unet, lambda *inputs: checkpoint(unet, *inputs, use_reentrant=False)):
            x = images.clone().requires_grad_()
            run(x, t).square().mean().backward()
            gradients.append(x.grad)
    assert torch.equal(*gradients)
