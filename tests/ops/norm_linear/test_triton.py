"""The Triton kernels of norm_linear against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.ops.branches import branch, branching
from ddpm_fast.ops.norm_linear import op
from ddpm_fast.ops.norm_linear import triton as kernel
from ddpm_fast.ops.norm_linear.op import linear_residual, norm_linear, norm_linear_beside
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.norm_linear_cases import LAYOUTS, SHAPES, assert_as_accurate_as_the_reference, make, run
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
SMALL = (3, 24, 4, 5, 40)


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


@pytest.mark.release(but=lambda layout, _arithmetic=None, **_: _arithmetic is None or layout == "nhwc")
@pytest.mark.arithmetic
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(layout, shape):
    assert_as_accurate_as_the_reference(make(shape, layout, DEVICE))


def test_many_chunks_of_pixels(monkeypatch):
    """Programs walk over several tiles of pixels, and the last one is half outside.

    The interpreter's time grows with the output channels, of which several tiles of pixels take 900.
    """
    outputs = 100 if triton_launch.interpreted() else 900
    tile = kernel.backward_weight_tile(2 * 15 * 13, 68, 900, True)
    assert kernel.tiles_per_chunk(2 * 15 * 13, 68, 900, tile) == 4
    if triton_launch.interpreted():
        assert kernel.backward_weight_tile(2 * 15 * 13, 68, outputs, True) == tile
        monkeypatch.setattr(kernel, "tiles_per_chunk", lambda *sizes: 4)
    assert_as_accurate_as_the_reference(make((2, 68, 15, 13, outputs), "nhwc", DEVICE))


@pytest.mark.parametrize("pixels, C", [(32 * 128**2, 64), (4 * 128**2, 64), (32 * 32**2, 128), (32 * 16**2, 512)])
def test_the_gradient_of_the_weight_fills_a_gpu_at_once(pixels, C):
    """Four programs on each of the 132 multiprocessors of an H100, at most, and nearly as many."""
    tile = kernel.backward_weight_tile(pixels, C, 384, False)
    columns = -(-384 // tile.block_o) * -(-C // tile.block_c)
    programs = columns * -(-pixels // (tile.block_n * kernel.tiles_per_chunk(pixels, C, 384, tile)))
    assert 450 < programs <= 4 * 132


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_of_more_chunks_and_outputs_than_a_block(dtype):
    """The finishing kernel by itself: weight in `dtype`, rounded once, and gain in float32."""
    chunks, K, C = 37, 131, 21
    generator = torch.Generator().manual_seed(1)
    sums, gain = torch.randn(chunks, K, C, generator=generator), torch.randn(C, generator=generator)
    weight = torch.randn(K, C, generator=generator).to(dtype)
    given = [tensor.to(DEVICE) for tensor in (sums, gain, weight)]
    dgain, dweight = (torch.full_like(tensor, float("nan")) for tensor in given[1:])
    blocks = kernel.parameters_blocks(C, triton_launch.interpreted())
    kernel.norm_linear_bwd_parameters_kernel[(-(-C // blocks["BLOCK_C"]),)](
        *given, dgain, dweight, K, C, chunks, **blocks
    )
    folded = sums.double().sum(0)
    torch.testing.assert_close(dgain.cpu(), (folded * weight.double()).sum(0).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dweight.cpu(), (folded * gain.double()).to(dtype))


@pytest.mark.arithmetic
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(layout, dtype):
    """Maps in a half type and parameters in float32, as under autocast; then all in half."""
    tensors = make((3, 24, 4, 6, 40), layout, DEVICE)
    tensors["x"] = tensors["x"].to(dtype)
    assert_as_accurate_as_the_reference(tensors)
    assert_as_accurate_as_the_reference({name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_tf32_where_convolutions_may_use_it():
    """The interpreter ignores tf32, so this tests that the tiles for tf32 compute the same."""
    tensors = make((2, 40, 9, 9, 70), "nhwc", DEVICE)
    exact = run("triton", tensors)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for name, value in run("triton", tensors).items():
        torch.testing.assert_close(value, exact[name], rtol=2e-2, atol=2e-2 * exact[name].abs().max().item())


@pytest.mark.arithmetic
def test_rows_of_zeros():
    """The norm is clamped: finite, and equal to the reference in its huge gradient as well."""
    tensors = make(SMALL, "nhwc", DEVICE)
    tensors["x"][:, :, 1] = 0
    tensors["x"][0, :, 2] *= 1e-14
    assert_as_accurate_as_the_reference(tensors)


def test_a_gradient_of_another_layout():
    tensors = make(SMALL, "nhwc", DEVICE)
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = tensors["x"].clone().requires_grad_()
        with use_backend("triton"):
            out = norm_linear(x, tensors["gain"], tensors["weight"])
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
        out.backward(grad.contiguous(memory_format=memory_format))
        results.append(x.grad)
    assert torch.equal(*results)


def test_weights_that_do_not_lie_in_rows():
    tensors = make(SMALL, "nhwc", DEVICE)
    with use_backend("triton"):
        expected = norm_linear(**tensors)
        tensors["weight"] = tensors["weight"].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(norm_linear(**tensors), expected)


def test_deterministic():
    tensors = make((3, 24, 20, 20, 40), "nhwc", DEVICE)
    first, second = run("triton", tensors), run("triton", tensors)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [3, 12])
def test_independent_of_the_batch(side, layout, monkeypatch):
    """Output and gradient of a sample, bit for bit: tiles of rows are those of a sample."""
    tensors = make((3, 24, side, side, 40), layout, DEVICE)
    grad = torch.randn(3, 40, side, side, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    tiles = set()
    for name in ("forward_tile", "backward_x_tile"):
        choose = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *sizes, choose=choose, name=name: tiles.add((name, tile := choose(*sizes))) or tile
        )
    results = []
    for part in (slice(3), slice(1)):
        x = tensors["x"][part].clone().requires_grad_()
        with use_backend("triton"):
            out = norm_linear(x, tensors["gain"], tensors["weight"])
        (dx,) = torch.autograd.grad(out, x, grad[part])
        results.append((out[:1], dx[:1]))
    assert len(tiles) == 2
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together, alone)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_without_a_gradient_gives_none():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL, "nhwc", DEVICE).items()}
    with use_backend("triton"):
        WithoutGradient.apply(norm_linear(**tensors)).sum().backward()
    assert all(tensor.grad is None for tensor in tensors.values())


def test_keeps_only_x_and_a_float_per_pixel():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL, "nhwc", DEVICE).items()}
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_linear(**tensors)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    assert [tensor.numel() for tensor in kept if tensor.data_ptr() not in given] == [3 * 4 * 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    tensors = {name: tensor.requires_grad_() for name, tensor in make((2, 8, 3, 4, 12), layout, DEVICE).items()}
    torch.library.opcheck(torch.ops.ddpm_fast.norm_linear.default, tuple(tensors.values()))
    out, norms = torch.ops.ddpm_fast.norm_linear(*tensors.values())
    arguments = (out.detach(), tensors["x"].detach(), norms, tensors["gain"].detach(), tensors["weight"].detach())
    torch.library.opcheck(torch.ops.ddpm_fast.norm_linear_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout):
    tensors = make((2, 8, 3, 4, 12), layout, DEVICE)

    def loss(x, gain, weight):
        out = norm_linear(x, gain, weight)
        return (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)).sum(), out

    results = []
    with use_backend("triton"):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors.values()]
            value, out = function(*leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


REFUSED = {
    "float64": (lambda x: x.double(), "an argument is torch.float64, and the kernels compute in float32"),
    "empty": (lambda x: x[:0], "an argument is empty"),
    "strided": (lambda x: x[:, :, ::2], "x is neither contiguous nor channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_the_reference_runs(name):
    change, reason = REFUSED[name]
    tensors = make(SMALL, "nhwc", DEVICE)
    tensors["x"] = change(tensors["x"])
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"norm_linear: .* refuses: {reason}"):
        norm_linear(**tensors)
    assert norm_linear(**tensors).shape[0] == tensors["x"].shape[0]


@pytest.mark.parametrize("precision, most", [("ieee", 512), ("tf32", 1024)])
def test_refuses_rows_that_registers_do_not_hold(precision, most):
    torch.backends.cudnn.conv.fp32_precision = precision
    tensors = make((1, most + 1, 1, 1, 1), "nhwc", DEVICE)
    message = f"x has {most + 1} channels, and a program of the kernels holds at most {most} of torch.float32"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        norm_linear(**tensors)


@pytest.mark.arithmetic
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_linear_residual(scale, dtype, layout):
    """Maps in a half type have their parameters in float32; a residual may have another layout."""
    shape = (2, 70, 5, 7, 24)
    tensors = make(shape, layout, DEVICE)
    leaves = {"x": tensors["x"].to(dtype), "weight": tensors["weight"], "bias": torch.randn(24, device=DEVICE)}
    for residual_layout in LAYOUTS.values():
        residual = torch.randn(2, 24, 5, 7, device=DEVICE, dtype=dtype).contiguous(memory_format=residual_layout)
        results = {}
        for backend, exact in (("triton", False), ("reference", False), ("reference", True)):
            given = {name: t.detach().clone() for name, t in {**leaves, "residual": residual}.items()}
            given = {name: (t.double() if exact else t).requires_grad_() for name, t in given.items()}
            with use_backend(backend):
                out = linear_residual(**given, scale=scale)
            out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
            results[backend, exact] = {"out": out.detach(), **{name: t.grad for name, t in given.items()}}
        actual = results["triton", False]
        assert actual["out"].is_contiguous(memory_format=LAYOUTS[layout])
        for name, truth in results["reference", True].items():
            assert_close_to_truth(actual[name], results["reference", False][name], truth, name=name)


def beside(x, gain, weight):
    """A function of both outputs of `norm_linear_beside`."""
    out, x = norm_linear_beside(x, gain, weight)
    return torch.cat((out, x), dim=1)


def of_two_readers(x, gain, weight):
    return torch.cat((norm_linear(x, gain, weight), x), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 1, 7, 5), (2, 70, 9, 7, 100)], ids=str)
def test_the_gradient_of_another_reader_is_added(shape, dtype):
    tensors = make(shape, "nhwc", DEVICE)
    tensors["x"] = tensors["x"].to(dtype)
    results = []
    for function, backend, kind in (
        (beside, "triton", None),
        (of_two_readers, "reference", None),
        (of_two_readers, "reference", torch.float64),
    ):
        leaves = {n: t.detach().to(kind or t.dtype).clone().requires_grad_() for n, t in tensors.items()}
        with use_backend(backend):
            out = function(**leaves)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
        results.append({"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}})
    actual, expected, truth = results
    assert actual["dx"].stride() == tensors["x"].stride()
    for name in truth:
        floor = 16 if name in ("dgain", "dweight") else 4
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)


def test_another_reader_without_a_gradient_and_layouts_that_are_added_by_autograd():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL, "nhwc", DEVICE).items()}
    with use_backend("triton"):
        out, x = norm_linear_beside(**tensors)
        assert torch.equal(x, tensors["x"]) and x.data_ptr() == tensors["x"].data_ptr()
        (alone,) = torch.autograd.grad(out.sum(), tensors["x"], retain_graph=True)
        (expected,) = torch.autograd.grad(norm_linear(**tensors).sum(), tensors["x"])
        assert torch.equal(alone, expected)
        contiguous = tensors["x"].detach().contiguous().requires_grad_()
        assert norm_linear_beside(contiguous, tensors["gain"], tensors["weight"])[1] is contiguous
        (dx,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.sum().backward()


def test_the_operator_of_another_reader_and_compile():
    tensors = {name: tensor.requires_grad_() for name, tensor in make((2, 8, 3, 4, 12), "nhwc", DEVICE).items()}
    detached = [tensor.detach() for tensor in tensors.values()]
    grad, factors = torch.ops.ddpm_fast.norm_linear(*detached)
    arguments = (grad, detached[0], factors, *detached[1:], detached[0])
    torch.library.opcheck(torch.ops.ddpm_fast.norm_linear_beside_backward.default, arguments)
    results = []
    with use_backend("triton"):
        for function in (beside, torch.compile(beside, backend="aot_eager", fullgraph=True)):
            out = function(**tensors)
            results.append([out, *torch.autograd.grad(out.sin().sum(), list(tensors.values()))])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_linear_residual_is_an_operator_and_compiles():
    tensors = make((2, 8, 3, 4, 12), "nhwc", DEVICE)
    arguments = [tensors["x"], tensors["weight"], torch.randn(12, device=DEVICE), torch.randn(2, 12, 3, 4).to(DEVICE)]
    arguments = [tensor.requires_grad_() for tensor in arguments]
    torch.library.opcheck(torch.ops.ddpm_fast.linear_residual.default, (*arguments, 0.5))
    with use_backend("triton"):
        compiled = torch.compile(linear_residual, backend="aot_eager", fullgraph=True)(*arguments, scale=0.5)
        assert torch.equal(compiled, linear_residual(*arguments, scale=0.5))


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 70, 5, 7, 24), (3, 24, 9, 8, 100)], ids=str)
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_gradients_of_a_residuals_readers(readers, shape, dtype):
    """Each reader of the output has a branch, and the kernel of dx adds their gradients and sums the bias's."""
    B, C, H, W, K = shape
    tensors = {name: make(shape, "nhwc")[name] for name in ("x", "weight")}
    tensors |= {
        "bias": torch.randn(K),
        "residual": torch.randn(B, K, H, W).contiguous(memory_format=torch.channels_last),
    }
    tensors = {name: tensor.to(dtype).to(DEVICE) for name, tensor in tensors.items()}
    results = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = {name: tensor.to(kind).clone().requires_grad_() for name, tensor in tensors.items()}
        with poisoned_memory(), branching(), use_backend(backend):
            out = linear_residual(**leaves)
            maps = [out, *(branch(out) for _ in range(readers - 1))]
            assert all(map is out for map in maps[1:]) == (backend == "reference" or readers == 1)
            grads = [torch.linspace(-1, i + 1, out.numel(), device=DEVICE).reshape(out.shape) for i in range(readers)]
            torch.autograd.backward(maps, [grad.to(dtype).to(kind) for grad in grads])
        results.append({"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    actual, expected, truth = results
    for name in truth:
        floor = 16 if name in ("weight", "bias") else 4
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)


def test_a_network_adds_no_gradients_of_softmax_attention(monkeypatch):
    """The last one of the encoder is read by a convolution and a skip connection, the middle one by a block, twice."""
    torch.manual_seed(0)
    model, readers = Unet(8, dim_mults=(1, 2)).to(DEVICE), []
    operator = op._gradients_of_readers.triton

    def watched(grad, grad2, grad3, weight):
        readers.append(sum(g is not None for g in (grad, grad2, grad3)))
        return operator(grad, grad2, grad3, weight)

    monkeypatch.setattr(op._gradients_of_readers, "triton", watched)
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 8, device=DEVICE).reshape(2, 3, 4, 8)
    x, times, results = x.contiguous(memory_format=torch.channels_last), torch.tensor([3, 500], device=DEVICE), []
    for backend in (None, "reference"):
        with use_backend(backend):
            results.append(torch.autograd.grad(model(x, times).square().mean(), list(model.parameters())))
    assert readers == [1, 2, 2]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_the_operator_of_a_residuals_readers():
    grad, weight = torch.randn(2, 12, 3, 4).to(DEVICE), torch.randn(12, 8, 1, 1).to(DEVICE)
    for further in ((None, None), (grad, None), (grad, grad)):
        torch.library.opcheck(torch.ops.ddpm_fast.linear_residual_gradients.default, (grad, *further, weight))


def test_triton_is_preferred_where_it_runs():
    ops = ("norm_linear", "linear_residual")
    rows = [line for line in dispatch.explain(devices=[torch.device(DEVICE)]).splitlines() if line.split()[0] in ops]
    assert len(rows) == 6
    assert all(("* triton" in row and "accepts" in row) == ("triton" in row) for row in rows)


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL, "nhwc", DEVICE).items()}
    with use_backend("triton"):
        out = norm_linear(**tensors)
    with pytest.raises(RuntimeError, match="norm_linear: .* cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
