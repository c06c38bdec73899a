"""The Triton kernels that add the gradients of stem_conv's readers, against torch.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.branches import branch, branching
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
# B, K, H, W: of one pixel, of channels and pixels that fill no block, of several chunks.
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 70, 9, 7), (2, 8, 33, 31)]


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
    x, weight, bias = (
        normal(2, 3, 6, 5, dtype=dtype),
        normal(12, 3, 7, 7, seed=1),
        normal(12, 1, 1, 1, seed=2).flatten(),
    )
    leaves = {"x": x, "weight": weight, "bias": bias}
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
