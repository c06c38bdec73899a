"""Unet(memory="low") computes the same as "fast" and keeps less; the convolution of a recomputed input is exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Unet
from ddpm_fast.ops.resnet_block.composite import conv_of_recomputed
from ddpm_fast.runtime import extension
from ddpm_fast.testing.networks import UNETS, assert_equal_networks, inputs, randomise, run
from ddpm_fast.testing.truth import assert_close_to_truth


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def single_steps(request):
    """Blocks composed of their steps, as on CUDA; tests whose names say native have the extension."""
    if "native" not in request.node.name:
        request.getfixturevalue("without_native")


@pytest.mark.parametrize("name", ["plain", "full_attn_per_stage", "self_condition", "one_stage"])
@pytest.mark.parametrize("norm", ["rms", "group"])
def test_low_equals_fast(name, norm):
    config = {**UNETS[name], "norm": norm, "resnet_block_groups": 4}
    fast, low = Unet(**config), Unet(**config, memory="low")
    randomise(fast)
    low.load_state_dict(fast.state_dict(), strict=True)
    args = inputs(config, (2 * fast.downsample_factor,) * 2)
    (out, grads), (out_low, grads_low) = run(fast, *args), run(low, *args)
    assert torch.equal(out, out_low)
    for key in grads:
        torch.testing.assert_close(grads_low[key], grads[key], rtol=1e-4, atol=1e-5, msg=key)


def test_low_equals_upstream(upstream):
    config = UNETS["plain"]
    theirs, ours = upstream.Unet(**config), Unet(**config, memory="low")
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_networks(theirs, ours, config, (4, 6))


def test_low_redraws_the_same_dropout_in_backward():
    config = dict(dim=8, dim_mults=(1, 2), dropout=0.4)
    fast, low = Unet(**config), Unet(**config, memory="low")
    low.load_state_dict(fast.state_dict())
    args = inputs(config, (4, 4))
    results = []
    for model in (fast, low):
        torch.manual_seed(5)
        results.append(run(model, *args))
    (out, grads), (out_low, grads_low) = results
    assert torch.equal(out, out_low)
    for key in grads:
        torch.testing.assert_close(grads_low[key], grads[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 1)])
def test_convolution_of_a_recomputed_input(kernel, padding, with_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, 7, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, kernel, kernel, generator=generator, requires_grad=True)
    bias = torch.randn(4, generator=generator, requires_grad=True) if with_bias else None
    leaves = [t for t in (x, weight, bias) if t is not None]

    def gradients(out):
        return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum(), leaves)

    plain = F.conv2d(torch.tanh(x), weight, bias, padding=padding)
    ours = conv_of_recomputed(torch.tanh(x), torch.tanh, (x,), weight, bias)
    assert torch.equal(ours, plain)
    for a, b in zip(gradients(ours), gradients(plain), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_and_not_wrong():
    model = Unet(8, dim_mults=(1, 2))
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x, torch.tensor([4])).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="for second derivatives|backward is not implemented"):
        dx.square().sum().backward()


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
def test_native_code_refuses_a_second_derivative():
    model, x = Unet(8, dim_mults=(1, 2)), torch.randn(1, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="native kernel's gradient cannot be differentiated"):
        torch.autograd.grad(model(x, torch.tensor([4])).sum(), x, create_graph=True)


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_native_blocks_run_again_in_backward(dropout):
    fast, low = (Unet(8, dim_mults=(1, 2), dropout=dropout, memory=memory) for memory in ("fast", "low"))
    low.load_state_dict(fast.state_dict())
    args = inputs({}, (8, 8))
    results, runs = [], []
    for model in (fast, low):
        torch.manual_seed(5)
        with Calls() as calls:
            results.append(run(model, *args))
        runs.append(calls.names.count("ddpm_fast::native_resnet_block"))
    (out, grads), (out_low, grads_low) = results
    assert torch.equal(out, out_low)
    assert all(torch.equal(grads_low[name], grads[name]) for name in grads)
    assert runs[1] == 2 * runs[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_under_autocast(dtype):
    model = Unet(8, dim_mults=(1, 2), memory="low")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([4, 5])
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t)
        out.float().sum().backward()
    assert out.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.release(but=lambda memory: memory == "low")
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_training_compiles_without_graph_breaks(memory):
    model = Unet(8, dim_mults=(1,), memory=memory)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    expected = model(x, t)
    expected.sum().backward()
    gradient = model.init_conv.weight.grad.clone()
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x, t)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.init_conv.weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_no_gradient_needs_no_recomputation():
    model = Unet(8, dim_mults=(1, 2), memory="low")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    with torch.no_grad():
        expected = model(x, t)
    assert_close_to_truth(model(x, t).detach(), expected, expected.double())


def test_unknown_memory_is_named():
    with pytest.raises(ValueError, match="memory must be one of fast, low, got 'tiny'"):
        Unet(8, memory="tiny")
