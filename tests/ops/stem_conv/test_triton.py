"""The Triton kernels of stem_conv, and those that add the gradients of its readers, against torch.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.branches import branch, branching
from ddpm_fast.ops.stem_conv import op
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
# B, K, H, W: of one pixel, of channels and pixels that fill no block, of several chunks.
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 70, 9, 7), (2, 8, 33, 31)]


# B, C, H, W, K, side: of one pixel, of rows shorter and longer than a tile, of taps that fill no block, of several
# programs' taps.
CONVOLUTIONS = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 9, 17, 7),
    (1, 3, 2, 131, 5, 3),
    (1, 6, 5, 4, 40, 7),
    (1, 16, 3, 13, 8, 5),
]


def convolution(B, C, H, W, K, side, dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    weight = normal(K, C, side, side, seed=seed + 1) / (C * side**2) ** 0.5
    leaves = {"x": normal(B, C, H, W, seed=seed), "weight": weight, "bias": normal(K, 1, 1, 1, seed=seed + 2).flatten()}
    return {name: tensor.to(dtype) for name, tensor in leaves.items()}


def run(backend: str, leaves: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Output and gradients by name; new memory is NaN."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(backend), exact_convolutions():
            out = stem_conv(**leaves, **options)
            grad = normal(*out.shape, dtype=out.dtype, seed=9)
            gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    finally:
        torch.use_deterministic_algorithms(False)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}


def check(leaves: dict[str, torch.Tensor], **options) -> None:
    actual, expected = run("triton", leaves, **options), run("reference", leaves, **options)
    exact = {name: [t.double() for t in maps] for name, maps in options.items()}
    truth = run("reference", {name: t.double() for name, t in leaves.items()}, **exact)
    for name, value in truth.items():
        assert actual[name].dtype == expected[name].dtype
        assert_close_to_truth(actual[name], expected[name], value, name=name, floor=16)
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_the_convolution(shape, dtype):
    check(convolution(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_in_either_layout_and_any(dtype):
    leaves = convolution(*CONVOLUTIONS[1], dtype=dtype)
    last = run("triton", leaves)
    for x in (leaves["x"].contiguous(), leaves["x"].permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)):
        found = run("triton", leaves | {"x": x})
        assert all(torch.equal(found[name], last[name]) for name in last), "the same numbers in the same order"


def test_no_bias_and_a_weight_in_either_layout():
    leaves = convolution(*CONVOLUTIONS[3], dtype=torch.float16)
    del leaves["bias"]
    check(leaves)
    check(leaves | {"weight": leaves["weight"].contiguous()})


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_maps_side_by_side(layout):
    leaves = convolution(*CONVOLUTIONS[3], dtype=torch.bfloat16)
    maps = [part.contiguous(memory_format=layout) for part in leaves["x"].split((1, 3, 2), dim=1)]
    check(leaves | {"x": maps[0]}, beside=maps[1:])
    with use_backend("triton"):
        out = stem_conv(maps[0], leaves["weight"], leaves["bias"], beside=maps[1:])
        assert torch.equal(out, stem_conv(**leaves))


def test_what_it_refuses_and_yields():
    x, weight, bias = convolution(*CONVOLUTIONS[1]).values()
    kernel = next(i for i in op._stem_conv_op.implementations if i.name == "triton")
    for other, reason in ((x.double(), "float64"), (x[:0], "empty")):
        assert reason in kernel.refuses(other, weight, bias, ())
    assert kernel.refuses(x, weight, bias, ()) is None and "float32" in kernel.yields(x, weight, bias, ())
    assert kernel.why_not(x.bfloat16(), weight, bias, ()) is None and op.reads_in_place(x.half(), weight, bias)
    wide = convolution(1, 17, 4, 4, 8, 3, dtype=torch.float16)
    assert "17 channels" in kernel.yields(*wide.values(), ())


def test_the_same_bits_whatever_the_batch():
    leaves = convolution(3, 3, 9, 40, 8, 7, dtype=torch.bfloat16)
    with use_backend("triton"):
        whole, alone = stem_conv(**leaves), stem_conv(**leaves | {"x": leaves["x"][1:2]})
    assert torch.equal(whole[1:2], alone)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return tensor.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, number, dtype):
    """The sum of the maps is rounded once, whatever their layout; NaN is what is not written."""
    grads = [normal(*shape, dtype=dtype, seed=seed) for seed in range(number)]
    grads[1] = grads[1].contiguous()
    torch.use_deterministic_algorithms(True)
    try:
        total, dbias = torch.ops.ddpm_fast.stem_conv_sum_of_gradients(*grads, *[None] * (3 - number))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(total, sum(grad.float() for grad in grads).to(dtype))
    assert total.is_contiguous(memory_format=torch.channels_last) and total.dtype == dbias.dtype == dtype
    assert_close_to_truth(dbias, total.sum((0, 2, 3)), total.double().sum((0, 2, 3)), name="dbias")


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_a_convolution_with_readers(readers, dtype):
    leaves = convolution(2, 3, 6, 5, 12, 7)
    leaves["x"] = leaves["x"].to(dtype)
    grads = [normal(2, 12, 6, 5, dtype=dtype, seed=3 + i) for i in range(readers)]

    def gradients(dtype: torch.dtype | None, with_branches: bool) -> dict[str, torch.Tensor]:
        given = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in leaves.items()}
        if with_branches:
            with branching():
                out = stem_conv(**given)
            maps = [out, *(branch(out) for _ in range(readers - 1))]
            assert len({id(map) for map in maps}) == readers
        else:
            with use_backend("reference"):
                out = stem_conv(**given)
            maps = [out.view_as(out) for _ in grads]
        made = torch.autograd.grad(maps, list(given.values()), [grad.to(out.dtype) for grad in grads])
        return {"out": out.detach(), **dict(zip(given, made, strict=True))}

    with exact_convolutions():
        actual, expected, truth = gradients(None, True), gradients(None, False), gradients(torch.float64, False)
    for name, value in truth.items():
        assert actual[name].dtype == expected[name].dtype and actual[name].shape == expected[name].shape
        assert_close_to_truth(actual[name], expected[name], value, name=name)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradient_that_is_asked_for(wanted):
    given = {"x": normal(1, 3, 4, 4), "weight": normal(8, 3, 3, 3), "bias": normal(8, 1, 1, 1).flatten()}
    given[wanted].requires_grad_()
    with branching():
        out = stem_conv(**given)
    (found,) = torch.autograd.grad((out * branch(out)).sum(), given[wanted])
    (expected,) = torch.autograd.grad(stem_conv(**given).square().sum(), given[wanted])
    torch.testing.assert_close(found, expected)


def test_without_branches():
    """Where they would not be read by kernels, the convolution is what it is elsewhere."""
    x, weight, bias = normal(1, 3, 4, 4), normal(8, 3, 3, 3).requires_grad_(), normal(8, 1, 1, 1).flatten()
    with branching():
        for given in ((x.double(), weight, bias), (x.contiguous(), weight, bias), (x[:0], weight, bias), (x, weight)):
            assert branch(out := stem_conv(*given)) is out
        with use_backend("reference"):
            assert branch(out := stem_conv(x, weight, bias)) is out
        assert branch(out := stem_conv(x, weight, bias)) is not out


def test_a_second_derivative_is_refused_and_not_wrong():
    weight = normal(8, 3, 3, 3).requires_grad_()
    with branching():
        out = stem_conv(normal(1, 3, 4, 4), weight, normal(8, 1, 1, 1).flatten())
    (dweight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dweight.sum().backward()


def test_opcheck():
    grad = normal(2, 5, 3, 4)
    for grad3 in (grad, None):
        torch.library.opcheck(torch.ops.ddpm_fast.stem_conv_sum_of_gradients.default, (grad, grad, grad3))
        x, weight, _ = convolution(2, 3, 3, 4, 5, 3).values()
        maps = (x[:, :1].contiguous(), x[:, 1:].contiguous(), None)
        torch.library.opcheck(
            torch.ops.ddpm_fast.stem_conv_backward_of_readers.default, (grad, grad, grad3, *maps, weight)
        )
    leaves = {name: tensor.requires_grad_() for name, tensor in convolution(2, 3, 3, 4, 5, 3).items()}
    x, weight, bias = leaves.values()
    torch.library.opcheck(torch.ops.ddpm_fast.stem_conv.default, (x, None, None, weight, bias))
    torch.library.opcheck(torch.ops.ddpm_fast.stem_conv.default, (x, None, None, weight, None))
