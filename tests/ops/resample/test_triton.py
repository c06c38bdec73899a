"""The Triton kernel of the upsampling convolution's taps against torch's operators.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.ops.resample import composite
from ddpm_fast.ops.resample.op import upsample_conv
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pooled(weight: torch.Tensor) -> torch.Tensor:
    """The taps by torch's operators, in float64."""
    mirrored = weight.double().transpose(0, 1).flip(2, 3)
    return F.avg_pool2d(mirrored, 2, stride=1, padding=1, divisor_override=1)


# Sums of at most four numbers have nothing of sm_80's but its rounding to bfloat16.
@pytest.mark.release(
    but=lambda K, C, layout, dtype, _arithmetic=None: (
        (_arithmetic is None or (dtype == torch.bfloat16 and C < 64))
        and (C < 64 or (layout == torch.channels_last) == (dtype == torch.float32))
    )
)
@pytest.mark.arithmetic
@DTYPES
@LAYOUTS
@pytest.mark.parametrize("K, C", [(1, 1), (5, 3), (66, 70)])
def test_taps_and_their_gradient(K, C, layout, dtype):
    weight = normal(K, C, 3, 3).to(dtype).contiguous(memory_format=layout)
    taps = composite.upsampling_taps(weight)
    expected = pooled(weight).to(dtype)
    torch.testing.assert_close(taps, expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    grad = normal(C, K, 4, 4, seed=1).to(dtype).contiguous(memory_format=layout)
    found = composite._gradient_of_taps(grad)
    leaf = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(pooled(leaf), leaf, grad.double())
    torch.testing.assert_close(found, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    for made in (taps, found):
        assert made.is_contiguous(memory_format=torch.channels_last)


@DTYPES
def test_the_convolution_and_its_gradients(dtype):
    x = normal(2, 6, 4, 5, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(7, 6, 3, 3).to(dtype), normal(7).to(dtype)
    results = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (x, weight, bias)]
        with use_backend(backend):
            out = upsample_conv(*leaves)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(dtype).to(kind)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    tolerance = 32 * torch.finfo(dtype).eps
    for actual, truth in zip(*results, strict=True):
        limit = tolerance * truth.abs().max().item()
        torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=limit)


def test_second_derivatives():
    weight, x = normal(3, 2, 3, 3).requires_grad_(), normal(1, 2, 3, 3).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            out = upsample_conv(x, weight)
            gradients = torch.autograd.grad(out.pow(3).sum(), (x, weight), create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_opcheck_and_compile():
    weight = normal(5, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.ddpm_fast.window_sums.default, (weight.requires_grad_(),))
    x = normal(1, 3, 4, 4).requires_grad_()
    results = []
    with use_backend("triton"):
        for function in (upsample_conv, torch.compile(upsample_conv, backend="aot_eager", fullgraph=True)):
            out = function(x, weight)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (x, weight))])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_the_reference_runs_none():
    weight = normal(5, 3, 3, 3)
    with use_backend("reference"):
        assert not composite._runs_triton(weight)
    assert composite._runs_triton(weight) and not composite._runs_triton(weight.double())
