"""3×3 convolutions of stride 2: the CPU's against torch's, forward and in every gradient; errors, the choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ddpm_fast
from ddpm_fast import use_backend
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.ops.strided_conv import reference
from ddpm_fast.ops.strided_conv.op import _strided_conv_gradients, strided_conv
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import BackendRefused, watch_choices
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

# B, C, K, H, W: one pixel, odd sides, channels that fill no vector or panel, several panels and blocks of pixels
SHAPES = [(1, 1, 1, 3, 3), (3, 5, 7, 9, 4), (2, 33, 20, 7, 13), (1, 70, 68, 12, 11), (2, 48, 96, 32, 30)]


def make(shape, dtype=torch.float32, bias: bool = True) -> dict[str, torch.Tensor]:
    B, C, K, H, W = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(B, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(K, C, 3, 3, generator=generator) / (9 * C) ** 0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(K, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def run(function, tensors, padding: int) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, padding=padding)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, padding, instruction_set):
    for dtype, bias in ((torch.float32, True), (torch.float32, False), (torch.float16, True), (torch.bfloat16, True)):
        tensors = make(shape, dtype, bias)
        with use_backend("native"), poisoned_memory():
            actual = run(strided_conv, tensors, padding)
        expected = run(reference.strided_conv, tensors, padding)
        truth = run(reference.strided_conv, {name: t.double() for name, t in tensors.items()}, padding)
        assert actual["out"].dtype == dtype and actual["out"].is_contiguous(memory_format=torch.channels_last)
        for name in truth:
            assert actual[name].shape == truth[name].shape
            assert_close_to_truth(actual[name], expected[name], truth[name], name=f"{name}, {dtype}")


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 33, 4, 6), (1, 16, 16, 60, 58)])
def test_gradients_of_any_shape(shape, padding, instruction_set):
    """Those of shapes, too, for which torch's are the faster ones."""
    needs = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    tensors = make(shape)
    expected = run(reference.strided_conv, tensors, padding)
    truth = run(reference.strided_conv, {name: t.double() for name, t in tensors.items()}, padding)
    grad = torch.linspace(-1, 1, expected["out"].numel(), dtype=torch.float64).reshape(expected["out"].shape).float()
    grad = grad.contiguous(memory_format=torch.channels_last)
    for needed in needs:
        with poisoned_memory():
            made = _strided_conv_gradients.native(grad, tensors["x"], tensors["weight"], padding, list(needed))
        for name, gradient, is_needed in zip(tensors, made, needed, strict=True):
            if is_needed:
                assert_close_to_truth(gradient, expected[name], truth[name], name=name)
            else:
                assert gradient.numel() == 0


