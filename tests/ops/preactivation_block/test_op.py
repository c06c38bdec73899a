"""The pre-activation block made of its steps, its public function's errors, and second derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import use_backend
from ddpm_fast.ops.preactivation_block import composite, reference
from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.runtime.dispatch import watch_choices
from ddpm_fast.testing.preactivation_block_cases import assert_as_accurate_as_the_reference, make, run


@pytest.mark.parametrize("resample", ["up", "down"])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("skip", [0, 6])
def test_resampling_and_the_residuals_convolution(resample, window, skip):
    tensors, others = make(2, 10, skip, 10 + skip, 6, 7, window=window, resample=resample, output_scale=0.5)
    assert_as_accurate_as_the_reference(tensors, others)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "scaled": True, "dropout_p": 0.25}], ids=str)
def test_a_residual_convolution_of_3x3(options):
    assert_as_accurate_as_the_reference(*make(2, 10, 0, 14, 5, 6, **options))


def test_the_steps_are_the_block():
    """The native block and its steps, on the same tensors."""
    for scaled, dropout_p in itertools.product((False, True), (0.0, 0.25)):
        tensors, others = make(2, 16, 8, 32, 6, 5, scaled=scaled, dropout_p=dropout_p)
        block, steps = (run(f, tensors, others) for f in (preactivation_block, composite.preactivation_block))
        for name in block:
            torch.testing.assert_close(block[name], steps[name], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: n + m)


def test_it_is_what_diffusers_computes():
    """In torch's words, with every option that diffusers' ResnetBlock2D has."""
    tensors, others = make(2, 16, 0, 32, 6, 5, scaled=True, output_scale=0.5**0.5, eps1=1e-6, eps2=1e-6)
    t = {name: tensor.double() for name, tensor in tensors.items()}
    h = F.silu(F.group_norm(t["x"], 2, t["gain1"], t["offset1"], 1e-6))
    h = F.conv2d(h, t["weight1"], t["bias1"], padding=1) + t["embedding"][:, :, None, None]
    h = F.group_norm(h, 2, t["gain2"], t["offset2"], 1e-6)
    h = F.silu(h * (1 + t["scale"][:, :, None, None]) + t["shift"][:, :, None, None])
    h = F.conv2d(h, t["weight2"], t["bias2"], padding=1)
    expected = (F.conv2d(t["x"], t["res_weight"], t["res_bias"]) + h) * 0.5**0.5
    torch.testing.assert_close(reference.preactivation_block(**t, **others), expected, rtol=1e-12, atol=1e-12)


def test_the_steps_have_second_derivatives():
    tensors, others = make(1, 4, 2, 4, 3, 4)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]

    def block(*leaves):
        return preactivation_block(**dict(zip(tensors, leaves, strict=True)), **others)

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(block, leaves)


def test_tangents():
    tensors, others = make(1, 4, 2, 4, 4, 4)
    x = tensors.pop("x")
    results = [
        torch.func.jvp(lambda x, f=f: f(x, **tensors, **others), (x,), (torch.ones_like(x),))[1]
        for f in (preactivation_block, reference.preactivation_block)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["skip", "scale", "embedding", "res_weight"])
def test_options_of_float64_run_the_steps(name):
    tensors, others = make(2, 16, 8, 32, 6, 5, scaled=True)
    tensors[name] = tensors[name].double()
    with watch_choices() as choices:
        actual = preactivation_block(**tensors, **others)
    assert {implementation for op, implementation, _ in choices if op == "preactivation_block"} == {"composite"}
    expected = reference.preactivation_block(**tensors, **others)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight2": torch.zeros(32, 24, 3, 3)}, "weight2 must have shape"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, "skip must have shape"),
        ({"embedding": torch.zeros(2, 31)}, "embedding must have shape"),
        ({"scale": torch.zeros(2, 31)}, "scale must have shape"),
        ({"gain1": torch.zeros(32)}, "gain1 must have shape"),
        ({"offset2": torch.zeros(31)}, "offset2 must have shape"),
        ({"res_weight": None, "res_bias": None}, "res_weight must be given"),
        ({"res_weight": torch.zeros(32, 24, 2, 2)}, "res_weight must have shape"),
        ({"groups1": 5}, "groups1 must divide the 24 channels"),
        ({"groups2": 0}, "groups2 must divide the 32 channels"),
        ({"dropout_p": 0.5}, "seed must be given"),
        ({"bias1": 3.0}, "bias1 must be a tensor"),
        ({"resample": "sideways"}, "resample must be None"),
        ({"weight1": torch.zeros(32, 24)}, "must have four dimensions"),
    ],
)
def test_wrong_arguments(changes, message):
    tensors, others = make(2, 16, 8, 32, 6, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        preactivation_block(**tensors | others | changes)


def test_a_bias_of_the_residual_needs_its_weight():
    tensors, others = make(2, 16, 0, 16, 6, 5)
    with pytest.raises(ValueError, match="res_bias must not be given without res_weight"):
        preactivation_block(**tensors, **others, res_bias=torch.zeros(16))
