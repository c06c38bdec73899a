"""The C++ products of maps against their specification in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm_fast import use_backend
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, linears, norm_linear
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

# B, C, H, W, K
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 3, 7, 1, 5),
    (1, 17, 3, 7, 100),
    (3, 64, 7, 3, 32),
    (2, 100, 3, 3, 17),
    (1, 128, 33, 31, 48),
    (3, 513, 1, 7, 64),
    (3, 64, 32, 32, 3),
    (1, 1024, 4, 5, 33),
]


@pytest.fixture(autouse=True)
def native():
    module = extension.load()
    if module is None:
        pytest.skip(extension.reason())
    return module


def normal(generator, *size):
    return torch.randn(*size, generator=generator)


def make(op: str, shape, seed=0, bias=True) -> dict[str, torch.Tensor]:
    """Random float32 arguments, maps channels-last."""
    B, C, H, W, K = shape
    generator = torch.Generator().manual_seed(seed)
    x = 2 * normal(generator, B, C, H, W) + 0.5
    tensors = {"x": x, "weight": normal(generator, K, C, 1, 1)}
    if op == "norm_linear":
        tensors = {"x": x, "gain": 1 + 0.3 * normal(generator, 1, C, 1, 1), "weight": tensors["weight"]}
    if op == "linear of two":
        first = C // 2 or 1
        tensors |= {"second": normal(generator, B, C, H, W)[:, first:] if C > 1 else normal(generator, B, 1, H, W)}
        tensors |= {"x": x[:, :first], "weight": normal(generator, K, max(C, 2), 1, 1)}
    if op != "norm_linear" and bias:
        tensors["bias"] = normal(generator, K)
    if op == "linear_residual":
        tensors["residual"] = normal(generator, B, K, H, W)
    for name in ("x", "second", "residual"):
        if name in tensors:
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return tensors


def call(op: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if op == "linear of two":
        return linear((tensors["x"], tensors["second"]), tensors["weight"], tensors.get("bias"))
    return {"norm_linear": norm_linear, "linear_residual": linear_residual, "linear": linear}[op](**tensors)


def run(op: str, backend: str, tensors: dict[str, torch.Tensor], grad=None) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = call(op, leaves)
        if grad is None:
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        out.backward(grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


OPS = ("norm_linear", "linear_residual", "linear", "linear of two")


def assert_as_accurate_as_the_reference(op: str, tensors: dict[str, torch.Tensor], floor: float = 4) -> None:
    actual, expected = run(op, "native", tensors), run(op, "reference", tensors)
    truth = run(op, "reference", {name: tensor.double() for name, tensor in tensors.items()})
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)
    assert actual["dx"].stride() == tensors["x"].stride()
    for name in truth:
        if op == "norm_linear" and tensors["x"].shape[1] == 1 and name == "dx":
            # The norm of one channel is constant: its gradient is 0 up to the rounding of terms that cancel.
            assert (actual[name].double() - truth[name]).abs().max() <= 1e-5
            continue
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(op, shape, instruction_set):
    assert_as_accurate_as_the_reference(op, make(op, shape))


@pytest.mark.parametrize("rows", range(1, 31))
def test_every_height_of_a_tile(rows, instruction_set):
    """The product is made of tiles of 1 to 14 rows (AVX-512) and of one or two vectors, whole or not."""
    assert_as_accurate_as_the_reference("linear of two", make("linear of two", (1, 20, 1, rows, 33 + rows)))


@pytest.mark.parametrize("op", ["linear_residual", "linear of two"])
def test_rows_that_lie_4_kilobytes_apart(op, instruction_set):
    assert_as_accurate_as_the_reference(op, make(op, (1, 2048, 3, 3, 1024)))


@settings(max_examples=200)
@given(data=st.data())
def test_random_shapes(data):
    op = data.draw(st.sampled_from(OPS))
    low = 2 if op == "norm_linear" else 1
    shape = [data.draw(st.integers(*bounds)) for bounds in ((1, 3), (low, 70), (1, 6), (1, 6), (1, 70))]
    tensors = make(
        op, shape, seed=data.draw(st.integers(0, 2**31)), bias=op == "linear_residual" or data.draw(st.booleans())
    )
    # Of a few numbers the reference's rounding error may be 0.
    assert_as_accurate_as_the_reference(op, tensors, floor=16)


@pytest.mark.parametrize("op", OPS)
def test_arguments_and_gradients_in_any_layout(op):
    tensors = make(op, (2, 20, 4, 6, 12))
    K, C = tensors["weight"].shape[:2]
    tensors["weight"] = torch.randn(C, K, 1, 1).transpose(0, 1)
    tensors |= {"gain": torch.randn(40)[::2]} if op == "norm_linear" else {"bias": torch.randn(24)[::2]}
    if "residual" in tensors:
        tensors["residual"] = tensors["residual"].contiguous()
    grads = [torch.randn(2, 12, 4, 6), torch.tensor(1.5).expand(2, 12, 4, 6), torch.randn(2, 12, 4, 12)[..., ::2]]
    for grad in grads:
        results = [run(op, backend, tensors, grad) for backend in ("native", "reference")]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(op, dtype):
    tensors = make(op, (2, 24, 5, 5, 40))
    for name in ("x", "second"):
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)
    actual, expected = run(op, "native", tensors), run(op, "reference", tensors)
    truth = run(op, "reference", {name: tensor.double() for name, tensor in tensors.items()})
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape",
    [(3, 64, 48, 48, 64), (1, 512, 4, 4, 384), (1, 96, 80, 80, 33), (1, 2048, 9, 9, 48), (2, 96, 3, 3, 40)],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(op, shape):
    """Also where it cuts the rows into groups of three or fewer."""
    tensors = make(op, shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 7):
            torch.set_num_threads(threads)
            results.append(run(op, "native", tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("op", OPS)
def test_only_the_gradient_that_is_asked_for(op):
    tensors = make(op, (2, 20, 4, 6, 12))
    grad = torch.randn(2, 12, 4, 6)
    everything = run(op, "native", tensors, grad)
    for wanted in tensors:
        leaves = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.items()}
        with use_backend("native"):
            out = call(op, leaves)
        assert torch.equal(torch.autograd.grad(out, leaves[wanted], grad)[0], everything[f"d{wanted}"])


def test_a_zero_pixel_and_a_tiny_one(instruction_set):
    tensors = make("norm_linear", (2, 40, 3, 3, 24))
    tensors["x"][:, :, 1, 1] = 0
    tensors["x"][0, :, 0] *= 1e-15
    assert_as_accurate_as_the_reference("norm_linear", tensors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(op, bad):
    tensors = make(op, (2, 20, 3, 3, 12))
    tensors["x"][0, 3, 1, 1] = bad
    actual, expected = run(op, "native", tensors), run(op, "reference", tensors)
    for name in expected:
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    ops = torch.ops.ddpm_fast
    tensors = make("norm_linear", (2, 12, 3, 5, 7))
    x, gain, weight = (tensor.to(dtype).requires_grad_() for tensor in tensors.values())
    torch.library.opcheck(ops.native_norm_linear.default, (x, gain, weight))
    out, norms = (tensor.detach() for tensor in ops.native_norm_linear(x, gain, weight))
    x, gain, weight = x.detach(), gain.detach(), weight.detach()
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.native_norm_linear_backward.default, (out, x, norms, gain, weight, *wanted))
    tensors = make("linear of two", (2, 12, 3, 5, 7))
    x, second = (tensors[name].to(dtype).requires_grad_() for name in ("x", "second"))
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    residual = out.clone().requires_grad_()
    torch.library.opcheck(ops.native_linear.default, (x, second, weight, bias, residual))
    torch.library.opcheck(ops.native_linear.default, (x, None, weight[:, :6].detach(), None, None))
    x, second, weight, bias = x.detach(), second.detach(), weight.detach(), bias.detach()
    for wanted in ((True,) * 4, (False, True, False, True), (True, False, True, False)):
        torch.library.opcheck(ops.native_linear_backward.default, (out, x, second, weight, bias, *wanted))
    torch.library.opcheck(ops.native_linear_backward.default, (out, x, None, weight[:, :6], None, *(True,) * 4))


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op):
    tensors = make(op, (2, 12, 3, 5, 7))
    torch.compiler.reset()
    compiled = torch.compile(lambda: call(op, tensors), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), call(op, tensors))


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused(op):
    tensors = make(op, (1, 8, 2, 2, 4))
    tensors["x"].requires_grad_()
    with use_backend("native"):
        out = call(op, tensors)
    with pytest.raises(RuntimeError, match="native kernel's gradient cannot be differentiated again"):
        torch.autograd.grad(out.sum(), tensors["x"], create_graph=True)


def test_what_native_refuses_runs_in_the_reference():
    tensors = make("linear of two", (2, 8, 4, 4, 6))
    x, second, weight, bias = (tensors[name] for name in ("x", "second", "weight", "bias"))
    for maps, row, reason in [
        ((x, second.contiguous()), bias, r"x\[1\] is not channels-last, its strides are"),
        ((x.contiguous(), second), bias, r"x\[0\] is not channels-last, its strides are"),
        ((x, second.bfloat16()), bias, "the maps are torch.float32 and torch.bfloat16, and native code takes one"),
        ((x.double(), second.double()), bias, r"x\[0\] is torch.float64"),
        ((x, second), bias.double(), "bias is torch.float64"),
        ((x[:0], second[:0]), bias, r"x\[0\] is empty"),
    ]:
        with use_backend("native"), pytest.raises(dispatch.BackendRefused, match=reason):
            linear(maps, weight, row)
        assert linear(maps, weight, row).shape[1:] == (6, 4, 4)


def test_linear_is_a_convolution_of_maps_put_together():
    tensors = make("linear of two", (2, 8, 4, 4, 6))
    x, second, weight, bias = (tensors[name] for name in ("x", "second", "weight", "bias"))
    expected = torch.nn.functional.conv2d(torch.cat([x, second], 1), weight, bias)
    torch.testing.assert_close(linear((x, second), weight, bias), expected)
    with use_backend("reference"):
        assert torch.equal(linear((x, second), weight, bias), expected)
        assert torch.equal(linear([torch.cat([x, second], 1)], weight, bias), expected)
        assert linear((x, second.bfloat16()), weight).dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"x": ()}, ValueError, "x must be one map or two, got 0"),
        ({"x": (torch.zeros(2, 4, 3, 3), [1])}, TypeError, r"x\[1\] must be a tensor, got list"),
        ({"x": (torch.zeros(2, 4, 3, 3), torch.zeros(2, 4))}, ValueError, r"x\[1\] must have shape \(B, C, H, W\)"),
        ({"x": (torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 2))}, ValueError, "must agree in all but their channels"),
        ({"x": torch.zeros(2, 7, 3, 3)}, ValueError, r"weight must have shape \(K, 7, 1, 1\)"),
        ({"bias": torch.zeros(1, 5)}, ValueError, r"bias must have shape \(5,\), got \(1, 5\)"),
        ({"weight": torch.zeros(5, 8, 1, 1).int()}, TypeError, "weight must be float32"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on the device of x"),
    ],
)
def test_errors_of_linear_are_named(change, error, sentence):
    good = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.zeros(5, 8, 1, 1), "bias": torch.zeros(5)}
    with pytest.raises(error, match=sentence):
        linear(**good | change)


def test_the_operators_themselves_guard_memory():
    ops = torch.ops.ddpm_fast
    x = torch.zeros(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    weight, gain, bias = torch.zeros(6, 8, 1, 1), torch.zeros(8), torch.zeros(6)
    out, norms = ops.native_norm_linear(x, gain, weight)
    for function, sentence in [
        (lambda: ops.native_norm_linear(x.contiguous(), gain, weight), "x must be channels-last"),
        (lambda: ops.native_norm_linear(x[0], gain, weight), "x must have shape"),
        (lambda: ops.native_norm_linear(x.double(), gain, weight), "x must be float32"),
        (lambda: ops.native_norm_linear(x, gain[1:], weight), "gain must have 8 elements"),
        (lambda: ops.native_norm_linear(x, gain, weight[:, 1:]), "weight must have shape"),
        (lambda: ops.native_norm_linear_backward(x, x, norms, gain, weight, True, True), "grad must have shape"),
        (lambda: ops.native_norm_linear_backward(out, x, norms[1:], gain, weight, True, True), "norms must have"),
        (lambda: ops.native_linear(x, x[:1], weight, bias, None), "maps must agree"),
        (lambda: ops.native_linear(x, x.half(), weight, bias, None), "maps must be of one dtype"),
        (lambda: ops.native_linear(x, x, weight, bias, None), "weight must have shape"),
        (lambda: ops.native_linear(x, None, weight, bias[1:], None), "bias must have shape"),
        (lambda: ops.native_linear(x, None, weight, bias, x), "residual must have shape"),
        (lambda: ops.native_linear_backward(x, x, None, weight, bias, True, True, True, True), "grad must have shape"),
        (
            lambda: ops.native_linear_backward(out, x, None, weight, gain, True, True, True, True),
            "bias must have shape",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=sentence):
            function()


def test_empty_maps_of_the_operators_give_zero_gradients():
    ops = torch.ops.ddpm_fast
    x = torch.zeros(0, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    weight, gain, bias = torch.zeros(6, 8, 1, 1), torch.zeros(8), torch.zeros(6)
    out, norms = ops.native_norm_linear(x, gain, weight)
    assert all(not tensor.any() for tensor in ops.native_norm_linear_backward(out, x, norms, gain, weight, True, True))
    gradients = ops.native_linear_backward(out, x, None, weight, bias, True, True, True, True)
    assert gradients[2].shape == weight.shape and all(not tensor.any() for tensor in gradients)


def layers_of_one_input(B, K, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [normal(generator, width, K) for width in widths]
    return normal(generator, B, K), weights, [normal(generator, width) for width in widths]


# B: up to 3 rows are dot products, more a packed product; K: up to a vector, several, longer than a piece of a sum.
@settings(max_examples=200)
@given(
    st.integers(1, 20),
    st.sampled_from([1, 5, 16, 31, 128, 300]),
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_layers_of_one_input_on_any_shape(B, K, widths):
    x, weights, biases = layers_of_one_input(B, K, widths)
    with use_backend("native"):
        actual = linears(x, weights, biases)
    truth = linears(x.double(), [w.double() for w in weights], [b.double() for b in biases])
    magnitude = x.double().abs() @ torch.cat(weights).double().abs().t() + torch.cat(biases).double().abs()
    assert actual.shape == truth.shape
    assert ((actual - truth).abs() <= 4 * 2**-24 * K**0.5 * magnitude).all()


def test_layers_of_one_input_for_every_instruction_set(instruction_set):
    for B in (1, 3, 4, 16):
        x, weights, biases = layers_of_one_input(B, 260, [48, 17, 1, 64])
        with use_backend("native"):
            actual = linears(x, weights, biases)
        truth = linears(x.double(), [w.double() for w in weights], [b.double() for b in biases])
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=5e-5)


def test_gradients_of_layers_of_one_input():
    x, weights, biases = layers_of_one_input(5, 7, [4, 10, 2])
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    grad = torch.linspace(-1, 1, 80).reshape(5, 16)
    with use_backend("native"):
        actual = torch.autograd.grad(linears(x, weights, biases), leaves, grad)
    plain = torch.cat([x @ w.t() + b for w, b in zip(weights, biases, strict=True)], dim=1)
    for a, e in zip(actual, torch.autograd.grad(plain, leaves, grad), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_second_derivatives_of_layers_of_one_input(backend):
    x, weights, biases = layers_of_one_input(5, 7, [4, 10, 2])
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    results = []
    for layers in (
        linears,
        lambda x, weights, biases: torch.cat([F.linear(x, *p) for p in zip(weights, biases, strict=True)], 1),
    ):
        with use_backend(backend):
            gradients = torch.autograd.grad(layers(x, weights, biases).pow(3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_a_traced_graph_has_the_gradients_of_layers_of_one_input():
    x, weights, biases = layers_of_one_input(5, 7, [4, 10, 2])
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    with use_backend("native"):
        graph = make_fx(lambda x, *others: linears(x, others[:3], others[3:]))(*leaves)
        expected = torch.autograd.grad(linears(x, weights, biases).square().sum(), leaves)
    assert "native_linears" in str(graph.graph)
    actual = torch.autograd.grad(graph(*leaves).square().sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    *others, last = torch.autograd.grad(graph(x, *leaves[1:6], biases[2].detach()).sum(), leaves, allow_unused=True)
    assert last is None and all(gradient is not None for gradient in others)


def test_layers_of_one_input_that_do_not_fit_are_named():
    x, weights, biases = layers_of_one_input(5, 7, [4, 10])
    with pytest.raises(ValueError, match="as many"):
        linears(x, weights, biases[:1])
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        linears(x[0], weights, biases)
    with pytest.raises(ValueError, match=r"\(N, 7\)"):
        linears(x, [weights[0], weights[1][:, :6]], biases)
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        linears(x, weights, [biases[0], biases[1][:9]])
    with pytest.raises(TypeError, match="int64"):
        linears(x, weights, [biases[0], biases[1].long()])
    with use_backend("native"), pytest.raises(Exception, match="bfloat16"):
        linears(x.bfloat16(), weights, biases)


def test_layers_of_nothing_give_their_biases():
    for rows in (0, 2, 5):
        bias = torch.arange(20.0)
        out = torch.ops.ddpm_fast.native_linears(torch.empty(rows, 0), [torch.empty(20, 0)], [bias])
        assert torch.equal(out, bias.expand(rows, 20))
