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


def side_by_side(x, weight, bias=None, x2=None, x3=None):
    """The convolution of up to three maps, as a function of named tensors."""
    return stem_conv(x, weight, bias, beside=[map for map in (x2, x3) if map is not None])


def in_parts(tensors, *channels, layout=torch.channels_last):
    """The maps of these numbers of channels instead of one."""
    parts = [part.contiguous(memory_format=layout) for part in tensors["x"].split(channels, dim=1)]
    return tensors | dict(zip(("x", "x2", "x3"), parts, strict=False))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("channels", [(3, 3), (1, 2, 3), (4, 1, 1), (6,)], ids=str)
def test_maps_side_by_side(channels, layout):
    tensors = make(*SHAPES[2])
    parts = in_parts(tensors, *channels, layout=layout)
    assert_as_accurate_as_the_reference(side_by_side, parts, {}, floor=16)
    whole, actual = run(stem_conv, "native", tensors, {}), run(side_by_side, "native", parts, {})
    assert torch.equal(actual["out"], whole["out"]), "the same bits as of one map"
    for name in ("dweight", "dbias"):
        assert torch.equal(actual[name], whole[name])
    torch.testing.assert_close(torch.cat([actual[f"d{name}"] for name in parts if name[0] == "x"], 1), whole["dx"])


def test_maps_in_any_layout_are_read_where_they_are():
    tensors = make(2, 5, 9, 8, 12, 5)
    a = torch.randn(9, 2, 11, 3)[:, :, 2:10]  # (H, B, W, C) with a gap
    a.copy_(tensors["x"][:, :3].permute(2, 0, 3, 1))
    b = tensors["x"][:, 3:4].expand(2, 2, 9, 8)  # one channel twice, of stride 0
    twice = torch.cat((tensors["x"][:, :4], tensors["x"][:, 3:4]), dim=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = stem_conv(a.permute(1, 3, 0, 2), tensors["weight"], tensors["bias"], beside=[b])
    assert torch.equal(actual, stem_conv(twice, tensors["weight"], tensors["bias"]))
    assert not {"aten::copy_", "aten::cat"} & {event.key for event in profile.key_averages()}


def test_only_maps_that_want_a_gradient_get_one():
    parts = in_parts(make(*SHAPES[2]), 1, 2, 3)
    parts["x2"].requires_grad_()
    out = side_by_side(**parts)
    (grad,) = torch.autograd.grad(out.sum(), parts["x2"])
    whole = parts | {"x2": parts["x2"].detach()}
    x = torch.cat([whole[name] for name in ("x", "x2", "x3")], dim=1).requires_grad_()
    expected = torch.autograd.grad(stem_conv(x, parts["weight"], parts["bias"]).sum(), x)[0][:, 1:3]
    torch.testing.assert_close(grad, expected)


@settings(max_examples=200)
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
    x, weight, bias = leaves.values()
    operator = torch.ops.ddpm_fast.native_stem_conv.default
    torch.library.opcheck(operator, (x, None, None, weight, bias))
    parts = [part.detach().requires_grad_() for part in x.split((1, 2, 3), dim=1)]
    torch.library.opcheck(operator, (*parts, weight, None))
    torch.library.opcheck(operator, (parts[0], None, parts[2], weight[:, :4].detach().requires_grad_(), bias))


def test_refusals_and_what_is_left_to_torch():
    tensors = make(*SHAPES[1])
    for change, reason in ((lambda t: t.double(), "float64"), (lambda t: t[:0], "empty")):
        with use_backend("native"), pytest.raises(BackendRefused, match=reason):
            stem_conv(**tensors | {"x": change(tensors["x"])})
    wide = make(1, 17, 4, 4, 8, 3)
    assert op._stem_conv_op.choose(*wide.values(), ()).name == "reference"
    native = next(i for i in op._stem_conv_op.implementations if i.name == "native")
    assert "17 channels" in native.why_not(*wide.values(), ())
    parts = in_parts(tensors, 1, 2)
    assert op.reads_in_place(parts["x"], parts["weight"], beside=[parts["x2"]])
    assert not op.reads_in_place(parts["x"], parts["weight"], beside=[parts["x2"].double()])


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
        ({"beside": [torch.zeros(2, 1, 8, 8)]}, r"weight must have shape \(K, 4, side, side\)"),
        ({"beside": [torch.zeros(2, 1, 8, 7)]}, r"beside\[0\] must have x's batch, height and width"),
        ({"beside": [torch.zeros(2, 1, 8, 8).double()]}, r"beside\[0\] must have x's dtype"),
        ({"beside": [torch.zeros(2, 1, 8, 8)] * 3}, "beside must have at most 2 maps, got 3"),
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
        (x[0], None, None, weight, None),
        (x, None, None, weight[..., :6, :6], None),
        (x, None, None, weight, torch.zeros(5)),
        (x[:0], None, None, weight, None),
        (x[:, :2], x[:, :1, :7], None, weight, None),
        (x[:, :2], None, x[:0, :1], weight, None),
        (x, x[:, :1], None, weight, None),
    ):
        with pytest.raises(ValueError):
            forward(*arguments)
    for arguments in (
        (grad[:, :5], x, None, None, weight, True),
        (grad, x[..., :7], None, None, weight, True),
        (grad, x, None, None, weight[:, :2], True),
        (grad, x, x, None, weight, True),
    ):
        with pytest.raises(ValueError):
            backward(*arguments)


def test_a_networks_first_convolution_runs_it():
    unet = Unet(8, dim_mults=(1, 2), self_condition=True, cond_channels=2)
    x, image = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        unet(x, torch.tensor([3]), x, cond_image=image)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["ddpm_fast::native_stem_conv"] == 1 and "aten::mkldnn_convolution" not in counts
    assert counts["aten::cat"] == 1, "of the time's sines and cosines: maps are read side by side where they are"


def test_bfloat16_goes_where_the_processor_multiplies_it(monkeypatch):
    """Half of the time is torch's there; elsewhere torch's convolution of bfloat16 is the slower one."""
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(8, 3, 7, 7)
    for found, name in (("avx512_bf16", "reference"), ("avx512", "native"), ("avx2", "native")):
        monkeypatch.setattr(extension, "instruction_set", lambda found=found: found)
        assert op._stem_conv_op.choose(x.bfloat16(), weight.bfloat16(), None, ()).name == name
        assert op._stem_conv_op.choose(x, weight, None, ()).name == "native"
    assert op._stem_conv_op.choose(x.half(), weight.half(), None, ()).name == "native"
