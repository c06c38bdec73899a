"""norm_linear and linear_residual: the reference and the errors. test_triton.py and test_native.py test the kernels."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import use_backend
from ddpm_fast.ops.norm_linear import reference
from ddpm_fast.ops.norm_linear.op import linear_residual, norm_linear
from ddpm_fast.runtime import dispatch
from ddpm_fast.testing.norm_linear_cases import make, run
from ddpm_fast.testing.truth import assert_close_to_truth

HAS_TRITON = importlib.util.find_spec("triton") is not None
SHAPE = (2, 8, 3, 4, 12)


def plain(x, gain, weight):
    """Upstream's two modules in a row."""
    return F.conv2d(F.normalize(x, dim=1) * gain * x.shape[1] ** 0.5, weight)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_reference_is_upstreams_modules(upstream, layout):
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SHAPE, layout).items()}
    norm = upstream.RMSNorm(SHAPE[1])
    norm.g.data = tensors["gain"].detach()
    out, expected = norm_linear(**tensors), F.conv2d(norm(tensors["x"]), tensors["weight"])
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_reference_are_autograds(dtype):
    tensors = make(SHAPE, "nhwc")
    tensors["x"][:, :, 1, 1] = 0
    tensors["x"][0, :, 0] *= 1e-15
    tensors["x"] = tensors["x"].to(dtype)
    actual = run("reference", tensors)

    def autograds(function, tensors):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        out = function(**leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype))
        return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    truth = autograds(plain, {name: tensor.double() for name, tensor in tensors.items()})
    expected = {name: tensor.to(tensors["x"].dtype) for name, tensor in tensors.items()}
    expected = autograds(plain, expected)
    for name in truth:
        same_dtype = expected[name].to(actual[name].dtype)
        assert_close_to_truth(actual[name], same_dtype, truth[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["norm_linear", "linear_residual"])
def test_autocast_changes_nothing(op, dtype):
    """Neither forward nor backward, which runs in autocast too."""
    tensors = make(SHAPE, "nhwc")
    x, gain, weight = tensors["x"].to(dtype), tensors["gain"], tensors["weight"]
    bias, residual = torch.randn(12), torch.randn(2, 12, 3, 4)
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = (
                norm_linear(leaf, gain, weight)
                if op == "norm_linear"
                else linear_residual(leaf, weight, bias, residual)
            )
            (dx,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert out.dtype == dx.dtype == dtype
        results.append((out, dx))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_the_reference_are_its_differences():
    leaves = [tensor.double().requires_grad_() for tensor in make((2, 4, 2, 3, 5), "nhwc").values()]
    assert torch.autograd.gradcheck(reference.norm_linear, leaves)


@pytest.mark.parametrize("wanted", ["x", "gain", "weight"])
def test_only_the_gradient_that_is_asked_for(wanted):
    tensors = make(SHAPE, "nhwc")
    expected = run("reference", tensors)
    tensors[wanted].requires_grad_()
    out = norm_linear(**tensors)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    torch.testing.assert_close(tensors[wanted].grad, expected[f"d{wanted}"])


def test_reference_keeps_nothing_but_its_arguments():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SHAPE, "nhwc").items()}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, use_backend("reference"):
        norm_linear(**tensors)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors.values()}


def test_reference_takes_what_kernels_do_not():
    for change in (lambda x: x[:0], lambda x: x[:, :, ::2], lambda x: x.double()):
        tensors = make(SHAPE, "nhwc")
        x = tensors["x"] = change(tensors["x"]).requires_grad_()
        out = norm_linear(**tensors)
        assert out.shape == (x.shape[0], SHAPE[4], *x.shape[2:]) and out.dtype == x.dtype
        out.sum().backward()
        assert torch.isfinite(x.grad).all()


def test_second_derivatives_of_the_reference():
    tensors = [tensor.double().requires_grad_() for tensor in make(SHAPE, "nhwc").values()]
    assert torch.autograd.gradgradcheck(norm_linear, tensors, raise_exception=True)


ERRORS = {
    "x": ({"x": torch.zeros(2, 8, 3)}, ValueError, r"x must have shape \(B, C, H, W\), got \(2, 8, 3\)"),
    "x type": ({"x": [1]}, TypeError, "x must be a tensor, got list"),
    "integers": ({"x": torch.zeros(2, 8, 3, 4).int()}, TypeError, "x must be float32, .* got torch.int32"),
    "gain": ({"gain": torch.zeros(7)}, ValueError, r"gain must have 8 elements, .* got shape \(7,\)"),
    "weight": (
        {"weight": torch.zeros(12, 8)},
        ValueError,
        r"weight must have shape \(K, 8, 1, 1\), got \(12, 8\)",
    ),
    "device": ({"gain": torch.zeros(8, device="meta")}, ValueError, "gain must be on the device of x, cpu, got meta"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named(name):
    change, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        norm_linear(**make(SHAPE, "nchw") | change)


RESIDUAL_ERRORS = {
    "bias": ({"bias": torch.zeros(1, 12)}, r"bias must have shape \(12,\), got \(1, 12\)"),
    "residual": (
        {"residual": torch.zeros(2, 8, 3, 4)},
        r"residual must have shape \(2, 12, 3, 4\), got \(2, 8, 3, 4\)",
    ),
    "weight": ({"weight": torch.zeros(12, 7, 1, 1)}, r"weight must have shape \(K, 8, 1, 1\), got \(12, 7, 1, 1\)"),
}


@pytest.mark.parametrize("name", RESIDUAL_ERRORS)
def test_errors_of_linear_residual_are_named(name):
    change, message = RESIDUAL_ERRORS[name]
    tensors = make(SHAPE, "nchw")
    given = {"x": tensors["x"], "weight": tensors["weight"], "bias": torch.zeros(12)}
    given["residual"] = torch.zeros(2, 12, 3, 4)
    with pytest.raises(ValueError, match=message):
        linear_residual(**given | change)


def test_linear_residual_is_a_convolution_and_a_sum():
    x, weight = make(SHAPE, "nhwc")["x"], make(SHAPE, "nhwc")["weight"]
    bias, residual = torch.randn(12), torch.randn(2, 12, 3, 4)
    expected = F.conv2d(x, weight, bias) + residual
    with use_backend("reference"):
        assert torch.equal(linear_residual(x, weight, bias, residual), expected)
    torch.testing.assert_close(linear_residual(x, weight, bias, residual), expected)


def test_on_the_cpu_triton_refuses_with_its_reason():
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    message = f"norm_linear: backend 'triton' was forced and refuses: {reason}"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        norm_linear(**make(SHAPE, "nchw"))
    assert reason in dispatch.explain(devices=[torch.device("cpu")])
