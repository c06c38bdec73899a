"""The C++ norm_silu against its specification in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.norm_silu_cases import ALL, LAYOUTS, OPTIONS, make, run
from ddpm_fast.testing.truth import assert_close_to_truth

INSTRUCTION_SETS = ("avx512", "avx2", "portable")

# B, C, H, W, G
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 1, 7, 3, 1),
    (3, 3, 3, 3, 3),
    (1, 17, 7, 1, 17),
    (3, 64, 1, 7, 8),
    (1, 64, 33, 31, 4),
    (1, 100, 3, 7, 5),
    (3, 128, 3, 3, 1),
    (1, 513, 7, 7, 27),
]


@pytest.fixture(autouse=True)
def native():
    module = extension.load()
    if module is None:
        pytest.skip(extension.reason())
    return module


def available(native, name: str) -> bool:
    try:
        native.use_instruction_set(native.use_instruction_set(name))
    except ValueError:
        return False
    return True


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, native):
    """Each of them; the one before is restored."""
    if not available(native, request.param):
        pytest.skip(f"this processor has no {request.param}")
    before = native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


def is_zero(norm: str, name: str, x: torch.Tensor, groups: int | None) -> bool:
    """True for a gradient that is 0 but for rounding: one number's norm is a constant, and so is a channel's mean."""
    alone = x.shape[1] == 1 if norm == "rms" else x[0].numel() == groups
    return (alone and name == "dx") or (name == "dbias" and x.shape[1] == (groups or 1))


def assert_as_accurate_as_the_reference(norm: str, tensors: dict, others: dict) -> None:
    actual = run(norm, "native", tensors, others)
    expected = run(norm, "reference", tensors, others)
    truth = run(norm, "reference", {name: tensor.double() for name, tensor in tensors.items()}, others)
    assert actual["out"].stride() == actual["dx"].stride() == tensors["x"].stride()
    x = tensors["x"]
    for name in truth:
        if is_zero(norm, name, x, others.get("groups")):
            assert (actual[name].double() - truth[name]).abs().max() <= 1e-4
            continue
        if x.shape[1] == 1 and name != "dx":
            # One sum of terms that cancel, with no others to take the mean of.
            torch.testing.assert_close(actual[name].double(), truth[name], atol=1e-5, rtol=1e-5)
            continue
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(norm, shape, layout, instruction_set):
    assert_as_accurate_as_the_reference(norm, *make(norm, shape, "all", layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("C", [17, 32])
def test_every_option(norm, option, C, layout, instruction_set):
    assert_as_accurate_as_the_reference(norm, *make(norm, (3, C, 3, 7, 1), option, layout))


@settings(max_examples=200)
@given(data=st.data())
def test_random_shapes_and_options(data):
    norm = data.draw(st.sampled_from(["rms", "group"]))
    C = data.draw(st.integers(2, 70))
    G = data.draw(st.sampled_from([g for g in range(1, C + 1) if C % g == 0]))
    shape = (data.draw(st.integers(1, 3)), C, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), G)
    layout = data.draw(st.sampled_from(list(LAYOUTS)))
    tensors, others = make(norm, shape, "plain", layout, seed=data.draw(st.integers(0, 2**31)))
    everything, _ = make(norm, shape, "all", layout, seed=1)
    tensors |= {name: everything[name] for name in ALL if data.draw(st.booleans())}
    others["activation"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        others |= {"dropout_p": data.draw(st.floats(0, 1)), "seed": torch.tensor([data.draw(st.integers(0, 2**62))])}
    results = [run(norm, backend, tensors, others) for backend in ("native", "reference")]
    truth = run(norm, "reference", {name: tensor.double() for name, tensor in tensors.items()}, others)
    if norm == "group" and C // G * shape[2] * shape[3] < 4:
        return  # a variance of two or three numbers can be as small as rounding
    for name in truth:
        if is_zero(norm, name, tensors["x"], others.get("groups")):
            assert (results[0][name].double() - truth[name]).abs().max() <= 1e-4
            continue
        # A few sums of small numbers have no statistics: their error is that of one rounding or of none.
        assert_close_to_truth(results[0][name], results[1][name], truth[name], name=name, floor=16)


@pytest.mark.parametrize("layout, other", [("nhwc", "nchw"), ("nchw", "nhwc")])
def test_gradients_arrive_in_any_layout(layout, other):
    tensors, others = make("rms", (2, 20, 4, 6, 1), "all", layout)
    tensors["residual"] = tensors["residual"].contiguous(memory_format=LAYOUTS[other])
    tensors["scale"] = torch.randn(20, 4).t()[:2].T.contiguous().T  # (2, 20), columns first
    tensors["gain"] = torch.randn(1, 40, 1, 1)[:, ::2]
    grads = {
        "contiguous": torch.randn(2, 20, 4, 6),
        "channels-last": torch.randn(2, 20, 4, 6).contiguous(memory_format=torch.channels_last),
        "expanded": torch.tensor(1.5).expand(2, 20, 4, 6),
        "strided": torch.randn(2, 20, 4, 12)[..., ::2],
    }
    for grad in grads.values():
        results = []
        for backend in ("native", "reference"):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
            with use_backend(backend):
                out = rms_norm_silu(**leaves, **others)
            results.append(torch.autograd.grad(out, list(leaves.values()), grad))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(norm, dtype, layout):
    tensors, others = make(norm, (2, 24, 5, 5, 4), "all", layout)
    for name in ("x", "residual", "scale"):
        tensors[name] = tensors[name].to(dtype)
    actual, expected = run(norm, "native", tensors, others), run(norm, "reference", tensors, others)
    truth = run(norm, "reference", {name: tensor.double() for name, tensor in tensors.items()}, others)
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm, function", [("rms", rms_norm_silu), ("group", group_norm_silu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_residual", [None, torch.float32])
def test_half_maps_give_what_their_float32_copies_give_rounded(norm, function, dtype, of_residual, layout):
    """Maps of several chunks; a residual of another type makes all of them float32."""
    tensors, others = make(norm, (2, 20, 17, 31, 4), "all", layout)
    tensors |= {"x": tensors["x"].to(dtype), "residual": tensors["residual"].to(of_residual or dtype)}
    grad = torch.randn(tensors["x"].shape).to(dtype)
    results = []
    for of_leaves in (tensors, {name: tensor.float() for name, tensor in tensors.items()}):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in of_leaves.items()}
        with use_backend("native"):
            out = function(**leaves, **others)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))])
    for name, actual, expected in zip(("out", *tensors), *results, strict=True):
        assert torch.equal(actual, expected.to(actual.dtype)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("shape", [(3, 100, 16, 17, 4), (1, 64, 64, 64, 8)], ids=str)
def test_the_number_of_threads_changes_nothing(norm, shape, layout):
    tensors, others = make(norm, shape, "all", layout)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(norm, "native", tensors, others))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [3, 40])
def test_a_zero_pixel_and_a_tiny_one(C, layout):
    tensors, others = make("rms", (2, C, 3, 3, 1), "plain", layout)
    tensors["x"][:, :, 1, 1] = 0
    tensors["x"][0, :, 0] *= 1e-15
    assert_as_accurate_as_the_reference("rms", tensors, others)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_where_the_reference_has_it(norm, bad, layout):
    tensors, others = make(norm, (2, 20, 3, 3, 4), "plain", layout)
    tensors["x"][0, 3, 1, 1] = bad
    actual, expected = run(norm, "native", tensors, others), run(norm, "reference", tensors, others)
    for name in expected:
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("y", [-1e38, -1e30, -100.0, -87.5, -80.0, 80.0, 100.0, 1e30])
def test_silu_far_from_zero(y, layout):
    """A shift far out; its gradient is 0 or 1 there."""
    x = torch.randn(1, 16, 2, 2).contiguous(memory_format=LAYOUTS[layout])
    shift = torch.full((1, 16), y).requires_grad_()
    with use_backend("native"):
        out = rms_norm_silu(x, torch.zeros(16), shift=shift)
    (gradient,) = torch.autograd.grad(out.sum(), shift)
    expected = torch.full_like(out, max(y, 0))
    torch.testing.assert_close(out.detach(), expected, atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(gradient, torch.full((1, 16), 4.0 * (y > 0)), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero(layout):
    tensors, others = make("group", (2, 24, 9, 9, 4), "plain", layout)
    tensors["x"] = tensors["x"] + 3000
    assert_as_accurate_as_the_reference("group", tensors, others)


def arguments(norm: str, dtype=torch.float32, grad=True, layout="nhwc"):
    tensors, others = make(norm, (2, 12, 3, 5, 3), "all", layout)
    tensors["x"] = tensors["x"].to(dtype)
    tensors = {name: tensor.requires_grad_(grad) for name, tensor in tensors.items()}
    rows = [tensors.get(name) for name in ("x", "gain", "offset", "bias", "scale", "shift", "residual")]
    return *rows, others["seed"], 3 if norm == "group" else 0, 1e-5, True, 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "group"])
def test_opcheck(norm, dtype, layout):
    ops = torch.ops.ddpm_fast
    torch.library.opcheck(ops.native_norm_silu.default, arguments(norm, dtype, layout=layout))
    given = arguments(norm, dtype, grad=False, layout=layout)
    x, gain, offset, bias, scale, shift, _, seed, groups, eps, activation, p = given
    statistics = ops.native_norm_silu(x, gain, offset, bias, scale, shift, None, seed, groups, eps, activation, p)[1]
    torch.library.opcheck(
        ops.native_norm_silu_backward.default,
        (x, x, statistics, gain, offset, bias, scale, None, seed, groups, activation, p),
    )


def test_compiles_without_a_graph_break():
    tensors, others = make("rms", (2, 12, 3, 5, 3), "all", "nhwc")
    torch.compiler.reset()
    compiled = torch.compile(lambda: rms_norm_silu(**tensors, **others), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), rms_norm_silu(**tensors, **others))


def test_a_second_derivative_is_refused():
    tensors, others = make("rms", (1, 8, 2, 2, 1), "plain", "nhwc")
    x = tensors["x"].requires_grad_()
    with use_backend("native"):
        out = rms_norm_silu(x, tensors["gain"], **others)
    with pytest.raises(RuntimeError, match="native kernel's gradient cannot be differentiated again"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_what_native_refuses_runs_in_the_reference():
    x, row = torch.randn(2, 8, 4, 8)[..., ::2], torch.randn(8)
    last = x.contiguous(memory_format=torch.channels_last)
    for call, reason in [
        (lambda: rms_norm_silu(x, row), "x is neither contiguous nor channels-last, its strides are"),
        (lambda: rms_norm_silu(last.double(), row), "x is torch.float64"),
        (lambda: rms_norm_silu(last, row.double()), "gain is torch.float64"),
        (lambda: group_norm_silu(last, row, row, groups=2, scale=torch.zeros(2, 8).double()), "scale is torch.float64"),
        (lambda: rms_norm_silu(last[:0], row), "x is empty"),
    ]:
        with use_backend("native"), pytest.raises(dispatch.BackendRefused, match=reason):
            call()
        call()


def test_the_operator_itself_guards_memory():
    names = ("x", "gain", "offset", "bias", "scale", "shift", "residual", "seed")
    good = dict(zip(names, arguments("group", grad=False)[:8], strict=True))
    bad = [
        ({"x": good["x"].transpose(2, 3)}, "x must be contiguous or channels-last"),
        ({"x": good["x"][0]}, "x must have shape"),
        ({"x": good["x"].double()}, "x must be float32, float16 or bfloat16"),
        ({"gain": torch.zeros(11)}, "gain must have 12 elements"),
        ({"offset": torch.zeros(3)}, "offset must have shape"),
        ({"bias": torch.zeros(13)}, "bias must have shape"),
        ({"scale": torch.zeros(12)}, "scale must have shape"),
        ({"shift": torch.zeros(1, 12)}, "shift must have shape"),
        ({"residual": torch.zeros(2, 12, 5, 3)}, "residual must have shape"),
        ({"seed": None}, "seed must be given"),
        ({"seed": torch.zeros(2).long()}, "seed must be one int64"),
    ]
    for change, sentence in bad:
        with pytest.raises((TypeError, ValueError), match=sentence):
            torch.ops.ddpm_fast.native_norm_silu(*(good | change).values(), 3, 1e-5, True, 0.1)
    for groups, p, sentence in [(5, 0.1, "groups must divide"), (-1, 0.1, "groups must"), (3, 1.5, "dropout_p must")]:
        with pytest.raises(ValueError, match=sentence):
            torch.ops.ddpm_fast.native_norm_silu(*good.values(), groups, 1e-5, True, p)
    x, rows, seed = good["x"], list(good.values())[1:6], good["seed"]
    backward = torch.ops.ddpm_fast.native_norm_silu_backward
    for grad, statistics, sentence in [
        (x[:1], torch.zeros(2, 3, 2), "grad must have shape"),
        (x, torch.zeros(2, 3), "statistics must have 12 elements"),
        (x, torch.zeros(2, 3, 2).double(), "statistics must be float32"),
    ]:
        with pytest.raises((TypeError, ValueError), match=sentence):
            backward(grad, x, statistics, *rows, seed, 3, True, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 4100])
def test_parameters_of_half_types_are_converted_exactly(dtype, channels):
    """Few numbers are converted by kernels of the package, many by torch: both round to nearest, ties to even."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, channels, 3, 3, generator=generator)
    narrow = [torch.randn(channels, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    narrow[0].data[:5] = torch.tensor([0.0, -1e-7, 6e4, float("inf"), 3.0])
    wide = [parameter.detach().float().requires_grad_() for parameter in narrow]
    results = []
    for parameters in (narrow, wide):
        with use_backend("native"):
            out = group_norm_silu(x, *parameters, groups=1)
        results.append((out, *torch.autograd.grad(out, parameters, x * 1e3)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)
