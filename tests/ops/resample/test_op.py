"""Resampling joined with its convolution: every backend against the reference, in output and every gradient."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import use_backend
from ddpm_fast.ops.resample import composite, reference
from ddpm_fast.ops.resample.op import downsample_conv, upsample_conv
from ddpm_fast.runtime import extension
from ddpm_fast.testing.truth import assert_close_to_truth

BACKENDS = ["reference", None, *(["native"] if extension.load() is not None else [])]
OPS = {"upsample_conv": (upsample_conv, 3), "downsample_conv": (downsample_conv, 2)}


def make(window: int, shape=(2, 5, 6, 8), out: int = 7) -> dict[str, torch.Tensor]:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return {"x": x, "weight": torch.randn(out, shape[1], window, window), "bias": torch.randn(out)}


def run(function, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_reference(name, backend):
    function, window = OPS[name]
    tensors = make(window)
    with use_backend(backend):
        actual = run(function, tensors)
        with torch.no_grad():
            torch.testing.assert_close(function(**tensors), actual["out"])
    expected = run(getattr(reference, name), tensors)
    truth = run(getattr(reference, name), {key: tensor.double() for key, tensor in tensors.items()})
    for key in truth:
        assert_close_to_truth(actual[key], expected[key], truth[key], name=key)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_of_torchs_form(name):
    function, window = OPS[name]
    leaves = [tensor.double().requires_grad_() for tensor in make(window, (1, 2, 2, 4), 2).values()]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", OPS)
def test_backward_inside_autocast(name):
    function, window = OPS[name]
    tensors = make(window)
    with use_backend("reference"):
        expected = run(function, tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run(function, tensors)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)


def test_kept_taps_are_read_without_gradients_only():
    tensors = make(3)
    taps = composite.upsampling_taps(tensors["weight"])
    with use_backend("reference"):
        with torch.no_grad():
            expected = upsample_conv(**tensors)
            torch.testing.assert_close(upsample_conv(**tensors, taps=taps), expected)
            assert upsample_conv(**tensors | {"bias": None}, taps=0 * taps).abs().max() == 0
        torch.testing.assert_close(upsample_conv(**tensors, taps=0 * taps), expected)


def test_odd_sizes_lose_their_last_row_and_column():
    tensors = make(2, (1, 3, 5, 7))
    expected = reference.downsample_conv(tensors["x"][:, :, :4, :6], tensors["weight"], tensors["bias"])
    torch.testing.assert_close(downsample_conv(**tensors), expected)
    with use_backend("native"), pytest.raises(RuntimeError, match="native code takes even sizes|extension"):
        downsample_conv(**tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("upsample_conv", {"x": torch.zeros(5, 6, 8)}, r"x must have shape \(B, C, H, W\)"),
        ("upsample_conv", {"weight": torch.zeros(7, 5, 2, 2)}, r"weight must have shape \(K, 5, 3, 3\)"),
        ("upsample_conv", {"taps": torch.zeros(7, 5, 4, 4)}, r"taps must have shape \(5, 7, 4, 4\)"),
        ("downsample_conv", {"weight": torch.zeros(7, 20, 1, 1)}, r"weight must have shape \(K, 5, 2, 2\)"),
        ("downsample_conv", {"bias": torch.zeros(6)}, r"bias must have shape \(7,\)"),
        ("downsample_conv", {"bias": 3.0}, "bias must be a tensor"),
    ],
)
def test_wrong_arguments(name, change, message):
    function, window = OPS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        function(**make(window) | change)
