"""The CPU's convolution of few channels against torch's, forward and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import Unet, use_backend
from ddpm_fast.ops.stem_conv import op
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import BackendRefused
from ddpm_fast.testing.native_cases import (
    assert_as_accurate_as_the_reference,
    instruction_sets,
    instructions,
    run,
    threads,
)

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

# B, C, H, W, K, side
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 8, 8, 64, 7),
    (3, 6, 5, 9, 17, 7),  # more rows of the kernel than of the map
    (1, 4, 33, 31, 100, 5),
    (2, 1, 28, 28, 33, 7),
    (1, 16, 3, 13, 8, 3),
]


def make(B, C, H, W, K, side, bias=True, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(B, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(K, C, side, side, generator=generator) / (C * side**2) ** 0.5,
    }
    return tensors | ({"bias": torch.randn(K, generator=generator)} if bias else {})


def check(tensors):
    assert_as_accurate_as_the_reference(stem_conv, tensors, {}, floor=16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape):
    check(make(*shape))


@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set(name):
    with instructions(name):
        for shape in SHAPES[1:4]:
            check(make(*shape))


def test_contiguous_maps_and_no_bias():
    tensors = make(*SHAPES[1], bias=False)
    tensors["x"] = tensors["x"].contiguous()
    check(tensors)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*(st.integers(1, high) for high in (3, 16, 12, 20, 70)), st.sampled_from([1, 3, 5, 7, 9]), st.booleans())
def test_random_shapes(B, C, H, W, K, side, bias):
    check(make(B, C, H, W, K, side, bias))


def test_threads_do_not_matter():
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(stem_conv, "native", make(3, 3, 40, 41, 40, 7), {}))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dtype):
    half = {name: tensor.to(dtype) for name, tensor in make(*SHAPES[2]).items()}
    actual = run(stem_conv, "native", half, {})
    exact = run(stem_conv, "native", {name: tensor.float() for name, tensor in half.items()}, {})
    assert all(tensor.dtype == dtype for tensor in actual.values())
    assert torch.equal(actual["out"], exact["out"].to(dtype))


def test_only_wanted_gradients():
    leaves = make(*SHAPES[1])
    leaves["weight"].requires_grad_()
    stem_conv(**leaves).sum().backward()
    assert leaves["weight"].grad is not None and leaves["x"].grad is None and leaves["bias"].grad is None


def test_nan_stays_visible():
    tensors = make(1, 3, 9, 9, 8, 7)
    tensors["x"][0, 1, 4, 4] = float("nan")
    nan = stem_conv(**tensors).isnan()
    assert nan[..., 1:8, 1:8].all() and not nan[..., 0, :].any()


def test_operator_keeps_torchs_rules():
    leaves = {name: tensor.requires_grad_() for name, tensor in make(*SHAPES[2]).items()}
    torch.library.opcheck(torch.ops.ddpm_fast.native_stem_conv.default, tuple(leaves.values()))


def test_refusals_and_what_is_left_to_torch():
    tensors = make(*SHAPES[1])
    for change, reason in ((lambda t: t.double(), "float64"), (lambda t: t[:0], "empty")):
        with use_backend("native"), pytest.raises(BackendRefused, match=reason):
            stem_conv(**tensors | {"x": change(tensors["x"])})
    wide = make(1, 17, 4, 4, 8, 3)
    assert op._stem_conv_op.choose(*wide.values()).name == "reference"
    assert "17 channels" in op._stem_conv_op.implementations[0].why_not(*wide.values())


def test_second_derivatives_are_refused():
    tensors = make(*SHAPES[1])
    tensors["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(stem_conv(**tensors).sum(), tensors["weight"], create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3)}, "x must have shape"),
        ({"weight": torch.zeros(6, 3, 6, 6)}, "odd side"),
        ({"weight": torch.zeros(6, 3, 7, 5)}, "odd side"),
        ({"weight": torch.zeros(6, 4, 7, 7)}, r"weight must have shape \(K, 3, side, side\)"),
        ({"bias": torch.zeros(5)}, "bias must have shape"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x must be float32"),
        ({"weight": None}, "weight must be a tensor"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        stem_conv(**make(*SHAPES[1]) | changes)


def test_operator_checks_shapes_itself():
    """The operator's own checks keep memory safe if it is called without op.py."""
    x, weight, grad = torch.zeros(1, 3, 8, 8), torch.zeros(6, 3, 7, 7), torch.zeros(1, 6, 8, 8)
    forward, backward = torch.ops.ddpm_fast.native_stem_conv, torch.ops.ddpm_fast.native_stem_conv_backward
    for arguments in (
        (x[0], weight, None),
        (x, weight[..., :6, :6], None),
        (x, weight, torch.zeros(5)),
        (x[:0], weight, None),
    ):
        with pytest.raises(ValueError):
            forward(*arguments)
    for arguments in ((grad[:, :5], x, weight, True), (grad, x[..., :7], weight, True), (grad, x, weight[:, :2], True)):
        with pytest.raises(ValueError):
            backward(*arguments)


def test_a_networks_first_convolution_runs_it():
    unet = Unet(8, dim_mults=(1, 2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        unet(torch.randn(1, 3, 8, 8), torch.tensor([3]))
    names = {event.key for event in profile.key_averages()}
    assert "ddpm_fast::native_stem_conv" in names and "aten::mkldnn_convolution" not in names