def test_gradients_are_native_where_the_convolution_is(monkeypatch):
    calls, native = [], _strided_conv_gradients.native
    monkeypatch.setattr(
        _strided_conv_gradients, "native", lambda *given: calls.append(given[-1]) or native(*given), raising=False
    )
    run(strided_conv, make((8, 8, 8, 16, 16)), 1)
    run(strided_conv, make((8, 8, 8, 64, 64)), 1)  # many pixels
    run(strided_conv, make((8, 8, 8, 16, 16), torch.bfloat16), 1)
    frozen = make((8, 8, 8, 16, 16))
    x = frozen["x"].requires_grad_()
    strided_conv(**frozen).sum().backward()
    assert x.grad.shape == x.shape and calls == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    tensors, before = make(SHAPES[-1]), torch.get_num_threads()
    with use_backend("native"):
        expected = run(strided_conv, tensors, 1)
        torch.set_num_threads(threads)
        try:
            found = run(strided_conv, tensors, 1)
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_second_derivatives():
    leaves = [tensor.requires_grad_() for tensor in make((2, 3, 4, 6, 8)).values()]
    found = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            out = strided_conv(*leaves)
        (dx,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_opcheck():
    x, weight, bias = (tensor.requires_grad_() for tensor in make((1, 4, 3, 5, 6)).values())
    torch.library.opcheck(torch.ops.ddpm_fast.native_strided_conv.default, (x, weight, bias, 1))
    grad = strided_conv(x, weight, padding=1).detach().contiguous(memory_format=torch.channels_last)
    for laid_out in (weight, weight.contiguous(memory_format=torch.channels_last), weight.bfloat16()):
        for needs in ([True, False, True], [False, True, False]):
            given = (grad, x.detach(), laid_out.detach(), 1, needs)
            torch.library.opcheck(torch.ops.ddpm_fast.native_strided_conv_gradients.default, given)


def test_the_biass_gradient_has_its_own_dtype():
    """A weight in half precision rounds its own gradient alone."""
    tensors = make((2, 8, 8, 8, 8))
    tensors["weight"], tensors["bias"] = tensors["weight"].half(), tensors["bias"].requires_grad_()
    (1e4 * strided_conv(**tensors)).sum().backward()
    assert torch.equal(tensors["bias"].grad, torch.full((8,), 32 * 1e4))  # past the largest number of float16


# Batch, side and dtype → what runs.
CHOICES = {
    (8, 16, torch.float32): "native",
    (8, 64, torch.float32): "reference",  # many pixels
    (1, 8, torch.float32): "native",
    (8, 16, torch.bfloat16): "reference",
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice(case):
    batch, side, dtype = case
    with watch_choices() as choices:
        strided_conv(**make((batch, 8, 8, side, side), dtype))
    assert [implementation for _, implementation, _ in choices] == [CHOICES[case]]


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_of_a_network(padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, stride=2, padding=padding)
    x = torch.randn(4, 24, 16, 16, requires_grad=True)
    found = []
    for _ in range(2):
        out = conv(x)
        found.append([out, *torch.autograd.grad(out.square().mean(), [x, conv.weight, conv.bias])])
        ddpm_fast.accelerate(conv)
    assert [line.runs for line in table(conv)] == ["strided_conv"]
    for eager, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)
    small = x[:, :, : 2 - padding, : 2 - padding]
    if padding == 0:
        with pytest.raises(RuntimeError, match="size"):  # torch's own words
            conv(small)
    else:
        assert conv(small).shape == (4, 40, 1, 1)


@pytest.mark.parametrize(
    "settings", [{"stride": 3}, {"stride": (2, 1)}, {"stride": 2, "padding": 2}, {"stride": 2, "dilation": 2}]
)
def test_other_convolutions_stay(settings):
    conv = ddpm_fast.accelerate(nn.Conv2d(4, 4, 3, **settings))
    assert type(conv) is nn.Conv2d


def test_wrong_arguments():
    x, weight, bias = make((1, 4, 3, 5, 6)).values()
    for message, arguments, padding in (
        (r"padding must be 0 or 1, got 2", (x, weight, bias), 2),
        (r"x must have shape \(B, C, H, W\), H and W at least 3, got \(1, 4, 2, 6\)", (x[:, :, :2], weight, bias), 0),
        (r"weight must have shape \(K, 4, 3, 3\), got \(3, 4, 1, 1\)", (x, weight[..., :1, :1], bias), 1),
        (r"bias must have shape \(3,\), got \(2,\)", (x, weight, bias[:2]), 1),
    ):
        with pytest.raises(ValueError, match=message):
            strided_conv(*arguments, padding=padding)
    with pytest.raises(TypeError, match="x must be a tensor, got int"):
        strided_conv(3, weight)
    with use_backend("native"), pytest.raises(BackendRefused, match="x is not channels-last"):
        strided_conv(x.contiguous(), weight, bias)
    operator = torch.ops.ddpm_fast.native_strided_conv
    for wrong in ((x.contiguous(), weight, bias, 1), (x, weight[:, :2], bias, 1), (x, weight, bias, 2)):
        with pytest.raises(ValueError, match="x|weight|padding"):
            operator(*wrong)
    grad = strided_conv(x, weight).contiguous(memory_format=torch.channels_last)
    gradients = torch.ops.ddpm_fast.native_strided_conv_gradients
    for wrong in ((grad[:, :2], x, weight, 1), (grad, x, weight[:, :2], 1), (grad, x, weight, 2), (grad, x, weight, 0)):
        with pytest.raises(ValueError, match="grad|weight|padding"):
            gradients(*wrong, [True] * 3)
